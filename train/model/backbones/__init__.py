"""The families that can be trained on."""

from collections.abc import Iterable

from .backbone import Backbone, ModelFacts, StoredRows, count_blocks, packed, unpacked
from .flux import FLUX
from .flux2 import FLUX2
from .krea2 import KREA2
from .pipeline import Pipeline
from .process import FLOW
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .sdxl import SDXL
from .z_image import Z_IMAGE

BACKBONES = (FLUX, FLUX2, QWEN_IMAGE, Z_IMAGE, KREA2, SD3, SDXL)
# keys that tell a model which is often taken for one of these
_OTHERS = {
    "distilled_guidance_layer.in_proj.weight": "Chroma",
    "input_blocks.9.0.op.weight": "a Stable Diffusion 1 or 2 model, or SDXL's refiner",
    "down_blocks.3.resnets.0.conv1.weight": "a Stable Diffusion 1 or 2 model, or SDXL's refiner",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": "a LoRA",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA or an adapter",
}
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.")


def recognised(keys: Iterable[str]) -> tuple[Backbone, str, bool] | None:
    """The family of a file's or folder's keys, the prefix before its own, and whether they are diffusers' names."""
    names = set(keys)
    if foreign(names):
        return None
    for backbone in reversed(BACKBONES):  # FLUX.2 has FLUX.1's marks besides its own
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
    "FLOW",
    "FLUX",
    "PREFIXES",
    "Backbone",
    "ModelFacts",
    "Pipeline",
    "StoredRows",
    "count_blocks",
    "foreign",
    "packed",
    "recognised",
    "unpacked",
]
