"""Where a model keeps its layers, and what it holds there."""

from collections.abc import Iterable

import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ...qrlora_core import LayerTarget, TargetError, WeightError, WeightSlice, comfy_slice, flux_targets, value_dtype
from .protocols import ModelPatcher

PREFIX = "diffusion_model."

Place = tuple[str, tuple[int, int, int]] | str  # what ComfyUI takes as the key of a patch


def flux_layers(model: ModelPatcher) -> tuple[LayerTarget, ...]:
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


def place_layers(model: ModelPatcher, targets: Iterable[LayerTarget]) -> dict[str, WeightSlice]:
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


def require_unpatched(model: ModelPatcher, places: Iterable[WeightSlice]) -> None:
    """Raise TargetError when something patches these weights: what is read from them would not be what one sees."""
    patched = sorted({place.key for place in places if PREFIX + place.key in model.patches})
    if patched:
        raise TargetError(
            f"{len(patched)} weights of this model carry patches ({', '.join(patched[:3])}); connect the model loader "
            "directly, before any LoRA"
        )


def own_weight(model: ModelPatcher, place: WeightSlice) -> tuple[Tensor, torch.dtype | None]:
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


def patch_key(place: WeightSlice) -> Place:
    """A place as ComfyUI's patch key: a name, or a name with (dim, start, length)."""
    key = PREFIX + place.key
    return key if place.start is None or place.length is None else (key, (0, place.start, place.length))


def quantised(model: ModelPatcher, place: WeightSlice) -> bool:
    """Whether a weight is stored in fewer bits than 16, or packed; a patch of it is rounded once more."""
    weight = _weight(model, place.key)
    packed = type(weight) not in (Tensor, torch.nn.Parameter)
    return packed or weight.dtype.itemsize < 2 or not weight.dtype.is_floating_point


def load_device(model: ModelPatcher) -> torch.device:
    """Where this model will run; heavy work on its weights goes there."""
    device: torch.device = model.load_device
    return device


def _weight(model: ModelPatcher, key: str) -> Tensor:
    weight: Tensor = comfy.utils.get_attr(model.model, PREFIX + key)
    return weight
