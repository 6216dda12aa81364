"""The basis of a layer: an adapter's own, the one that training began with, one for several adapters, and its file."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter
from .errors import BasisMismatchError, FileFormatError
from .families import network_order
from .formats import BASIS, file_kind, group_layers
from .linalg import EXACTLY_ORTHONORMAL, ORTHONORMAL, Basis, base_r, decompose, orthonormality_error, require_finite
from .storage import TensorFile, TensorSpec
from .targets import LayerTarget
from .writing import write_tensors

# Two float32 Q of one file differ by nothing; anything above rounding is another basis.
_SAME_BASIS = 1e-6
# A direction that is shorter than this, of columns of length 1, is rounding of float32 files
_NEW_DIRECTION = 3e-6
# How far R may lie from Q^T W besides what storage explains, before it is taken for that of another model
_OTHER_MODEL = 0.02


class JointBasis(NamedTuple):
    """One orthonormal basis for several layers' columns.

    Attributes:
        q: (out, k), k at most the sum of all ranks; its first columns are the first `up` where that is orthonormal.
        parts: for every `up` (out, r) that went in, the (k, r) matrix with `q @ part = up`: an update `up @ down` is
            `q @ (part @ down)`.
    """

    q: Tensor
    parts: tuple[Tensor, ...]


def same_basis(first: Tensor, second: Tensor) -> bool:
    """Whether two Q agree to float32 rounding, column by column. Flipped signs are another basis."""
    if first is second:
        return True
    return first.shape == second.shape and torch.allclose(first.float(), second.float(), rtol=0, atol=_SAME_BASIS)


def joint_basis(ups: Sequence[Tensor]) -> JointBasis:
    """An orthonormal basis in which every `up` can be written exactly.

    `Q = [Q1 E2 E3 ...]`, where E_i is an orthonormal basis of what the i-th columns add to those before them, found by
    the eigenvectors of the remainder's Gram matrix: unlike a plain QR, that drops directions which add nothing. The
    work is done in float64, so that what is dropped lies below the rounding of float32 files.

    Args:
        ups: (out, r_i) each, any floating dtype; columns of about length 1.

    Returns:
        Float32 tensors.
    """
    first = ups[0].double()
    q = first if orthonormality_error(first) <= EXACTLY_ORTHONORMAL else _directions(first, _length(first))
    for up in ups[1:]:
        extra = up.double()
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            extra = extra - q @ (q.mT @ extra)
        q = torch.cat([q, _directions(extra, _length(up.double()))], dim=1)
    if not q.shape[1]:  # nothing but zeros; a layer has at least one column
        q = torch.eye(q.shape[0], 1, dtype=q.dtype, device=q.device)
    return JointBasis(q.float(), tuple((q.mT @ up.double()).float() for up in ups))


def orthonormal(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same update `up @ down` on orthonormal columns: (out, k) and (k, in), k at most the rank.

    Columns that are orthonormal to storage precision are returned as they are; others (a file that stacked two bases,
    a trained Q') are rewritten in float32.
    """
    if orthonormality_error(up) <= ORTHONORMAL:
        return up, down
    joint = joint_basis([up])
    return joint.q, joint.parts[0] @ down.float()


def initial_basis(weight: Tensor, rank: int) -> Basis:
    """The Q and R that method qr began with, from the weight (out, in) that it was trained on; float32, on the CPU.

    Raises:
        WeightError: see `decompose`.
    """
    basis = decompose(weight, rank, method="exact")
    return Basis(basis.q.cpu(), basis.r.cpu())


def own_basis(adapter: Adapter, name: str, weight: Tensor, tolerance: float) -> Basis:
    """Q and R of an adapter's layer, once it is sure that they belong to this weight.

    Args:
        weight: (out, in); the result is float32 on its device.
        tolerance: largest relative error of R that the storage of weight and adapter explains.

    Raises:
        BasisMismatchError: the adapter does not hold the basis, or it is that of another model.
    """
    layer = adapter.layer(name)
    if layer.initial is None and adapter.method == "qr":
        raise BasisMismatchError(
            f"{adapter.name} does not tell the basis of {name} (a full-QR file holds the trained Q): use the adapter "
            "that it was made from"
        )
    q = (layer.initial.q if layer.initial else layer.up).to(weight.device).float()
    if layer.initial is None and orthonormality_error(q) > ORTHONORMAL:
        raise BasisMismatchError(
            f"{adapter.name} does not tell the basis of {name} (its Q is not orthonormal, as in a merge that stacked "
            "two bases): use the adapters that it was made from"
        )
    expected = base_r(weight, q)
    if layer.initial is None:
        return Basis(q, expected)
    held = layer.initial.r.to(weight.device).float()
    error = float((held - expected).norm() / expected.norm().clamp_min(1e-30))
    if error > tolerance + _OTHER_MODEL:
        raise BasisMismatchError(
            f"{adapter.name} was made for another base model: at {name} its R differs from Q^T W by {100 * error:.2g} %"
        )
    return Basis(q, held)


def basis_name(fingerprint: str, targets: Sequence[LayerTarget], rank: int, method: str) -> str:
    """What the file of these bases is called, made or not: the name says all that they depend on.

    Args:
        fingerprint: of the base model.
        targets: the layers, in order.
        rank: of all of them.
        method: how they were found.
    """
    layers = hashlib.sha256("".join(f"{t.name}{t.shape}" for t in targets).encode()).hexdigest()[:8]
    return f"basis-{fingerprint}-r{rank}-{method}-{layers}.safetensors"


def save_basis(
    path: Path,
    layers: Mapping[str, TensorSpec],
    basis_of: Callable[[str], Basis],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> Path:
    """Stream the Q and R of many layers into one file, the cache of a decomposition.

    Args:
        path: must not exist unless `overwrite`.
        layers: layer name -> spec of its weight; the file's dtype and the sizes follow from it and the rank that
            `metadata["qrlora.rank"]` states.
        basis_of: layer name -> Basis, asked once per layer in order.
        metadata: must hold `qrlora.rank`.
    """
    rank = int(metadata["qrlora.rank"])
    names = sorted(layers, key=network_order)
    specs: dict[str, TensorSpec] = {}
    for name in names:
        dtype, (out, width) = layers[name]
        specs[BASIS["q"].format(name)] = TensorSpec(dtype, (out, rank))
        specs[BASIS["r"].format(name)] = TensorSpec(dtype, (rank, width))

    def stream() -> Iterable[tuple[str, Tensor]]:
        for name in names:
            q, r = basis_of(name)
            require_finite(q, f"Q of {name}")
            require_finite(r, f"R of {name}")
            yield BASIS["q"].format(name), q
            yield BASIS["r"].format(name), r

    header = {"qrlora.format": "basis", **metadata}
    return write_tensors(path, specs, stream(), header, overwrite=overwrite, checksum=True)


def open_basis(path: Path) -> tuple[dict[str, Callable[[], Basis]], dict[str, str]]:
    """Layer name -> a reader of its Q and R, and the file's metadata; nothing is read yet.

    Raises:
        FileFormatError: another kind of file, or a layer without its Q or R.
    """
    file = TensorFile(path)
    if file_kind(file) != "basis":
        raise FileFormatError(f"{file.path.name} is not a basis; expected keys like {BASIS['q'].format('<layer>')}")
    layers = group_layers(file, BASIS)
    for name, keys in layers.items():
        q, r = file.specs[keys["q"]].shape, file.specs[keys["r"]].shape
        if len(q) != 2 or len(r) != 2 or q[1] != r[0]:
            raise FileFormatError(f"{file.path.name}: {name} pairs Q {q} with R {r}, expected (out, r) and (r, in)")

    def reader(keys: Mapping[str, str]) -> Callable[[], Basis]:
        def read() -> Basis:
            basis = Basis(file.tensor(keys["q"]), file.tensor(keys["r"]))
            for key, tensor in zip((keys["q"], keys["r"]), basis):
                require_finite(tensor, f"{file.path.name}: {key}")
            if orthonormality_error(basis.q) > ORTHONORMAL:
                raise FileFormatError(f"{file.path.name}: {keys['q']} is not orthonormal; the file is damaged")
            return basis

        return read

    return {name: reader(layers[name]) for name in sorted(layers, key=network_order)}, file.metadata


def _directions(columns: Tensor, length: float) -> Tensor:
    """An orthonormal basis, (out, k), of what float64 columns (out, r) span.

    Directions that are rounding of columns of that length are left out.
    """
    values, vectors = torch.linalg.eigh(columns.mT @ columns)
    kept = values > (_NEW_DIRECTION * length) ** 2
    q: Tensor = torch.linalg.qr(columns @ (vectors[:, kept] / values[kept].sqrt())).Q
    return q


def _length(columns: Tensor) -> float:
    return float(columns.norm(dim=0).max())
