"""Low-rank patches on a model."""

from collections.abc import Iterable
from typing import Any

from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ...qrlora_core import TargetError, WeightSlice
from .places import Place, patch_key

Updates = dict[str, tuple[WeightSlice, Tensor, Tensor, float]]  # layer name -> place, up, down, alpha


def patched_clone(model: Any, updates: Updates, strength: float) -> Any:
    """A clone of `model` with one low-rank patch per layer.

    Args:
        model: a ModelPatcher; it is not changed.
        updates: layer name -> place, up (out, k), down (k, in), alpha; the host adds alpha / k * up @ down.
        strength: the host's factor for all of them.

    Raises:
        TargetError: the host did not take every patch.
    """
    patches = low_rank_patches(updates)
    clone = model.clone()
    require_taken(patches, clone.add_patches(patches, strength))
    return clone


def low_rank_patches(updates: Updates) -> dict[Place, Any]:
    """One low-rank patch per layer: the host adds `alpha / k * up @ down` to the rows of each."""
    return {
        patch_key(place): LoRAAdapter(set(), (up, down, alpha, None, None, None))
        for place, up, down, alpha in updates.values()
    }


def require_taken(patches: dict[Place, Any], taken: Iterable[Place]) -> None:
    """Raise TargetError when the host left patches out, which it does without a word."""
    lost = [str(key) for key in patches if key not in set(taken)]
    if lost:
        raise TargetError(
            f"the host took {len(patches) - len(lost)} of {len(patches)} patches; not {', '.join(lost[:3])}"
        )
