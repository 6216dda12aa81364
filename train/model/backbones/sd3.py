"""Stable Diffusion 3.5 medium and large, 3 medium, and fine-tunes of them."""

import math
from typing import Any

import torch
from torch import Tensor

from qrlora_core import EncodedText
from qrlora_core.families import SD3 as TABLE
from qrlora_core.families import native_layers

from ...errors import TrainError
from .backbone import Backbone, ModelFacts, Specs, StoredRows, count_blocks
from .pipeline import Pipeline, shifted_and_scaled

_ADVICE = "Use Stable Diffusion 3.5 medium, large or a fine-tune of them"
_HEAD = 64
# What autograd keeps of a block, in multiples of tokens * hidden size, and of a second attention, of the picture's
_BLOCK, _SECOND = 19.1, 7.1
_IN_BLOCKS = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
_LAYERS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")),
    "attn.to_add_out",
    *(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"{part}.{name}" for part in ("ff", "ff_context") for name in ("net.0.proj", "net.2")),
)


def stored_rows(key: str, rows: int) -> list[StoredRows]:
    """What diffusers calls a tensor of ComfyUI's layout, such as `joint_blocks.0.x_block.attn.qkv.weight`."""
    if key == "pos_embed":
        return [StoredRows("pos_embed.pos_embed", 0, rows)]
    module, _, kind = key.rpartition(".")
    if module == "final_layer.adaLN_modulation.1":
        return [StoredRows(f"norm_out.linear.{kind}", 0, rows)]
    block, _, tail = module.partition(".")
    number, _, suffix = tail.partition(".")
    if block == "joint_blocks" and suffix in _IN_BLOCKS:
        return [StoredRows(f"transformer_blocks.{number}.{_IN_BLOCKS[suffix]}.{kind}", 0, rows)]
    names = native_layers(TABLE, module)
    share = rows // max(1, len(names))  # q, k and v are a third each; everything else is alone
    return [StoredRows(f"{name}.{kind}", index * share, share) for index, name in enumerate(names)]


def facts(specs: Specs, title: str) -> ModelFacts:
    """See `Backbone.facts`.

    Raises:
        TrainError: reason "model": a tensor is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in specs:
            raise TrainError("model", f"{title} is not an SD3.5 transformer: it has no {name}. {_ADVICE}")
        return specs[name].shape

    hidden, channels, patch, _ = shape("pos_embed.proj.weight")
    text, pooled = shape("context_embedder.weight")[1], shape("time_text_embed.text_embedder.linear_1.weight")[1]
    count = count_blocks(specs, "transformer_blocks", uneven=True)
    dual = [index for index in range(count) if f"transformer_blocks.{index}.attn2.to_q.weight" in specs]
    arguments = {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": count,
        "attention_head_dim": _HEAD,
        "num_attention_heads": hidden // _HEAD,
        "joint_attention_dim": text,
        "caption_projection_dim": shape("context_embedder.weight")[0],
        "pooled_projection_dim": pooled,
        "out_channels": shape("proj_out.weight")[0] // patch**2,
        "pos_embed_max_size": math.isqrt(shape("pos_embed.pos_embed")[1]),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in specs else None,
    }
    return ModelFacts(arguments, hidden, channels, (text, pooled))


def activations(specs: Specs, height: int, width: int, text: int) -> tuple[list[float], list[float]]:
    """See `Backbone.activations`: some blocks attend to the picture a second time."""
    hidden, _, patch, _ = specs["pos_embed.proj.weight"].shape
    image = height * width // patch**2
    whole: list[float] = []
    for index in range(count_blocks(specs, "transformer_blocks", uneven=True)):
        twice = f"transformer_blocks.{index}.attn2.to_q.weight" in specs
        whole.append(hidden * (_BLOCK * (image + text) + (_SECOND * image if twice else 0.0)))
    return whole, [float(hidden * (image + text))] * len(whole)


def inputs(model: Any, latents: Tensor, sigmas: Tensor, text: EncodedText, guidance: float) -> dict[str, Any]:
    """Latents as they are: the model makes patches itself. Time from 0 to 1000."""
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text.embeds,
        "pooled_projections": text.pooled,
        "timestep": sigmas * 1000,
    }


def encode_text(pipeline: Any, text: str, max_tokens: int, device: torch.device) -> EncodedText:
    """Both CLIPs' tokens beside each other, then T5's; the CLIPs' pooled outputs."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        text, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=max_tokens
    )
    return EncodedText(embeds[0], pooled[0])


PIPELINE = Pipeline(
    classes={"StableDiffusion3Pipeline": "StableDiffusion3Pipeline"},
    vae_class="AutoencoderKL",
    encoders={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2", "tokenizer_3": "text_encoder_3"},
    encode_text=encode_text,
    encode_picture=shifted_and_scaled,
)

SD3 = Backbone(
    family="sd3",
    title="SD3.5",
    advice=_ADVICE,
    model_class="SD3Transformer2DModel",
    since="0.35",
    file_mark="joint_blocks.0.x_block.attn.qkv.weight",
    folder_mark="pos_embed.pos_embed",
    block_lists=("transformer_blocks",),
    activations=activations,
    default_layers={"transformer_blocks": _LAYERS},
    stored_rows=stored_rows,
    swapped=frozenset({"norm_out.linear.weight", "norm_out.linear.bias"}),
    swapped_in_last=("norm1_context.linear.weight", "norm1_context.linear.bias"),
    uneven=True,
    facts=facts,
    inputs=inputs,
    prediction=lambda output, size: output[0],
    shift=lambda tokens: 3.0,
    pipeline=PIPELINE,
    text_fields=("embeds", "pooled"),
)
