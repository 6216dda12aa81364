"""FLUX.2: klein 4B and 9B, dev, and fine-tunes of them. Latents have 128 channels, a token is one pixel of them."""

import math
from typing import Any

import torch
from torch import Tensor

from qrlora_core import EncodedText

from ...errors import TrainError
from .backbone import Backbone, ModelFacts, Specs, StoredRows, count_blocks
from .pipeline import Draw, Pipeline

_ADVICE = "Use FLUX.2-klein, FLUX.2-dev or a fine-tune of them"
_PLAIN = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
# A module of a block -> the layers whose rows it holds, all of one size
_IN_BLOCKS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_DOUBLE_LAYERS = tuple(name for names in list(_IN_BLOCKS.values())[:8] for name in names)


def stored_rows(key: str, rows: int) -> list[StoredRows]:
    """What diffusers calls a tensor of ComfyUI's layout, such as `double_blocks.0.img_attn.qkv.weight`."""
    module, _, kind = key.rpartition(".")
    kind = "weight" if kind == "scale" else kind  # of norms, in older files
    if module in _PLAIN:
        return [StoredRows(f"{_PLAIN[module]}.{kind}", 0, rows)]
    block, _, tail = module.partition(".")
    number, _, suffix = tail.partition(".")
    if block not in _BLOCKS or suffix not in _IN_BLOCKS:
        return []
    names = _IN_BLOCKS[suffix]
    share = rows // len(names)
    prefix = f"{_BLOCKS[block]}.{number}"
    return [StoredRows(f"{prefix}.{name}.{kind}", index * share, share) for index, name in enumerate(names)]


def facts(specs: Specs, title: str) -> ModelFacts:
    """See `Backbone.facts`.

    Raises:
        TrainError: reason "model": a tensor is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in specs:
            raise TrainError("model", f"{title} is not a FLUX.2 transformer: it has no {name}. {_ADVICE}")
        return specs[name].shape

    hidden, channels = shape("x_embedder.weight")
    head = shape("transformer_blocks.0.attn.norm_q.weight")[0]
    text = shape("context_embedder.weight")[1]
    arguments = {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0],
        "num_layers": count_blocks(specs, "transformer_blocks"),
        "num_single_layers": count_blocks(specs, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": text,
        "timestep_guidance_channels": shape("time_guidance_embed.timestep_embedder.linear_1.weight")[1],
        "mlp_ratio": shape("transformer_blocks.0.ff.linear_out.weight")[1] / hidden,
        "axes_dims_rope": [32, 32, 32, 32],
        "rope_theta": 2000,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in specs,
    }
    return ModelFacts(arguments, hidden, channels, (text,))


def inputs(model: Any, latents: Tensor, sigmas: Tensor, text: EncodedText, guidance: float) -> dict[str, Any]:
    """Every pixel of the latents is a token; positions are (frame, row, column, place in the text)."""
    batch, _, height, width = latents.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    nothing = torch.zeros_like(rows)
    places = torch.zeros(text.embeds.shape[1], 4)
    places[:, 3] = torch.arange(text.embeds.shape[1])
    return {
        "hidden_states": latents.flatten(2).mT,
        "encoder_hidden_states": text.embeds,
        "img_ids": torch.stack([nothing, rows, columns, nothing], dim=-1).flatten(0, 1).to(latents.device).float(),
        "txt_ids": places.to(latents.device),
        "timestep": sigmas,
        # klein knows no guidance
        "guidance": torch.full((batch,), guidance, device=latents.device) if model.config.guidance_embeds else None,
    }


def shift(tokens: int) -> float:
    """exp(mu), mu linear in the tokens, as the family's own schedule has it for many steps."""
    return math.exp(0.00016927 * tokens + 0.45666666)


def encode_text(pipeline: Any, text: str, max_tokens: int, device: torch.device) -> EncodedText:
    """Three layers of the text encoder side by side; the pipeline fills texts up to their longest."""
    embeds, _ = pipeline.encode_prompt(text, device=device, max_sequence_length=max_tokens)
    return EncodedText(embeds[0], None)


def encode_picture(vae: Any, pixels: Tensor, draw: Draw) -> Tensor:
    """2x2 pixels of the VAE's latents as channels, (channel, row, column), normalised by the VAE's own statistics."""
    drawn = draw(vae.encode(pixels).latent_dist).float()
    batch, channels, height, width = drawn.shape
    patches = drawn.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    latents = patches.reshape(batch, channels * 4, height // 2, width // 2)
    mean, variance = (value.float().view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
    normalised: Tensor = (latents - mean) / (variance + vae.config.batch_norm_eps).sqrt()
    return normalised


PIPELINE = Pipeline(
    classes={"Flux2Pipeline": "Flux2Pipeline", "Flux2KleinPipeline": "Flux2KleinPipeline"},
    vae_class="AutoencoderKLFlux2",
    encoders={"tokenizer": "text_encoder"},
    encode_text=encode_text,
    encode_picture=encode_picture,
)

FLUX2 = Backbone(
    family="flux2",
    title="FLUX.2",
    advice=_ADVICE,
    model_class="Flux2Transformer2DModel",
    since="0.36",
    file_mark="double_stream_modulation_img.lin.weight",
    folder_mark="double_stream_modulation_img.linear.weight",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    activation_counts={"transformer_blocks": 26.0, "single_transformer_blocks": 20.0},
    default_layers={
        "transformer_blocks": _DOUBLE_LAYERS,
        "single_transformer_blocks": ("attn.to_qkv_mlp_proj", "attn.to_out"),
    },
    stored_rows=stored_rows,
    swapped=frozenset({"norm_out.linear.weight"}),
    facts=facts,
    stated=("axes_dims_rope", "rope_theta"),
    inputs=inputs,
    prediction=lambda output, size: output[0].mT.reshape(size),
    shift=shift,
    pipeline=PIPELINE,
    patch=1,
)
