"""The seam to ComfyUI: nothing outside this room imports comfy (comfy_api apart)."""

from .patches import patched_clone, require_taken
from .places import (
    Place,
    load_device,
    model_family,
    own_weight,
    place_layers,
    published_layers,
    require_unpatched,
    work_device,
)
from .session import interruptible, with_progress

__all__ = [
    "Place",
    "interruptible",
    "load_device",
    "model_family",
    "own_weight",
    "patched_clone",
    "place_layers",
    "published_layers",
    "require_taken",
    "require_unpatched",
    "with_progress",
    "work_device",
]
