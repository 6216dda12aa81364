"""Weights that ComfyUI stores quantised: which format a layer has, where its scales lie, what numbers it stands for.

| format | weight | scales |
|---|---|---|
| fp8 | float8, (out, in) | `scale_weight` or `weight_scale`: one number, or one for each row |
| mxfp8 | float8, (out, in) | `weight_scale`: a power of two for each 32 columns, as its exponent, in tiles |
| nvfp4 | two 4-bit floats a byte, (out, in / 2) | `weight_scale`: float8 of 16 columns, in tiles; `weight_scale_2` |
| int8 | int8, (out, in) | `weight_scale`: one number, or one for each row |
| int8_convrot | as int8, each group of columns multiplied by a Hadamard matrix before it was rounded | |

A layer's format is named by its `comfy_quant` tensor (JSON) or by the header's `_quantization_metadata`; plain scaled
fp8 has neither. What is in no such format is refused by name: a weight is never taken without its scales.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qrlora_core.storage import TensorSpec

from ..errors import TrainError

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Beside a layer's weight and bias; the two of inputs are about activations and say nothing of the weight
_CONFIG = "comfy_quant"
_SCALES = ("scale_weight", "weight_scale")
_SCALE_2 = "weight_scale_2"
_ABOUT_INPUTS = ("scale_input", "input_scale")
_PLAIN = ("weight", "bias", "scale")
# Formats that are known and cannot be read, by what ComfyUI calls them or by what lies beside the weight
_UNREADABLE = {
    "convrot_w4a4": "ConvRot W4A4",
    "asym_w4a8_int8": "W4A8",
    "weight_s_rel": "W4A8",
    "weight.absmax": "NF4 or int8 of bitsandbytes",
    "SCB": "int8 of bitsandbytes",
    "qweight": "SVDQuant (Nunchaku) or AWQ",
    "pre_quant_scale": "an NVFP4 with smoothed inputs",
}
_ADVICE = "Use the bf16 or fp8 safetensors file of this model"
# The sixteen values of a 4-bit float with two bits of exponent and one of mantissa; the upper eight are negative
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TILE_ROWS, _TILE_COLUMNS = 128, 4  # in which the scales of blocks are stored
_MXFP8_BLOCK, _NVFP4_BLOCK = 32, 16
_LARGEST_GROUP = 1 << 14  # of columns that are mixed; real ones are 256


class Quantization(NamedTuple):
    """How one layer's weight is stored.

    Attributes:
        format: "fp8", "mxfp8", "nvfp4", "int8" or "int8_convrot".
        scales: keys of its scales, the more local one first.
        group: columns that a Hadamard matrix has mixed, 0: none.
    """

    format: str
    scales: tuple[str, ...]
    group: int = 0


def quantization_configs(metadata: Mapping[str, str], tensors: Mapping[str, bytes], title: str) -> dict[str, Any]:
    """Layer -> what its file says of its format.

    Args:
        metadata: the header's strings.
        tensors: key -> content of every tensor that ends in `.comfy_quant`.
        title: of the file, for messages.

    Raises:
        TrainError: reason "model": not JSON, or not the tables that it should be.
    """
    try:
        header = json.loads(metadata.get("_quantization_metadata", '{"layers": {}}'))
        configs = dict(header["layers"])
        configs |= {key.removesuffix(f".{_CONFIG}"): json.loads(content) for key, content in tensors.items()}
        if not all(isinstance(config, dict) for config in configs.values()):
            raise TypeError("a layer's entry is no table")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainError(
            "model", f"{title}: how its weights are quantised cannot be read ({error}). {_ADVICE}"
        ) from error
    return configs


def is_config(key: str) -> bool:
    return key.endswith(f".{_CONFIG}")


def is_beside_a_weight(key: str) -> bool:
    """Whether a tensor is about how a weight or its inputs are stored, and no parameter itself."""
    return key.rpartition(".")[2] in (*_SCALES, _SCALE_2, *_ABOUT_INPUTS, _CONFIG)


def quantization_of(
    layer: str, siblings: Mapping[str, TensorSpec], config: Mapping[str, Any] | None, title: str
) -> Quantization | None:
    """The format of a layer's weight, None where its numbers are what they look like.

    Args:
        layer: the key without `.weight`.
        siblings: everything of the layer: the key without `<layer>.` -> dtype and shape.
        config: what the file says of it, if it does.
        title: of the file, for messages.

    Raises:
        TrainError: reason "model": a format that cannot be read, or scales that are missing or do not fit.
    """
    weight = siblings["weight"]
    scale = next((name for name in _SCALES if name in siblings), None)
    unreadable = next((_UNREADABLE[name] for name in siblings if name in _UNREADABLE), None)
    if unreadable is None and config is not None:
        unreadable = _UNREADABLE.get(str(config.get("format")))
    if unreadable is not None:
        raise _refused(layer, title, f"is stored as {unreadable}")
    packed = not weight.dtype.is_floating_point or weight.dtype in _FLOAT8
    beside = [name for name in siblings if name not in (*_PLAIN, *_SCALES, _SCALE_2, *_ABOUT_INPUTS, _CONFIG)]
    if packed and beside:
        raise _refused(layer, title, f"is stored as {_words(weight)} with {beside[0]} beside it, which is not known")
    # plain fp8 files store norms in fp8, too; whatever has scales is a matrix
    scaled = scale is not None or config is not None or not weight.dtype.is_floating_point
    if scaled and (len(weight.shape) != 2 or 0 in weight.shape):
        raise _refused(layer, title, f"is stored as {_words(weight)} {weight.shape}, expected a matrix")
    if config is None:
        return _without_config(layer, weight, scale, siblings, title)
    name, parameters = str(config.get("format")), config.get("params")
    parameters = {**(parameters if isinstance(parameters, dict) else {}), **config}
    if name.startswith("float8_") and weight.dtype in _FLOAT8:
        if scale is None:
            return None
        quantization = Quantization("fp8", (f"{layer}.{scale}",))
        _require_fit(layer, quantization, siblings, scale, title)
        return quantization
    if scale is None:
        raise _refused(layer, title, f"is stored as {name} and lacks its scales")
    local = f"{layer}.{scale}"
    if name == "mxfp8" and weight.dtype in _FLOAT8:
        quantization = Quantization("mxfp8", (local,))
    elif name == "nvfp4" and weight.dtype == torch.uint8 and _SCALE_2 in siblings:
        quantization = Quantization("nvfp4", (local, f"{layer}.{_SCALE_2}"))
    elif name == "int8_tensorwise" and weight.dtype == torch.int8:
        group = parameters.get("convrot_groupsize", 256) if parameters.get("convrot") else 0
        if type(group) is not int or not 0 <= group <= _LARGEST_GROUP:
            raise _refused(layer, title, f"is mixed in groups of {group!r:.40} columns, expected a power of four")
        quantization = Quantization("int8_convrot" if group else "int8", (local,), group)
    else:
        raise _refused(layer, title, f"is stored as {name} in {_words(weight)}, which is not known")
    _require_fit(layer, quantization, siblings, scale, title)
    return quantization


def logical_shape(quantization: Quantization | None, stored: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the weight that a stored tensor stands for."""
    if quantization is not None and quantization.format == "nvfp4":
        return stored[0], 2 * stored[1]
    return stored


def dequantized(
    quantization: Quantization, packed: Tensor, scales: tuple[Tensor, ...], start: int, rows: int
) -> Tensor:
    """The numbers that some rows of a weight stand for, in float32.

    Args:
        quantization: the format.
        packed: the rows from `start` on, as stored.
        scales: of the whole weight, in the order of `quantization.scales`.
        start: first row.
        rows: of the whole weight.
    """
    count = packed.shape[0]
    if quantization.format in ("fp8", "int8", "int8_convrot"):
        factor = scales[0].float()
        if factor.numel() == 1:
            weight = packed.float() * factor.reshape(())
        else:
            weight = packed.float() * factor.reshape(-1, 1).narrow(0, start, count)
        return _unmixed(weight, quantization.group) if quantization.group else weight
    if quantization.format == "mxfp8":
        blocks, factor = packed.float().unflatten(1, (-1, _MXFP8_BLOCK)), _powers_of_two(_bytes(scales[0]))
    else:
        table = torch.tensor([*_FP4, *(-value for value in _FP4)])
        digits = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)
        blocks, factor = table[digits.int()].unflatten(1, (-1, _NVFP4_BLOCK)), _float8(scales[0]).float()
    factor = _untiled(factor, rows, blocks.shape[1]).narrow(0, start, count)
    if quantization.format == "nvfp4":
        factor = scales[1].float().reshape(()) * factor
    scaled: Tensor = blocks * factor.unsqueeze(-1)
    return scaled.reshape(count, -1)


def _without_config(
    layer: str, weight: TensorSpec, scale: str | None, siblings: Mapping[str, TensorSpec], title: str
) -> Quantization | None:
    """Plain numbers, or fp8 with a scale."""
    if not weight.dtype.is_floating_point:
        raise _refused(layer, title, f"is stored as {_words(weight)}, and nothing says how")
    if scale is None:
        return None
    numbers = siblings[scale].shape
    count = torch.Size(numbers).numel()
    if _SCALE_2 in siblings or not siblings[scale].dtype.is_floating_point or count not in (1, weight.shape[0]):
        raise _refused(
            layer, title, f"has {scale} of {count} numbers for {weight.shape[0]} rows, and nothing says how to use them"
        )
    return Quantization("fp8", (f"{layer}.{scale}",))


def _require_fit(
    layer: str, quantization: Quantization, siblings: Mapping[str, TensorSpec], scale: str, title: str
) -> None:
    """Whether there are as many scales as the format needs, and columns that its blocks divide."""
    rows, columns = logical_shape(quantization, siblings["weight"].shape)
    if quantization.format in ("mxfp8", "nvfp4") and siblings[scale].dtype.itemsize != 1:
        raise _refused(layer, title, f"has scales stored as {_words(siblings[scale])}, expected 8 bits each")
    if quantization.format == "nvfp4" and torch.Size(siblings[_SCALE_2].shape).numel() != 1:
        raise _refused(layer, title, f"has {_SCALE_2} of shape {siblings[_SCALE_2].shape}, expected one number")
    count = torch.Size(siblings[scale].shape).numel()
    if quantization.format in ("mxfp8", "nvfp4"):
        block = _MXFP8_BLOCK if quantization.format == "mxfp8" else _NVFP4_BLOCK
        tiles = -(-rows // _TILE_ROWS) * -(-(columns // block) // _TILE_COLUMNS)
        expected, group = {tiles * _TILE_ROWS * _TILE_COLUMNS}, block
    else:
        expected, group = {1, rows}, quantization.group or 1
        power = group
        while power % 4 == 0:
            power //= 4
        if power != 1:
            raise _refused(layer, title, f"is mixed in groups of {group} columns, expected a power of four")
    if count not in expected or columns % group:
        raise _refused(
            layer,
            title,
            f"is stored as {quantization.format} with {count} scales for {rows}x{columns} numbers; that does not fit",
        )


def _unmixed(weight: Tensor, group: int) -> Tensor:
    """Undo a ConvRot: every group of columns times the transpose of the (symmetric, orthogonal) Hadamard matrix."""
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < group:
        matrix = torch.kron(matrix, four)
    mixed = weight.reshape(weight.shape[0], -1, group)
    unmixed: Tensor = mixed @ (matrix / group**0.5).mT
    return unmixed.reshape(weight.shape)


def _untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales of blocks in their natural order, (rows, columns).

    They are stored in tiles of 128x4, each as 32x16: four groups of 32 rows stand side by side.
    """
    down, across = -(-rows // _TILE_ROWS), -(-columns // _TILE_COLUMNS)
    tiles = scales.reshape(down, across, _TILE_ROWS // 4, 4, _TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down * _TILE_ROWS, across * _TILE_COLUMNS)[:rows, :columns]


def _powers_of_two(exponents: Tensor) -> Tensor:
    """2^(e - 127) in float32; e = 0 counts as zero, as it does for ComfyUI."""
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def _bytes(scales: Tensor) -> Tensor:
    return scales if scales.dtype == torch.uint8 else scales.view(torch.uint8)


def _float8(scales: Tensor) -> Tensor:
    """The scales of an NVFP4 are float8, in some files as bare bytes."""
    return scales.view(torch.float8_e4m3fn) if scales.dtype == torch.uint8 else scales


def _words(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _refused(layer: str, title: str, what: str) -> TrainError:
    return TrainError("model", f"{title}: {layer} {what}; that cannot be trained on. {_ADVICE}")
