"""Stable Diffusion XL and fine-tunes of it that predict noise or v."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrlora_core import EncodedText
from qrlora_core.families import SDXL as TABLE
from qrlora_core.families import native_layers

from ...errors import TrainError
from .backbone import Backbone, ModelFacts, Specs, StoredRows, count_blocks
from .pipeline import Pipeline, shifted_and_scaled
from .process import Discrete, Process, discrete_steps

_ADVICE = "Use SDXL 1.0 or a fine-tune of it"
_HEAD = 64
_TIME_WIDTH = 256  # of each of the six numbers that tell the picture's size
_PIXELS = 8  # for a pixel of the latents
# list of transformer blocks -> by how much its resolution is halved
_LEVELS = {
    **{f"down_blocks.{level}.attentions.{index}.transformer_blocks": level for level in (1, 2) for index in range(2)},
    "mid_block.attentions.0.transformer_blocks": 2,
    **{f"up_blocks.{2 - level}.attentions.{i}.transformer_blocks": level for level in (2, 1) for i in range(3)},
}
_LAYERS = (
    *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
# norms, which no table of layers has: the native module -> one beside it, that one in diffusers, the norm in diffusers
_NORMS = {
    "in_layers.0": ("in_layers.2", "conv1", "norm1"),
    "out_layers.0": ("out_layers.3", "conv2", "norm2"),
    "norm": ("proj_in", "proj_in", "norm"),
    **{f"norm{number}": ("attn1.to_q", "attn1.to_q", f"norm{number}") for number in (1, 2, 3)},
}
# What autograd keeps of a transformer block, of its text and of a residual block, in multiples of pixels there * width,
# and of a residual block that is recomputed: its input, with what is joined to it. Counted with saved-tensor hooks.
_BLOCK, _TEXT, _RESIDUAL, _RECOMPUTED = 28.2, 2.0, 6.8, 2.6
# keys of models that see noise in another way, and what such a model is called
_OTHER_NOISE = (("edm_mean", "Playground 2.5"), ("edm_vpred.sigma_max", "CosXL"))


def stored_rows(key: str, rows: int) -> list[StoredRows]:
    """What diffusers calls a tensor of ComfyUI's layout, such as `input_blocks.4.1.transformer_blocks.0.norm1.bias`."""
    module, _, kind = key.rpartition(".")
    if module == "out.0":
        return [StoredRows(f"conv_norm_out.{kind}", 0, rows)]
    for norm, (beside, theirs, ours) in _NORMS.items():
        if module.endswith(f".{norm}"):
            names = native_layers(TABLE, f"{module.removesuffix(norm)}{beside}")
            return [StoredRows(f"{name.removesuffix(theirs)}{ours}.{kind}", 0, rows) for name in names]
    return [StoredRows(f"{name}.{kind}", 0, rows) for name in native_layers(TABLE, module)]


def facts(specs: Specs, title: str) -> ModelFacts:
    """See `Backbone.facts`.

    Raises:
        TrainError: reason "model": a tensor is missing, or it is a relative with other inputs or blocks.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in specs:
            raise TrainError("model", f"{title} is not an SDXL U-Net: it has no {name}. {_ADVICE}")
        return specs[name].shape

    channels, out_channels = shape("conv_in.weight")[1], shape("conv_out.weight")[0]
    if channels != out_channels:
        raise TrainError(
            "model", f"{title} takes {channels} channels and gives {out_channels}: a variant for inpainting. {_ADVICE}"
        )
    widths = [shape(f"down_blocks.{level}.resnets.1.conv1.weight")[0] for level in range(3)]
    counts = {blocks: count_blocks(specs, blocks) for blocks in _LEVELS}
    depths = [counts[f"down_blocks.{level}.attentions.0.transformer_blocks"] for level in (1, 2)]
    if any(counts[blocks] != depths[level - 1] for blocks, level in _LEVELS.items()):
        listed = ", ".join(str(count) for count in counts.values())
        raise TrainError("model", f"{title} has {listed} transformer blocks, not as SDXL has them. {_ADVICE}")
    text = shape("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight")[1]
    added = shape("add_embedding.linear_1.weight")[1]
    arguments = {
        "sample_size": 128,
        "in_channels": channels,
        "out_channels": out_channels,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": widths,
        "layers_per_block": 2,
        "cross_attention_dim": text,
        "attention_head_dim": [max(1, width // _HEAD) for width in widths],  # their number, in spite of its name
        "transformer_layers_per_block": [1, *depths],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _TIME_WIDTH,
        "projection_class_embeddings_input_dim": added,
    }
    return ModelFacts(arguments, widths[-1], channels, (text, added - 6 * _TIME_WIDTH))


def activations(specs: Specs, height: int, width: int, text: int) -> tuple[list[float], list[float]]:
    """See `Backbone.activations`: resolution and width change along the way."""
    whole: list[float] = []
    kept: list[float] = []
    for name, spec in specs.items():
        place, _, number = name.partition(".")
        level = int(number[0]) if place == "down_blocks" else 2 - int(number[0]) if place == "up_blocks" else 2
        size = height * width / float(4**level) * spec.shape[0]
        if ".transformer_blocks." in name and name.endswith(".norm1.weight"):
            whole.append(_BLOCK * size + _TEXT * text * spec.shape[0])
            kept.append(size)
        elif name.endswith(".conv1.weight"):
            whole.append(_RESIDUAL * size)
            kept.append(_RECOMPUTED * size)
    return whole, kept


def process(keys: Collection[str], path: Path) -> Process:
    """See `Backbone.process_of`: a file says it by keys of its own, a folder by its scheduler's settings.

    Raises:
        TrainError: reason "model": noise of another kind.
    """
    for key, words in _OTHER_NOISE:
        if key in keys:
            raise TrainError("model", f"{path.name} knows noise as {words} does, which cannot be trained. {_ADVICE}")
    scheduler = path.parent / "scheduler" / "scheduler_config.json"
    stated: dict[str, Any] = {}
    if path.is_dir() and scheduler.is_file():
        try:
            stated = dict(json.loads(scheduler.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise TrainError("model", f"{scheduler.name} of the base model cannot be read: {error}") from error
    predicts = stated.get("prediction_type", "v_prediction" if "v_pred" in keys else "epsilon")
    if predicts not in ("epsilon", "v_prediction"):
        raise TrainError("model", f"{scheduler.name} says that the model predicts {predicts!r:.40}. {_ADVICE}")
    zero_snr = bool(stated.get("rescale_betas_zero_snr", {"v_pred", "ztsnr"} <= set(keys)))  # as ComfyUI reads them
    return Discrete("v" if predicts == "v_prediction" else "epsilon", zero_snr)


def inputs(model: Any, latents: Tensor, sigmas: Tensor, text: EncodedText, guidance: float) -> dict[str, Any]:
    """The number of the step as time. Six numbers tell the size: the picture is what it was, and nothing is cut off,
    just as ComfyUI says it when it samples. Rows of zeros are no text.
    """
    batch, _, height, width = latents.shape
    size = (height * _PIXELS, width * _PIXELS)
    sizes = torch.tensor([*size, 0, 0, *size], device=latents.device, dtype=latents.dtype)
    mask = text.embeds.any(dim=-1)
    return {
        "sample": latents,
        "timestep": discrete_steps(sigmas),
        "encoder_hidden_states": text.embeds,
        "encoder_attention_mask": None if bool(mask.all()) else mask,
        "added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": sizes.expand(batch, -1)},
    }


def encode_text(pipeline: Any, text: str, max_tokens: int, device: torch.device) -> EncodedText:
    """Both CLIPs' tokens beside each other; the second one's pooled output. They have 77 tokens, never more."""
    embeds, _, pooled, _ = pipeline.encode_prompt(text, device=device, do_classifier_free_guidance=False)
    return EncodedText(embeds[0], pooled[0])


PIPELINE = Pipeline(
    classes={"StableDiffusionXLPipeline": "StableDiffusionXLPipeline"},
    vae_class="AutoencoderKL",
    network="unet",
    encoders={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    encode_text=encode_text,
    encode_picture=shifted_and_scaled,
)

SDXL = Backbone(
    family="sdxl",
    title="SDXL",
    advice=_ADVICE,
    model_class="UNet2DConditionModel",
    since="0.35",
    # Stable Diffusion 1 and 2 have one block in each place
    file_mark="input_blocks.7.1.transformer_blocks.1.attn1.to_q.weight",
    folder_mark="down_blocks.2.attentions.0.transformer_blocks.1.attn1.to_q.weight",
    block_lists=tuple(_LEVELS),
    activations=activations,
    default_layers=dict.fromkeys(_LEVELS, _LAYERS),
    stored_rows=stored_rows,
    facts=facts,
    process_of=process,
    inputs=inputs,
    prediction=lambda output, size: output[0],
    shift=lambda tokens: 1.0,
    pipeline=PIPELINE,
    text_fields=("embeds", "pooled"),
)
