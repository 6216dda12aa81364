"""Weights that are put together again from a residual, on the loaders that can keep them so."""

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import psutil
import torch
from comfy.patcher_extension import CallbacksMP
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...qrlora_core import Basis, BasisMismatchError, Residual, SettingError, TargetError, WeightSlice, restored_weight
from .places import patch_key
from .protocols import ModelPatcher

log = logging.getLogger(__name__)

_CALLBACK = "qr_lora"
# What restoring one number takes on the card for a moment: its float32 self, the residual, and their sum
_WORKING_BYTES = 12
_RAM_LEFT = 2_000_000_000

# Residual tensors in RAM, for weights that are computed at every use while their model is loaded
_held: weakref.WeakKeyDictionary[Residual, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def plain_clone(model: ModelPatcher) -> Any:
    """A clone on the host's loader that patches weights once, when they are loaded.

    The dynamic loader (NVIDIA, ComfyUI 0.33 and newer) computes a weight whenever it becomes resident, and rounds it to
    the dtype that it is stored in: a restored weight would lose there just what was restored, and its residual would be
    read again and again. The host can give a plain copy of such a model, as it does for hooks.

    Raises:
        SettingError: the model's loader does not tell the host how to load it again.
    """
    if not getattr(model, "is_dynamic", lambda: False)():
        return model.clone()
    try:
        return model.get_non_dynamic_delegate()
    except RuntimeError as error:
        raise SettingError(
            f"a residual needs ComfyUI's plain model loader, and this model cannot be loaded again for it ({error}). "
            "Load it with the Load Diffusion Model node, start ComfyUI with --disable-dynamic-vram, or apply without "
            "the residual"
        ) from error


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

    @property
    def source(self) -> tuple[Residual, str]:
        """The residual and the name of the layer in it."""
        residual, layer = self.weights[4:]
        return residual, layer

    def calculate_weight(self, weight, key, strength, strength_model, offset, function, *_args, **_kwargs):  # type: ignore[no-untyped-def]
        """Called by the host with the rows of this layer; they are changed in place, as the host's slices need."""
        q, r, scaling, core_strength, residual, layer = self.weights
        held = _held.get(residual, {}).get(layer)
        stored = residual.weight(layer) if held is None else held
        stored = stored.to(weight.device, torch.float32)
        if q is None:
            restored = stored + core_strength * (weight.float() - stored)
        else:
            basis = Basis(q.to(weight.device), r.to(weight.device))
            restored = restored_weight(stored, basis, scaling * core_strength)
        return weight.copy_(restored)


def add_restored(
    clone: ModelPatcher, restored: Mapping[str, RestoredWeight], places: Mapping[str, WeightSlice]
) -> None:
    """Make these the first patches of their weights in a clone; those of an earlier node on the same rows join them.

    Raises:
        BasisMismatchError: an earlier one is of another residual file.
    """
    for name, patch in restored.items():
        _put_first(clone, places[name], patch)
    clone.add_callback_with_key(CallbacksMP.ON_LOAD, _CALLBACK, _loaded)
    clone.add_callback_with_key(CallbacksMP.ON_DETACH, _CALLBACK, _detached)


def _put_first(clone: ModelPatcher, place: WeightSlice, patch: RestoredWeight) -> None:
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
    if residual.identity() != later.source[0].identity():
        raise BasisMismatchError(
            f"{layer} would be restored from {residual.name} and from {later.source[0].name}; use one residual for "
            "all Apply QR-LoRA nodes of a model"
        )
    if q is None:
        q, r, scaling = later.weights[:3]
    return RestoredWeight(set(), (q, r, scaling, core_strength + later.weights[3] - 1.0, residual, layer))


def _loaded(patcher: ModelPatcher, *_args: Any) -> None:
    """After each load: widen what was patched in place, and keep the residual of what is computed at every use."""
    queues = {
        key: queue
        for key, queue in patcher.patches.items()
        if any(isinstance(patch[1], RestoredWeight) for patch in queue)
    }
    _widen(patcher, {key: queue for key, queue in queues.items() if key in patcher.backup})
    _hold([patch[1] for key, queue in queues.items() if key not in patcher.backup for patch in queue])


def _detached(patcher: ModelPatcher, *_args: Any) -> None:
    for queue in patcher.patches.values():
        for patch in queue:
            if isinstance(patch[1], RestoredWeight):
                _held.pop(patch[1].source[0], None)


def _widen(patcher: ModelPatcher, queues: Mapping[str, Any]) -> None:
    """Keep restored weights of a plain fp8 model in its compute dtype.

    The host rounds a patched weight back to the dtype it is stored in, which would throw away just what a residual
    restores. Its own backup of the fp8 weight is untouched, so unloading gives the original bits back. Scaled and
    packed formats round by the host's own rules.
    """
    for key, queue in queues.items():
        weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
        backup = patcher.backup[key]
        if convert is not None or backup.inplace_update or weight.dtype.itemsize > 1:
            continue
        compute_dtype = patcher.model.manual_cast_dtype or torch.bfloat16
        growth = weight.numel() * (compute_dtype.itemsize - weight.dtype.itemsize)
        if not comfy.model_management.is_device_cpu(weight.device):
            needed = weight.numel() * _WORKING_BYTES + growth + comfy.model_management.minimum_inference_memory()
            if comfy.model_management.get_free_memory(weight.device) < needed:
                log.warning("QR-LoRA: too little VRAM to keep all restored weights wider than fp8; the rest is rounded")
                return
        exact = comfy.model_management.cast_to_device(backup.weight, weight.device, torch.float32, copy=True)
        exact = comfy.lora.calculate_weight(queue, exact, key)
        comfy.utils.set_attr_param(patcher.model, key, exact.to(compute_dtype))
        patcher.model.model_loaded_weight_memory += growth


def _hold(patches: list[Any]) -> None:
    """Read the residual of weights that wait in RAM once, instead of from the disk at every use."""
    for patch in patches:
        if not isinstance(patch, RestoredWeight):
            continue
        residual, layer = patch.source
        tensors = _held.setdefault(residual, {})
        if layer in tensors:
            continue
        if psutil.virtual_memory().available < residual.layers[layer].nbytes + _RAM_LEFT:
            raise SettingError(
                f"there is too little RAM to keep {residual.name} for the weights that do not fit on the card; it "
                "would be read from the disk at every step. Apply without the residual"
            )
        tensors[layer] = residual.weight(layer)
