"""Where a model keeps its layers, and what it holds there.

The host's own map of LoRA names says where each of diffusers' layers lies, so any model that it knows can be patched.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ...qrlora_core import LayerTarget, TargetError, WeightError, WeightSlice, value_dtype
from ...qrlora_core.families import FAMILIES, Family, family_of, has_layer, native_place, network_order
from ...qrlora_core.families import published_layers as layers_of_family
from ...qrlora_core.targets import nearest
from .protocols import ModelPatcher

PREFIX = "diffusion_model."

Place = tuple[str, tuple[int, int, int]] | str  # what ComfyUI takes as the key of a patch

# The host's map is some ten thousand names; a loaded model keeps its own
_known_places: weakref.WeakKeyDictionary[torch.nn.Module, dict[LayerTarget, WeightSlice]] = weakref.WeakKeyDictionary()
_maps: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def model_family(model: ModelPatcher) -> Family | None:
    """The family that a model is of, by the names and shapes of its weights; None for one that is not known here."""
    return family_of(_module_shapes(model))


def published_layers(model: ModelPatcher) -> tuple[LayerTarget, ...]:
    """The layers of a model that are adapted by default in its family, with their shapes.

    Raises:
        TargetError: no family that is known here has such a model.
    """
    shapes = _module_shapes(model)
    family = family_of(shapes)
    targets = layers_of_family(family, shapes) if family is not None else ()
    if not targets:
        raise TargetError(
            f"this {type(model.model).__name__} model is of no family that is known here "
            f"({', '.join(member.name for member in FAMILIES)}); connect an adapter, whose layers are then taken"
        )
    place_layers(model, targets)
    return targets


def place_layers(model: ModelPatcher, targets: Iterable[LayerTarget]) -> dict[str, WeightSlice]:
    """Layer name -> where this model keeps it.

    Raises:
        TargetError: the model lacks a layer, has it in another shape, or keeps it changed by a function; the message
            names them.
    """
    remembered = _known_places.setdefault(model.model, {})
    targets = tuple(targets)
    if all(target in remembered for target in targets):  # turning alpha asks for the same layers again
        return {target.name: remembered[target] for target in targets}
    table = _host_map(model)
    places, missing, different = {}, [], []
    for target in targets:
        candidates = _candidates(model, table, target)
        if not candidates:
            missing.append(target)
            continue
        fitting = next((place for place in candidates if _fits(model, place, target)), None)
        if fitting is None:
            shape = tuple(_weight(model, candidates[0].key).shape)
            different.append(f"{target.name} {target.shape} against {candidates[0].key} {shape}")
        places[target.name] = fitting or candidates[0]
    count = len(places) + len(missing)
    title = type(model.model).__name__
    if missing:
        names = ", ".join(target.name for target in missing[:3])
        raise TargetError(
            f"this {title} model lacks {len(missing)} of the adapter's {count} layers: {names}"
            f"{_hint(table, model, missing[0].name)}. Was the adapter made for another model?"
        )
    if different:
        raise TargetError(
            f"{len(different)} of {count} layers have another shape in this model: {'; '.join(different[:3])}"
        )
    remembered.update({target: places[target.name] for target in targets})
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
    weight = weight.to(torch.float32).flatten(1)  # a convolution counts as (out, in * height * width)
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


def work_device() -> torch.device:
    """Where heavy work goes that belongs to no model."""
    device: torch.device = comfy.model_management.get_torch_device()
    return device


def load_device(model: ModelPatcher) -> torch.device:
    """Where this model will run; heavy work on its weights goes there."""
    device: torch.device = model.load_device
    return device


def _candidates(model: ModelPatcher, table: Mapping[str, Any], target: LayerTarget) -> list[WeightSlice]:
    """Where a layer may lie in this model, what the host says first.

    Raises:
        TargetError: the host keeps the layer changed by a function, which a low-rank patch cannot follow.
    """
    name = target.name
    candidates: list[WeightSlice] = []
    for key in (f"transformer.{name}", f"lora_unet_{name.replace('.', '_')}", name):
        if key in table:
            candidates.append(_place(name, table[key]))
    if any(_has(model, place.key) and _fits(model, place, target) for place in candidates):
        return [place for place in candidates if _has(model, place.key)]
    for family in FAMILIES:  # older hosts map fewer models; families know their native layouts
        if has_layer(family, name):
            candidates.append(native_place(family, name, target.shape))
    return [place for place in dict.fromkeys(candidates) if _has(model, place.key)]


def _place(name: str, entry: Any) -> WeightSlice:
    """An entry of the host's map: a key, or (key, (dim, start, length)), or those with a function."""
    key, rows, function = (*entry, None, None)[:3] if isinstance(entry, tuple) else (entry, None, None)
    if function is not None:
        raise TargetError(
            f"ComfyUI keeps {name} rearranged ({getattr(function, '__name__', 'by a function')}), which this pack does "
            "not apply; use the stock LoRA loader for this file"
        )
    key = key.removeprefix(PREFIX)
    if rows is None:
        return WeightSlice(key, None, None)
    dim, start, length = rows
    if dim != 0:
        raise TargetError(f"ComfyUI keeps {name} in columns of {key}, which this pack does not apply")
    return WeightSlice(key, start, length)


def _fits(model: ModelPatcher, place: WeightSlice, target: LayerTarget) -> bool:
    rows, *further = _weight(model, place.key).shape
    columns = torch.Size(further).numel()
    if place.start is None or place.length is None:
        return (rows, columns) == target.shape
    return place.start + place.length <= rows and (place.length, columns) == target.shape


def _host_map(model: ModelPatcher) -> dict[str, Any]:
    if model.model not in _maps:
        _maps[model.model] = comfy.lora.model_lora_keys_unet(model.model, {})
    return _maps[model.model]


def _module_shapes(model: ModelPatcher) -> dict[str, tuple[int, ...]]:
    """Native module name -> shape of its weight."""
    return {
        key.removeprefix(PREFIX).removesuffix(".weight"): tuple(value.shape)
        for key, value in model.model.state_dict().items()
        if key.startswith(PREFIX) and key.endswith(".weight")
    }


def _hint(table: Mapping[str, Any], model: ModelPatcher, name: str) -> str:
    """The nearest layers that the model does have: those that end alike, or lie in the same block."""
    last, block = name.rsplit(".", 1)[-1], name.split(".")[:2]
    names = [key.removeprefix("transformer.") for key in table if key.startswith("transformer.")]
    alike = [layer for layer in names if layer.endswith(f".{last}") or layer.split(".")[:2] == block]
    present = [layer for layer in alike if _has(model, _key(table[f"transformer.{layer}"]).removeprefix(PREFIX))]
    return nearest(name, sorted(present, key=network_order)[:200])


def _key(entry: Any) -> str:
    key: str = entry[0] if isinstance(entry, tuple) else entry
    return key


def _has(model: ModelPatcher, key: str) -> bool:
    try:
        return len(_weight(model, key).shape) > 1
    except AttributeError:
        return False


def _weight(model: ModelPatcher, key: str) -> Tensor:
    weight: Tensor = comfy.utils.get_attr(model.model, PREFIX + key)
    return weight
