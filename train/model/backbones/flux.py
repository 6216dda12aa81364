"""FLUX.1: dev, schnell, Krea, Kontext, Fill and fine-tunes. The only file of the trainer that knows their names."""

import math
from typing import Any

import torch
from torch import Tensor

from qrlora_core import EncodedText
from qrlora_core.families import DOUBLE_TARGETS, SINGLE_TARGETS, native_layers
from qrlora_core.families import FLUX as TABLE

from ...errors import TrainError
from .backbone import Backbone, ModelFacts, Specs, StoredRows, count_blocks, packed, unpacked
from .pipeline import Pipeline, shifted_and_scaled

_ADVICE = "Use FLUX.1-dev, -schnell or a fine-tune of them"
# A Fill model takes so many times the channels: latents, latents of what is kept, and a mask of 8x8 pixels for each
_FILL = 6
_NOTHING_KEPT = (0 - 0.1159) * 0.3611  # latents of zeros in the model's space: less the shift, times the scale
_PLAIN = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}


def stored_rows(key: str, rows: int) -> list[StoredRows]:
    """What diffusers calls a tensor of ComfyUI's layout, such as `double_blocks.0.img_attn.qkv.bias`."""
    module, _, kind = key.rpartition(".")
    if module in _PLAIN and kind in ("weight", "bias"):
        return [StoredRows(f"{_PLAIN[module]}.{kind}", 0, rows)]
    block, _, tail = module.partition(".")
    number, _, suffix = tail.partition(".")
    if kind == "scale" and suffix in _NORMS and block in _BLOCKS:
        return [StoredRows(f"{_BLOCKS[block]}.{number}.{_NORMS[suffix]}.weight", 0, rows)]
    names = native_layers(TABLE, module) if kind in ("weight", "bias") else ()
    if not names:
        return []
    # q, k, v are a third of a double block's rows, and a seventh of a single block's (its MLP has the other four)
    share = {1: rows, 3: rows // 3, 4: rows // 7}[len(names)]
    sizes = [share] * (len(names) - 1)
    sizes.append(rows - sum(sizes))
    return [StoredRows(f"{name}.{kind}", sum(sizes[:index]), sizes[index]) for index, name in enumerate(names)]


def facts(specs: Specs, title: str) -> ModelFacts:
    """See `Backbone.facts`.

    Raises:
        TrainError: reason "model": a tensor is missing, or it is a variant with other inputs.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in specs:
            raise TrainError("model", f"{title} is not a FLUX.1 transformer: it has no {name}. {_ADVICE}")
        return specs[name].shape

    hidden, channels = shape("x_embedder.weight")
    head = shape("transformer_blocks.0.attn.norm_q.weight")[0]
    out_channels = shape("proj_out.weight")[0]
    texts = (shape("context_embedder.weight")[1], shape("time_text_embed.text_embedder.linear_1.weight")[1])
    if channels not in (out_channels, _FILL * out_channels):
        raise TrainError(
            "model",
            f"{title} takes {channels} channels and gives {out_channels}: a Depth or Canny variant, which takes "
            "a control picture besides. Train on FLUX.1-dev, -schnell, -Fill or a fine-tune of them",
        )
    if hidden % head:
        raise TrainError("model", f"{title} has heads of {head} in {hidden}; FLUX.1 has heads of 128")
    arguments = {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": out_channels,
        "num_layers": count_blocks(specs, "transformer_blocks"),
        "num_single_layers": count_blocks(specs, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": texts[0],
        "pooled_projection_dim": texts[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in specs,
        "axes_dims_rope": [16, 56, 56],
    }
    return ModelFacts(arguments, hidden, out_channels // 4, texts)


def inputs(model: Any, latents: Tensor, sigmas: Tensor, text: EncodedText, guidance: float) -> dict[str, Any]:
    """Latents packed in 2x2 patches, positions, sigma as time; guidance where the model is distilled with it.

    A Fill model also takes what is kept of a picture, and a mask of what is painted: here all of it is painted and
    nothing kept, as ComfyUI samples it where no picture is given.
    """
    batch, _, height, width = latents.shape
    tokens = packed(latents)
    if model.config.in_channels > tokens.shape[-1]:
        kept, mask = torch.full_like(tokens, _NOTHING_KEPT), torch.ones_like(tokens)
        tokens = torch.cat([tokens, kept, *[mask] * (_FILL - 2)], dim=-1)
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    return {
        "hidden_states": tokens,
        "img_ids": positions.to(latents.device, torch.float32),
        "encoder_hidden_states": text.embeds,
        "txt_ids": torch.zeros(text.embeds.shape[1], 3, device=latents.device),
        "pooled_projections": text.pooled,
        "timestep": sigmas,
        # schnell and fine-tunes of it know no guidance
        "guidance": torch.full((batch,), guidance, device=latents.device) if model.config.guidance_embeds else None,
    }


def shift(tokens: int) -> float:
    """exp(mu), mu linear from 0.5 at 256 tokens to 1.15 at 4096."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def encode_text(pipeline: Any, text: str, max_tokens: int, device: torch.device) -> EncodedText:
    """T5's tokens and CLIP's pooled output."""
    embeds, pooled, _ = pipeline.encode_prompt(text, None, device=device, max_sequence_length=max_tokens)
    return EncodedText(embeds[0], pooled[0])


PIPELINE = Pipeline(
    # encoded alike; Kontext's own pipeline differs in what it makes of a picture, and is drawn from words alone here
    classes=dict.fromkeys(("FluxPipeline", "FluxKontextPipeline", "FluxFillPipeline"), "FluxPipeline"),
    undrawable={"FluxFillPipeline": "draws into a picture and its mask, and sample has none"},
    vae_class="AutoencoderKL",
    encoders={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    encode_text=encode_text,
    encode_picture=shifted_and_scaled,
)

FLUX = Backbone(
    family="flux",
    title="FLUX.1",
    advice=_ADVICE,
    model_class="FluxTransformer2DModel",
    since="0.35",
    file_mark="double_blocks.0.img_attn.qkv.weight",
    folder_mark="single_transformer_blocks.0.attn.to_q.weight",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    # counted with saved-tensor hooks on a small model (tests compare)
    activation_counts={"transformer_blocks": 22.0, "single_transformer_blocks": 14.5},
    default_layers={"transformer_blocks": DOUBLE_TARGETS, "single_transformer_blocks": SINGLE_TARGETS},
    stored_rows=stored_rows,
    swapped=frozenset({"norm_out.linear.weight", "norm_out.linear.bias"}),
    facts=facts,
    stated=("axes_dims_rope",),
    inputs=inputs,
    prediction=lambda output, size: unpacked(output[0], size),
    shift=shift,
    pipeline=PIPELINE,
    text_fields=("embeds", "pooled"),
)
