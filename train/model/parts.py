"""Where each of diffusers' parameters lies in a file of either layout: ComfyUI's keys and rows, or diffusers' own."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qrlora_core.storage import TensorSpec

from ..errors import TrainError
from .backbones import Backbone, StoredRows
from .quantized import Quantization, is_beside_a_weight, logical_shape, quantization_of


class Part(NamedTuple):
    """Where one parameter lies: a key, rows of it, whether its halves change places, how it is quantised, and whether
    it is stored as one row.
    """

    key: str
    shape: tuple[int, ...]
    start: int = 0
    swap: bool = False
    quantization: Quantization | None = None
    folded: bool = False


def parts_of(
    backbone: Backbone,
    prefix: str,
    native: bool,
    stored: Mapping[str, TensorSpec],
    configs: Mapping[str, Any],
    title: str,
) -> dict[str, Part]:
    """Diffusers' name -> Part, whichever of the two layouts a file has.

    Args:
        backbone: the family.
        prefix: of the file's keys.
        native: whether they are diffusers' own.
        stored: key -> dtype and shape.
        configs: layer -> how it is quantised, see `quantization_configs`.
        title: of the file, for messages.

    Raises:
        TrainError: a tensor has a shape that does not fit its layers, or is packed in a way that is not known.
    """
    own = {key.removeprefix(prefix): key for key in stored if key.startswith(prefix)}
    siblings = _siblings(own.values(), stored)
    parts: dict[str, Part] = {}
    for plain, key in own.items():
        shape = stored[key].shape
        if not shape or is_beside_a_weight(plain):
            continue
        named = [StoredRows(plain, 0, shape[0])] if native else backbone.stored_rows(plain, shape[0])
        counts = [rows for _, _, rows in named]
        if named and (sum(counts) != shape[0] or 0 in (*counts, *shape)):
            parts_text = f"the rows of {len(named)} layers" if len(named) > 1 else "a layer"
            raise TrainError("model", f"{title}: {key} of shape {shape} does not hold {parts_text}: get the file again")
        quantization = None
        if plain.endswith(".weight") and named:
            layer = key.removesuffix(".weight")
            config = configs.get(layer, configs.get(plain.removesuffix(".weight")))
            quantization = quantization_of(layer, siblings[layer], config, title)
            shape = logical_shape(quantization, shape)
        for name, start, rows in named:
            fold = backbone.folded.get(name.rpartition(".")[2], 0) if len(shape) == 1 else 0
            if fold and rows % fold:
                raise TrainError("model", f"{title}: {key} of {rows} numbers is no table of {fold} rows")
            held = (fold, rows // fold) if fold else (rows, *shape[1:])
            parts[name] = Part(key, held, start, False, quantization, bool(fold))
    swapped = () if native else (*backbone.swapped, *_in_last_block(backbone, parts))
    return parts | {name: parts[name]._replace(swap=True) for name in swapped if name in parts}


def _in_last_block(backbone: Backbone, names: Iterable[str]) -> list[str]:
    """Parameters of the last block whose halves change places."""
    numbers = [block.rpartition(".")[2] for name in names if (block := backbone.block_of(name))]
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    return [f"{backbone.block_lists[0]}.{last}.{suffix}" for suffix in backbone.swapped_in_last]


def _siblings(keys: Iterable[str], stored: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """Layer (a key without `.weight`) -> everything that lies under its name."""
    keys = list(keys)
    siblings: dict[str, dict[str, TensorSpec]] = {
        key.removesuffix(".weight"): {} for key in keys if key.endswith(".weight")
    }
    for key in keys:
        layer = key
        while "." in layer:
            layer = layer.rpartition(".")[0]
            if layer in siblings:
                siblings[layer][key.removeprefix(f"{layer}.")] = stored[key]
                break
    return siblings
