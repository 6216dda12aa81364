"""The seam to ComfyUI: nothing outside this room imports comfy (comfy_api apart)."""

from .patches import patched_clone, require_taken
from .places import Place, flux_layers, load_device, own_weight, place_layers, require_unpatched
from .session import interruptible, with_progress

__all__ = [
    "Place",
    "flux_layers",
    "interruptible",
    "load_device",
    "own_weight",
    "patched_clone",
    "place_layers",
    "require_taken",
    "require_unpatched",
    "with_progress",
]
