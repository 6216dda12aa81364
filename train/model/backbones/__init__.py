"""The families that can be trained on."""

from collections.abc import Iterable

from .backbone import Backbone, ModelFacts, StoredRows, count_blocks, packed, unpacked
from .flux import FLUX

BACKBONES = (FLUX,)
# keys that tell a model which is often taken for one of these
_OTHERS = {
    "double_stream_modulation_img.lin.weight": "FLUX.2",
    "double_stream_modulation_img.linear.weight": "FLUX.2",
    "distilled_guidance_layer.in_proj.weight": "Chroma",
    "input_blocks.0.0.weight": "a Stable Diffusion 1, 2 or XL model",
    "joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": "a LoRA",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA or an adapter",
}
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.")


def recognised(keys: Iterable[str]) -> tuple[Backbone, str, bool] | None:
    """The family of a file's or folder's keys, the prefix before its own, and whether they are diffusers' names."""
    names = set(keys)
    if foreign(names):
        return None
    for backbone in BACKBONES:
        for prefix in PREFIXES:
            if f"{prefix}{backbone.folder_mark}" in names:
                return backbone, prefix, True
            if backbone.file_mark and f"{prefix}{backbone.file_mark}" in names:
                return backbone, prefix, False
    return None


def foreign(keys: Iterable[str]) -> str:
    """What keys belong to when it is known and cannot be trained on, else ""."""
    names = set(keys)
    for mark, title in _OTHERS.items():
        if any(f"{prefix}{mark}" in names for prefix in PREFIXES):
            return title
    return "one packed by SVDQuant (Nunchaku) or AWQ" if any(key.endswith(".qweight") for key in names) else ""


__all__ = [
    "BACKBONES",
    "PREFIXES",
    "Backbone",
    "ModelFacts",
    "StoredRows",
    "count_blocks",
    "foreign",
    "packed",
    "recognised",
    "unpacked",
]
