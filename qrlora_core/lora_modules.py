"""What the tensors of one module of a LoRA file say: its factors, or its whole change."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import FileFormatError
from .linalg import require_finite
from .lora_layers import Factors
from .storage import TensorFile

_LARGEST_CHANGE = 1 << 29  # numbers of one weight; those of the largest models here have 1 << 28
_KEPT = (torch.bfloat16, torch.float16, torch.float32)


def module_shape(file: TensorFile, keys: Mapping[str, str]) -> tuple[int, ...]:
    """(out, in) of a low-rank module, or nothing."""
    if "up" not in keys or "down" not in keys or not file.specs[keys["up"]].shape:
        return ()
    return (file.specs[keys["up"]].shape[0], torch.Size(file.specs[keys["down"]].shape[1:]).numel())


def low_rank_factors(file: TensorFile, base: str, keys: Mapping[str, str]) -> Factors:
    """B (out, rank), A (rank, in) and alpha / rank of a module, in the file's precision; convolutions are flattened."""
    if "down" not in keys:
        raise FileFormatError(f"{file.path.name}: {base} has an up but no down matrix")
    up, down = _read(file, keys["up"]).flatten(1), _read(file, keys["down"])
    columns = down.shape[0]
    if "mid" in keys:  # LoCon's core between the two: (rank, rank, height, width)
        middle, down = _read(file, keys["mid"]).float(), down.float()
        if middle.ndim != 4 or middle.shape[1] != columns:
            raise FileFormatError(f"{file.path.name}: {keys['mid']} has shape {tuple(middle.shape)}")
        down = torch.einsum("rdhw,di->rihw", middle, down.flatten(1))
    down = down.flatten(1)
    if up.shape[1] != down.shape[0] or min(*up.shape, *down.shape) < 1:
        shapes = f"{tuple(up.shape)} with {tuple(down.shape)}"
        raise FileFormatError(f"{file.path.name}: {base} pairs {shapes}, expected (out, r) and (r, in)")
    return Factors(up, down, _scaling(file, keys, columns))


def whole_change(file: TensorFile, base: str, keys: Mapping[str, str]) -> Tensor:
    """The whole change of a module that is not low-rank, (out, in), float32."""
    tensors = {role: _read(file, key).float() for role, key in keys.items() if role != "alpha"}
    for those in (("lokr_w1", "lokr_w2"), ("hada_w1",), ("hada_w2",)):  # a small file can stand for terabytes
        if math.prod(_numbers(tensors, side) for side in those) > _LARGEST_CHANGE:
            raise FileFormatError(f"{file.path.name}: {base} stands for a larger matrix than any model has")
    try:
        if "diff" in keys:
            return tensors["diff"].flatten(1)
        if "hada_w1_a" in keys and not keys.keys() & {"hada_t1", "hada_t2"}:
            first = tensors["hada_w1_a"] @ tensors["hada_w1_b"]
            second = tensors["hada_w2_a"] @ tensors["hada_w2_b"]
            return first * second * _scaling(file, keys, tensors["hada_w1_b"].shape[0])
        if any(role.startswith("lokr_w") for role in keys) and "lokr_t2" not in keys:
            columns = 0
            sides = []
            for side in ("lokr_w1", "lokr_w2"):
                if side in tensors:
                    sides.append(tensors[side])
                else:
                    columns = tensors[f"{side}_b"].shape[0]
                    sides.append(tensors[f"{side}_a"] @ tensors[f"{side}_b"])
            first, second = sides
            first = first.reshape(*first.shape, *[1] * (second.ndim - 2))
            return torch.kron(first, second).flatten(1) * (_scaling(file, keys, columns) if columns else 1.0)
    except (KeyError, RuntimeError) as error:
        raise FileFormatError(f"{file.path.name}: {base} does not fit together ({error})") from error
    raise FileFormatError(
        f"{file.path.name}: {base} holds {', '.join(keys)}, which is not read; use ComfyUI's own Load LoRA"
    )


def _numbers(tensors: Mapping[str, Tensor], side: str) -> int:
    """How many numbers one side of a LoHa or LoKr has when its factors are multiplied."""
    if side in tensors:
        return tensors[side].numel()
    if f"{side}_a" not in tensors or f"{side}_b" not in tensors:
        return 0
    return tensors[f"{side}_a"].shape[0] * tensors[f"{side}_b"].flatten(1).shape[1]


def _read(file: TensorFile, key: str) -> Tensor:
    """A matrix or a convolution, in the file's precision; what has no arithmetic is widened, exactly."""
    tensor = file.tensor(key)
    if tensor.dtype not in _KEPT:
        tensor = tensor.float()
    if tensor.ndim < 2:
        raise FileFormatError(f"{file.path.name}: {key} has shape {tuple(tensor.shape)}, expected a matrix")
    require_finite(tensor, f"{file.path.name}: {key}")
    return tensor


def _scaling(file: TensorFile, keys: Mapping[str, str], columns: int) -> float:
    """alpha / rank; 1 without an alpha."""
    if "alpha" not in keys:
        return 1.0
    if torch.Size(file.specs[keys["alpha"]].shape).numel() != 1:
        raise FileFormatError(f"{file.path.name}: {keys['alpha']} is not one number")
    alpha = float(file.tensor(keys["alpha"]).float().reshape(()))
    if not abs(alpha) < 1e6:  # also false for NaN
        raise FileFormatError(f"{file.path.name}: {keys['alpha']} is {alpha}, expected a finite number")
    return alpha / columns
