"""The only file that touches ComfyUI's models: their weights, and the patches on them."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor

from ..qrlora_core import (
    Basis,
    BasisMismatchError,
    LayerTarget,
    Residual,
    TargetError,
    WeightError,
    WeightSlice,
    comfy_slice,
    flux_targets,
    restored_weight,
    value_dtype,
)

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."

Item = TypeVar("Item")
Place = tuple[str, tuple[int, int, int]] | str  # what ComfyUI takes as the key of a patch
Updates = dict[str, tuple[WeightSlice, Tensor, Tensor, float]]  # layer name -> place, up, down, alpha


def with_progress(items: Sequence[Item]) -> Iterator[Item]:
    """Go through `items` under ComfyUI's progress bar; its Cancel button ends the loop with its own exception."""
    bar = comfy.utils.ProgressBar(len(items))
    for index, item in enumerate(items):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item
        bar.update_absolute(index + 1, len(items))


def flux_layers(model: Any) -> tuple[LayerTarget, ...]:
    """The published target layers of a model, with their shapes.

    Raises:
        TargetError: it is not a FLUX model.
    """
    keys = [key.removeprefix(PREFIX).split(".") for key in model.model.state_dict() if key.startswith(PREFIX)]
    double = len({key[1] for key in keys if key[0] == "double_blocks"})
    single = len({key[1] for key in keys if key[0] == "single_blocks"})
    try:
        hidden = _weight(model, "img_in.weight").shape[0]
        mlp = _weight(model, "double_blocks.0.img_mlp.0.weight").shape[0]
    except AttributeError as error:
        raise TargetError(f"this is not a FLUX model ({type(model.model).__name__}): it has no {error.name}") from error
    targets = flux_targets(double, single, hidden, mlp // hidden)
    place_layers(model, targets)
    return targets


def place_layers(model: Any, targets: Iterable[LayerTarget]) -> dict[str, WeightSlice]:
    """Layer name -> where this model keeps it.

    Raises:
        TargetError: the model lacks a layer, or has it in another shape; the message names them.
    """
    places, missing, different = {}, [], []
    for target in targets:
        place = comfy_slice(target.name, target.shape)
        try:
            shape = tuple(_weight(model, place.key).shape)
        except AttributeError:
            missing.append(target.name)
            continue
        if place.start is None:
            fits = shape == target.shape
        else:
            fused = 3 * target.shape[0] if "qkv" in place.key else place.start + target.shape[0]
            fits = shape[1] == target.shape[1] and (shape[0] == fused or ("qkv" not in place.key and shape[0] > fused))
        if not fits:
            different.append(f"{target.name} {target.shape} against {place.key} {shape}")
        places[target.name] = place
    count = len(places) + len(missing)
    if missing:
        raise TargetError(
            f"this {type(model.model).__name__} model lacks {len(missing)} of the adapter's {count} layers: "
            f"{', '.join(missing[:3])}. Is it a FLUX.1 model with as many blocks as the one trained on?"
        )
    if different:
        raise TargetError(
            f"{len(different)} of {count} layers have another shape in this model: {'; '.join(different[:3])}"
        )
    return places


def require_unpatched(model: Any, places: Iterable[WeightSlice]) -> None:
    """Raise TargetError when something patches these weights: what is read from them would not be what one sees."""
    patched = sorted({place.key for place in places if PREFIX + place.key in model.patches})
    if patched:
        raise TargetError(
            f"{len(patched)} weights of this model carry patches ({', '.join(patched[:3])}); connect the model loader "
            "directly, before any LoRA"
        )


def own_weight(model: Any, place: WeightSlice) -> tuple[Tensor, torch.dtype | None]:
    """A layer's weight without any patch, (out, in) float32, and its precision (None: packed in blocks of few bits).

    Raises:
        WeightError: the model's quantisation cannot be read back.
    """
    key = PREFIX + place.key
    weight, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
    if key in model.backup:
        weight = model.backup[key].weight
    if key in model.hook_backup:
        weight = model.hook_backup[key][0]
    packed = hasattr(weight, "dequantize") and type(weight) not in (Tensor, torch.nn.Parameter)
    stored = None if packed else weight.dtype
    shape = tuple(weight.shape)
    if convert is not None:  # older hosts multiply a scaled fp8 weight by its scale, which fp8 itself cannot do
        weight = convert(weight if packed else weight.to(torch.float32, copy=True), inplace=False)
    elif packed:
        weight = weight.dequantize()
    if not weight.dtype.is_floating_point or tuple(weight.shape) != shape:
        raise WeightError(
            f"{place.key} is stored as {type(weight).__name__} {weight.dtype}, which cannot be read back as numbers; "
            "use a base in fp8 or more, or apply without a residual"
        )
    weight = weight.to(torch.float32)
    weight = weight if place.start is None else weight.narrow(0, place.start, place.length)
    return weight, value_dtype(weight) if stored is not None and stored.itemsize > 1 else stored


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


def patch_key(place: WeightSlice) -> Place:
    """A place as ComfyUI's patch key: a name, or a name with (dim, start, length)."""
    key = PREFIX + place.key
    return key if place.start is None or place.length is None else (key, (0, place.start, place.length))


def load_device(model: Any) -> torch.device:
    """Where this model will run; heavy work on its weights goes there."""
    device: torch.device = model.load_device
    return device


def _weight(model: Any, key: str) -> Tensor:
    weight: Tensor = comfy.utils.get_attr(model.model, PREFIX + key)
    return weight
