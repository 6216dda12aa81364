"""Weights that are put together again from a residual."""

import logging
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP
from comfy.weight_adapter import WeightAdapterBase

from ...qrlora_core import Basis, BasisMismatchError, Residual, TargetError, WeightSlice, restored_weight
from .places import patch_key

log = logging.getLogger(__name__)


class RestoredWeight(WeightAdapterBase):
    """A patch that puts a layer's weight together again from a residual: `W_res + core_strength * scaling * Q R`.

    It stands before all other patches of its weight, so it replaces the stored weight and nothing that was added to
    it. Without Q and R (a full-QR file has only the trained ones) the core is `W - W_res`.
    """

    name = "qr_lora_restored"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        # The host copies patches by calling type(patch)(patch.loaded_keys, patch.weights): keep this signature.
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def of(
        cls, residual: Residual, layer: str, basis: Basis | None, scaling: float, core_strength: float
    ) -> "RestoredWeight":
        """A patch for one layer."""
        q, r = basis or (None, None)
        return cls(set(), (q, r, scaling, core_strength, residual, layer))

    def calculate_weight(self, weight, key, strength, strength_model, offset, function, *_args, **_kwargs):  # type: ignore[no-untyped-def]
        """Called by the host with the rows of this layer; they are changed in place, as the host's slices need."""
        q, r, scaling, core_strength, residual, layer = self.weights
        rest = residual.weight(layer).to(weight.device, torch.float32)
        if q is None:
            restored = rest + core_strength * (weight.float() - rest)
        else:
            basis = Basis(q.to(weight.device), r.to(weight.device))
            restored = restored_weight(rest, basis, scaling * core_strength)
        return weight.copy_(restored)


def put_restored(clone: Any, place: WeightSlice, patch: RestoredWeight) -> None:
    """Make `patch` the first of its weight in a clone; one from an earlier node on the same rows is taken up in it.

    Raises:
        BasisMismatchError: the earlier one is of another residual file.
    """
    name = patch_key(place)
    key, offset = (name, None) if isinstance(name, str) else name
    queue = clone.patches.get(key, [])
    for index, (_, earlier, _, rows, _) in enumerate(queue):
        if isinstance(earlier, RestoredWeight) and rows == offset:
            patch = _combined(earlier, patch)
            del queue[index]
            break
    if not clone.add_patches({name: patch}):
        raise TargetError(f"the host did not take the patch of {place.key}")
    queue = clone.patches[key]
    queue.insert(0, queue.pop())


def _combined(earlier: RestoredWeight, later: RestoredWeight) -> RestoredWeight:
    """Both restore the same weight; each may also take away a part of the core, and the parts add up."""
    q, r, scaling, core_strength, residual, layer = earlier.weights
    if residual.identity() != later.weights[4].identity():
        raise BasisMismatchError(
            f"{layer} would be restored from {residual.name} and from {later.weights[4].name}; use one residual for "
            "all Apply QR-LoRA nodes of a model"
        )
    if q is None:
        q, r, scaling = later.weights[:3]
    return RestoredWeight(set(), (q, r, scaling, core_strength + later.weights[3] - 1.0, residual, layer))


def keep_precision(clone: Any) -> None:
    """Keep restored weights of a plain fp8 model in its compute dtype once the model is loaded.

    The host rounds a patched weight back to the dtype it is stored in, which would throw away just what a residual
    restores. Its own backup of the fp8 weight is untouched, so unloading gives the original bits back. Weights that
    stay in RAM are patched in the compute dtype anyway; scaled and packed formats round by the host's own rules.
    """
    clone.add_callback_with_key(CallbacksMP.ON_LOAD, "qr_lora", _widen)


def _widen(patcher: Any, *_args: Any) -> None:
    for key, queue in patcher.patches.items():
        if not any(isinstance(patch[1], RestoredWeight) for patch in queue) or key not in patcher.backup:
            continue
        weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
        backup = patcher.backup[key]
        if convert is not None or backup.inplace_update or weight.dtype.itemsize > 1:
            continue
        compute_dtype = patcher.model.manual_cast_dtype or torch.bfloat16
        size = weight.numel() * compute_dtype.itemsize
        if not comfy.model_management.is_device_cpu(weight.device):
            free = comfy.model_management.get_free_memory(weight.device)
            if free < 2 * size:
                log.warning("QR-LoRA: too little VRAM to keep the restored weights wider than fp8; they are rounded")
                return
        exact = comfy.model_management.cast_to_device(backup.weight, weight.device, torch.float32, copy=True)
        exact = comfy.lora.calculate_weight(queue, exact, key)
        comfy.utils.set_attr_param(patcher.model, key, exact.to(compute_dtype))
        patcher.model.model_loaded_weight_memory += size - weight.numel()
