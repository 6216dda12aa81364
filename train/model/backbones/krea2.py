"""Krea 2 and fine-tunes of it."""

import math
from typing import Any

import torch
from torch import Tensor

from qrlora_core import EncodedText
from qrlora_core.families import KREA2 as TABLE
from qrlora_core.families import native_layers

from ...errors import TrainError
from .backbone import Backbone, ModelFacts, Specs, StoredRows, count_blocks, packed, unpacked
from .pipeline import Pipeline
from .qwen_image import encode_picture

_ADVICE = "Use Krea 2 or a fine-tune of it"
_LISTS = {
    "txtfusion.layerwise_blocks": "text_fusion.layerwise_blocks",
    "txtfusion.refiner_blocks": "text_fusion.refiner_blocks",
    "blocks": "transformer_blocks",
}
_IN_BLOCKS = {
    "prenorm.scale": "norm1.weight",
    "postnorm.scale": "norm2.weight",
    "attn.qknorm.qnorm.scale": "attn.norm_q.weight",
    "attn.qknorm.knorm.scale": "attn.norm_k.weight",
    "mod.lin": "scale_shift_table",
}
_OUTSIDE = {
    "txtmlp.0.scale": "txt_in.norm.weight",
    "last.norm.scale": "final_layer.norm.weight",
    "last.modulation.lin": "final_layer.scale_shift_table",
}
# shift, scale and gate of attention and of the feed-forward network; ComfyUI has them one after another
_TABLE_ROWS = 6
_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0")
_LAYERS = (*_ATTENTION, "ff.gate", "ff.up", "ff.down")


def stored_rows(key: str, rows: int) -> list[StoredRows]:
    """What diffusers calls a tensor of ComfyUI's layout, such as `blocks.0.attn.wq.weight`."""
    if key in _OUTSIDE:
        return [StoredRows(_OUTSIDE[key], 0, rows)]
    for theirs, ours in _LISTS.items():
        number, _, suffix = key.removeprefix(f"{theirs}.").partition(".")
        if key.startswith(f"{theirs}.") and suffix in _IN_BLOCKS:
            return [StoredRows(f"{ours}.{number}.{_IN_BLOCKS[suffix]}", 0, rows)]
    module, _, kind = key.rpartition(".")
    return [StoredRows(f"{name}.{kind}", 0, rows) for name in native_layers(TABLE, module)]


def facts(specs: Specs, title: str) -> ModelFacts:
    """See `Backbone.facts`.

    Raises:
        TrainError: reason "model": a tensor is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in specs:
            raise TrainError("model", f"{title} is not a Krea 2 transformer: it has no {name}. {_ADVICE}")
        return specs[name].shape

    def heads(block: str) -> tuple[int, int, int]:
        """Width of a head, and the number of heads of queries and of keys."""
        head = shape(f"{block}.attn.norm_q.weight")[0]
        queries, keys = (shape(f"{block}.attn.{name}.weight")[0] // head for name in ("to_q", "to_k"))
        return head, queries, keys

    hidden, channels = shape("img_in.weight")
    layers, text = shape("text_fusion.projector.weight")[1], shape("txt_in.norm.weight")[0]
    head, queries, keys = heads("transformer_blocks.0")
    _, text_queries, text_keys = heads("text_fusion.refiner_blocks.0")
    arguments = {
        "in_channels": channels,
        "num_layers": count_blocks(specs, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "intermediate_size": shape("transformer_blocks.0.ff.up.weight")[0],
        "timestep_embed_dim": shape("time_embed.linear_1.weight")[1],
        "text_hidden_dim": text,
        "num_text_layers": layers,
        "text_num_attention_heads": text_queries,
        "text_num_key_value_heads": text_keys,
        "text_intermediate_size": shape("text_fusion.refiner_blocks.0.ff.up.weight")[0],
        "num_layerwise_text_blocks": count_blocks(specs, "text_fusion.layerwise_blocks"),
        "num_refiner_text_blocks": count_blocks(specs, "text_fusion.refiner_blocks"),
        "axes_dims_rope": [head - 12 * (head // 16), 6 * (head // 16), 6 * (head // 16)],
        "rope_theta": 1000.0,
        "norm_eps": 1e-5,
    }
    return ModelFacts(arguments, hidden, channels // 4, (layers * text,))


def inputs(model: Any, latents: Tensor, sigmas: Tensor, text: EncodedText, guidance: float) -> dict[str, Any]:
    """Latents packed in 2x2 patches, positions after those of the text, which are zeros; several layers of the text
    encoder beside each other. Rows of zeros are no text.
    """
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    places = torch.cat([places.new_zeros(text.embeds.shape[1], 3), places])
    mask = text.embeds.any(dim=-1)
    return {
        "hidden_states": packed(latents),
        "encoder_hidden_states": text.embeds.unflatten(-1, (model.config.num_text_layers, -1)),
        "encoder_attention_mask": None if bool(mask.all()) else mask,
        "timestep": sigmas,
        "position_ids": places.to(latents.device, torch.float32),
    }


def shift(tokens: int) -> float:
    """exp(mu), mu linear from 0.5 at 256 tokens to 1.15 at 6400."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (6400 - 256))


def encode_text(pipeline: Any, text: str, max_tokens: int, device: torch.device) -> EncodedText:
    """Several layers of the text encoder beside each other, without the template before the caption and what fills it
    up: all words are at one position, so that nothing depends on where they stand.
    """
    embeds, mask = pipeline.encode_prompt(text, device=device, max_sequence_length=max_tokens)
    return EncodedText(embeds[0][mask[0]].flatten(1), None)


PIPELINE = Pipeline(
    classes={"Krea2Pipeline": "Krea2Pipeline"},
    vae_class="AutoencoderKLQwenImage",
    encoders={"tokenizer": "text_encoder"},
    encode_text=encode_text,
    encode_picture=encode_picture,
)

KREA2 = Backbone(
    family="krea2",
    title="Krea 2",
    advice=_ADVICE,
    model_class="Krea2Transformer2DModel",
    since="0.39",
    file_mark="txtfusion.projector.weight",
    folder_mark="text_fusion.projector.weight",
    block_lists=tuple(_LISTS.values()),
    activation_counts=dict.fromkeys(_LISTS.values(), 24.0),
    default_layers={"transformer_blocks": _LAYERS},
    stored_rows=stored_rows,
    folded={"scale_shift_table": _TABLE_ROWS},
    facts=facts,
    stated=("axes_dims_rope", "rope_theta", "norm_eps"),
    inputs=inputs,
    prediction=lambda output, size: unpacked(output[0], size),
    shift=shift,
    pipeline=PIPELINE,
)
