"""The residual `W_res = W - scaling * Q R` as a file: 10-21 GB for FLUX.1, so nothing here ever holds all of it."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import BasisMismatchError, FileFormatError, TargetError
from .families import network_order
from .formats import RESIDUAL, file_kind, first_few, group_layers
from .linalg import Basis, require_finite, restored_weight
from .storage import TensorFile, TensorSpec
from .targets import LayerTarget, nearest
from .writing import write_tensors


class Residual:
    """A residual file, read layer by layer.

    Attributes:
        name: the file's name.
        layers: layer name -> TensorSpec, in network order.

    Raises:
        FileFormatError: another kind of file, a tensor that is not 2-D, or one stored in less than 16 bits.
    """

    __slots__ = ("__weakref__", "_file", "layers", "name")

    def __init__(self, path: Path) -> None:
        file = TensorFile(path)
        kind = file_kind(file)
        if kind != "residual":
            hint = (
                ": load it with Load \u0394R Adapter"
                if kind in ("delta_r_published", "portable", "qr_published")
                else ""
            )
            raise FileFormatError(
                f"{file.path.name} is not a residual ({kind.replace('_', ' ')} file){hint}. "
                f"Expected keys like {RESIDUAL.format('<layer>')}"
            )
        names = sorted(group_layers(file, {"residual": RESIDUAL}), key=network_order)
        self._file = file
        self.name = file.path.name
        self.layers = {name: file.specs[RESIDUAL.format(name)] for name in names}
        for name, spec in self.layers.items():
            if len(spec.shape) != 2 or spec.dtype.itemsize < 2:
                raise FileFormatError(
                    f"{self.name}: {name} is {spec.dtype} {spec.shape}, expected 2-D, 16 bits or more"
                )

    def weight(self, name: str) -> Tensor:
        """`W_res` of one layer, (out, in), in the file's dtype, read from the disk at each call.

        Raises:
            TargetError: the file has no such layer.
        """
        if name not in self.layers:
            raise TargetError(f"{self.name} has no layer {name!r}{nearest(name, self.layers)}")
        return self._file.tensor(RESIDUAL.format(name))

    def identity(self) -> tuple[str, int, int]:
        """Path, size and modification time."""
        return self._file.identity()


class Restored(NamedTuple):
    """How a layer's own weight comes back from a residual.

    Attributes:
        basis: Q and R with `W = W_res + scaling * Q R`; None when only a trained Q', R' of method qr is known, and
            `scaling * Q R` is `W - W_res`.
        scaling: alpha / rank of that basis.
        error: `||W_res + scaling Q R - W|| / ||W||` against the model's own weight.
    """

    basis: Basis | None
    scaling: float
    error: float


def match_residual(
    weight: Tensor, residual: Tensor, candidates: Iterable[tuple[Basis, float]], tolerance: float, layer: str
) -> Restored:
    """Find the basis that a residual belongs to, by putting the weight together again.

    Args:
        weight: the model's own weight, (out, in).
        residual: `W_res`, (out, in).
        candidates: (basis, scaling) pairs.
        tolerance: largest relative Frobenius error that the storage precision of both explains.
        layer: the layer's name, for messages.

    Raises:
        WeightError: the residual holds NaN or Inf.
        BasisMismatchError: shapes differ, or no candidate restores the weight; nothing may be combined then.
    """
    if residual.shape != weight.shape:
        raise BasisMismatchError(
            f"the residual of {layer} is {tuple(residual.shape)}, the weight {tuple(weight.shape)}"
        )
    require_finite(residual, f"the residual of {layer}")
    norm = float(weight.float().norm())
    errors = []
    for basis, scaling in candidates:
        moved = Basis(*(tensor.to(weight.device) for tensor in basis))
        error = float((restored_weight(residual.to(weight.device), moved, scaling) - weight).norm()) / max(norm, 1e-30)
        if error <= tolerance:
            return Restored(basis, scaling, error)
        errors.append(error)
    raise BasisMismatchError(
        f"the residual does not belong to this adapter's basis and this model: at {layer}, W_res + Q R differs from "
        f"the model's weight by {100 * min(errors, default=float('inf')):.2g} % (storage explains at most "
        f"{100 * tolerance:.2g} %). Use the residual that was made for the adapter, or none: Apply QR-LoRA does not "
        "need one"
    )


def storage_tolerance(*dtypes: torch.dtype | None) -> float:
    """Largest relative Frobenius error of a weight that was rounded to each of these dtypes; None: packed otherwise.

    Rounding normal numbers at random costs eps / (2 sqrt 3) = 0.29 eps; twice that leaves room for subnormals, and
    1e-4 for float32 arithmetic. 4- and 8-bit block formats have no such constant: 0.15 is above their usual error and
    below what a foreign basis or model gives.
    """
    return 1e-4 + sum(0.15 if dtype is None else 0.6 * torch.finfo(dtype).eps for dtype in dtypes)


def value_dtype(tensor: Tensor) -> torch.dtype:
    """The coarsest floating dtype that holds a 2-D tensor's values exactly, judged by 64 of its rows.

    Files and hosts often store rounded values in a wider dtype (the published residual script rounds to float16 and
    writes float32; ComfyUI on a CPU keeps a bfloat16 model in float32), so the dtype alone says nothing of precision.
    """
    rows = tensor[:: max(1, tensor.shape[0] // 64)]
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float16):
        if torch.equal(rows.to(dtype).float(), rows.float()):
            return dtype
    return tensor.dtype


def write_residual(
    path: Path,
    layers: Iterable[LayerTarget],
    residual_of: Callable[[str], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Stream a residual file in the published layout, one layer in memory at a time.

    Args:
        path: must not exist.
        layers: what to write, in order.
        residual_of: layer name -> `W_res`, (out, in); asked once per layer, in order.
        dtype: float32 or float16 (the published choices), or bfloat16.

    Raises:
        PathError: the file exists or cannot be written.
        WeightError: a residual holds NaN or Inf, also after rounding to `dtype`.
    """
    layers = list(layers)
    if len({layer.name for layer in layers}) != len(layers) or not layers:
        raise TargetError(
            f"a residual needs distinct layers, got {first_few([layer.name for layer in layers]) or 'none'}"
        )
    specs = {RESIDUAL.format(layer.name): TensorSpec(dtype, layer.shape) for layer in layers}

    def stream() -> Iterable[tuple[str, Tensor]]:
        for layer in layers:
            rounded = residual_of(layer.name).to(dtype)
            require_finite(rounded, f"the residual of {layer.name} as {dtype}")
            yield RESIDUAL.format(layer.name), rounded

    return write_tensors(path, specs, stream(), metadata or {})
