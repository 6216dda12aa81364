"""How alike two adapters are, layer by layer: cosines, spans, sizes, and what chance alone would give.

Layers are read, compared and let go one at a time, and the (out, in) update of a layer is never formed: for updates
`U D` of rank r everything follows from r x r matrices, `<U1 D1, U2 D2> = sum((U1^T U2) * (D1 D2^T))`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter, AdapterLayer, Progress
from .basis import same_basis
from .errors import TargetError
from .families import Family, family_of_targets, layer_kind
from .formats import first_few
from .similarity_schema import (
    QUANTITIES,
    SCHEMA,
    VERSION,
    AdapterEntry,
    LayerEntry,
    Norms,
    Quantities,
    SimilarityReport,
    statistics,
)

# Half the width of the interval that holds 95 % of a normal distribution, in standard deviations
_BAND = 1.959964
# Directions of a Q that are weaker than this, relative to the strongest, are rounding (float32 files: 1e-14)
_SPAN_ENERGY = 1e-10


def similarity_report(a: Adapter, b: Adapter, progress: Progress | None = None) -> SimilarityReport:
    """Compare two adapters in all layers that both have.

    Args:
        a, b: what to compare; of a merge, `merged_adapter(recipe)`.
        progress: wraps the list of layer names that is gone through, as `tqdm` does; it may stop the work by raising.

    Returns:
        Plain dictionaries, lists, strings and numbers, ready for `json.dump`: see `SimilarityReport`.

    Raises:
        TargetError: no layer is in both, or one has different shapes in them.
        WeightError: a tensor holds NaN or Inf.
    """
    common = [name for name in a.layers if name in b.layers]
    if not common:
        raise TargetError(
            f"{a.name} and {b.name} have no layer in common: {first_few(a.layers)}; {first_few(b.layers)}"
        )
    for name in common:
        if a.layers[name].shape != b.layers[name].shape:
            shapes = f"{a.layers[name].shape} in {a.name}, {b.layers[name].shape} in {b.name}"
            raise TargetError(f"the adapters were made for different models: {name} has shape {shapes}")
    layers: list[LayerEntry] = []
    inner = 0.0
    family = family_of_targets(a.targets)
    for name in common if progress is None else progress(common):
        entry, product = _compare(name, a, b, family)
        layers.append(entry)
        inner += product
    size_a, size_b = (_total([entry["norms"][key] for entry in layers]) for key in ("update_a", "update_b"))
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "a": _adapter_entry(a),
        "b": _adapter_entry(b),
        "same_basis": all(entry["same_basis"] for entry in layers),
        "only_in_a": [name for name in a.layers if name not in b.layers],
        "only_in_b": [name for name in b.layers if name not in a.layers],
        "total": {
            "cosine_update": _clamped(inner / (size_a * size_b)) if size_a and size_b else None,
            "update_norm_a": size_a,
            "update_norm_b": size_b,
            "energy_ratio": _squared_ratio(size_b, size_a),
        },
        "summary": {key: statistics(layers, key) for key in QUANTITIES},
        "layers": layers,
    }


class _Update(NamedTuple):
    """`scaling * up @ down`, float64."""

    up: Tensor
    down: Tensor
    scaling: float


class _Parts(NamedTuple):
    """What one side of a layer is made of, float64; None for what its file does not tell."""

    q: Tensor
    r: Tensor | None
    delta_r: Tensor | None
    update: _Update | None


def _both(layer_a: AdapterLayer, layer_b: AdapterLayer, a: Adapter, b: Adapter, name: str) -> tuple[_Parts, _Parts]:
    """The two sides of a layer. Tensors that are equal bit by bit are one tensor in both, which saves most of the work
    for adapters of one base."""
    parts_a = _parts(a, layer_a, a.layers[name].scaling)
    q = parts_a.q if _equal(layer_a.up, layer_b.up) else None
    r = parts_a.r if layer_a.initial and layer_b.initial and _equal(layer_a.initial.r, layer_b.initial.r) else None
    return parts_a, _parts(b, layer_b, b.layers[name].scaling, q, r)


def _parts(
    adapter: Adapter, layer: AdapterLayer, scaling: float, q: Tensor | None = None, r: Tensor | None = None
) -> _Parts:
    up = layer.up.double() if q is None else q
    down = layer.down.double()
    if adapter.method != "qr":
        base_r = layer.initial.r.double() if layer.initial and r is None else r
        return _Parts(up, base_r, down, _Update(up, down, scaling))
    if layer.initial is None:
        return _Parts(up, down, None, None)
    stacked = torch.cat([up, layer.initial.q.double()], dim=1), torch.cat([down, -layer.initial.r.double()])
    return _Parts(up, down, None, _Update(*stacked, scaling))


def _compare(name: str, a: Adapter, b: Adapter, family: Family | None) -> tuple[LayerEntry, float]:
    """One layer, and the inner product of its two updates."""
    info, kind = a.layers[name], layer_kind(name, family)
    layer_a, layer_b = a.layer(name), b.layer(name)
    parts_a, parts_b = _both(layer_a, layer_b, a, b, name)
    same = parts_a.q is parts_b.q or same_basis(layer_a.up, layer_b.up)
    cosine: Quantities = {"delta_r": None, "q": None, "r": None, "update": None}
    band: Quantities = {"delta_r": None, "q": None, "r": None, "update": None}
    cosine["delta_r"], band["delta_r"] = _cosine(parts_a.delta_r, parts_b.delta_r)
    cosine["q"], band["q"] = _cosine(parts_a.q, parts_b.q)
    cosine["r"], band["r"] = _cosine(parts_a.r, parts_b.r)
    gram_a = parts_a.q.mT @ parts_a.q
    gram_b, cross = (gram_a, gram_a) if parts_b.q is parts_a.q else (parts_b.q.mT @ parts_b.q, parts_a.q.mT @ parts_b.q)
    inner, norm_a, norm_b = 0.0, _product_norm(parts_a, gram_a), _product_norm(parts_b, gram_b)
    if parts_a.update and parts_b.update:
        shared = parts_a.update.up is parts_a.q and parts_b.update.up is parts_b.q
        inner, deviation = _inner(
            parts_a.update, parts_b.update, cross if shared else parts_a.update.up.mT @ parts_b.update.up
        )
        size = (norm_a or 0.0) * (norm_b or 0.0)
        if size > 0:
            cosine["update"], band["update"] = _clamped(inner / size), _BAND * deviation
    angles, overlap = ([0.0], 1.0) if parts_b.q is parts_a.q else _spans(gram_a, gram_b, cross)
    norms: Norms = {
        "delta_r_a": _norm(parts_a.delta_r),
        "delta_r_b": _norm(parts_b.delta_r),
        "r_a": _norm(parts_a.r),
        "r_b": _norm(parts_b.r),
        "update_a": norm_a,
        "update_b": norm_b,
    }
    entry: LayerEntry = {
        "name": name,
        "block": kind.block,
        "number": kind.number,
        "layer": kind.layer,
        "part": kind.part,
        "stream": kind.stream,
        "shape": list(info.shape),
        "rank_a": info.rank,
        "rank_b": b.layers[name].rank,
        "same_basis": same,
        "cosine": cosine,
        "null_band": band,
        "angles": {
            "min": math.degrees(angles[0]),
            "mean": math.degrees(sum(angles) / len(angles)),
            "max": math.degrees(angles[-1]),
        },
        "span_overlap": overlap,
        "norms": norms,
        "energy_ratio": _squared_ratio(norm_b, norm_a),
        "sign_conflict": _sign_conflict(parts_a.delta_r, parts_b.delta_r) if same else None,
    }
    return entry, inner


def _cosine(first: Tensor | None, second: Tensor | None) -> tuple[float | None, float | None]:
    """Cosine of two flattened matrices, and the band that 95 % of random matrices with as many entries stay in."""
    if first is None or second is None or first.shape != second.shape:
        return None, None
    size = float(first.norm() * second.norm())
    if size == 0:
        return None, None
    if first is second:
        return 1.0, _BAND / math.sqrt(int(torch.count_nonzero(first)))
    # A triangular dR and every R have a corner of zeros, which chance cannot fill
    entries = min(int(torch.count_nonzero(first)), int(torch.count_nonzero(second)))
    return _clamped(float(torch.dot(first.flatten(), second.flatten())) / size), _BAND / math.sqrt(entries)


def _inner(first: _Update, second: _Update, cross: Tensor) -> tuple[float, float]:
    """Inner product of two updates, and the standard deviation of their cosine if both dR were random.

    For independent entries of D1, D2 the product has the variance ||U1^T U2||^2 * in and the sizes are ||Ui||^2 * in:
    1 / sqrt(rank * in) on one basis, 1 / sqrt(out * in) on two random ones. `cross` is U1^T U2.
    """
    product = float((cross * (first.down @ second.down.mT)).sum())
    spread = float(cross.norm() / (first.up.norm() * second.up.norm()))
    return first.scaling * second.scaling * product, spread / math.sqrt(first.down.shape[1])


def _spans(gram_a: Tensor, gram_b: Tensor, cross: Tensor) -> tuple[list[float], float]:
    """Principal angles between two column spans, ascending, in radians, and the mean of their squared cosines.

    Bjoerck & Golub 1973, from `Qa^T Qa`, `Qb^T Qb` and `Qa^T Qb`. The columns are made orthonormal by their own Gram
    matrix, because files in bf16 and stacked merges hold a Q that is not.
    """
    cosines = torch.linalg.svdvals(_whitening(gram_a).mT @ cross @ _whitening(gram_b)).clamp(0, 1)
    # acos cannot tell angles below 1e-8 from 0, which is far below what a file stores
    return torch.acos(cosines).tolist(), float(cosines.square().mean())


def _whitening(gram: Tensor) -> Tensor:
    """`T` such that `q @ T` has orthonormal columns that span what q spans: (rank, rank) or narrower."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _SPAN_ENERGY * values[-1]
    whitening: Tensor = vectors[:, kept] / values[kept].sqrt()
    return whitening


def _sign_conflict(first: Tensor | None, second: Tensor | None) -> float | None:
    """Share of the entries that are zero in neither and have opposite signs; random matrices: 0.5."""
    if first is None or second is None or first.shape != second.shape:
        return None
    signs = torch.sign(first) * torch.sign(second)
    both = int(torch.count_nonzero(signs))
    return int((signs < 0).sum()) / both if both else None


def _norm(tensor: Tensor | None) -> float | None:
    return None if tensor is None else float(tensor.norm())


def _product_norm(parts: _Parts, gram_q: Tensor) -> float | None:
    if parts.update is None:
        return None
    up, down, scaling = parts.update
    gram = gram_q if up is parts.q else up.mT @ up
    return abs(scaling) * float((gram * (down @ down.mT)).sum().clamp_min(0).sqrt())


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _total(norms: Sequence[float | None]) -> float | None:
    """Norm of all layers together."""
    defined = [norm for norm in norms if norm is not None]
    return math.sqrt(sum(norm**2 for norm in defined)) if len(defined) == len(norms) else None


def _clamped(cosine: float) -> float:
    """Rounding can carry a cosine past 1."""
    return max(-1.0, min(1.0, cosine))


def _squared_ratio(value: float | None, by: float | None) -> float | None:
    return (value / by) ** 2 if value is not None and by else None


def _adapter_entry(adapter: Adapter) -> AdapterEntry:
    return {
        "name": adapter.name,
        "method": adapter.method,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "layers": len(adapter.layers),
        "basis_fingerprint": adapter.basis_fingerprint,
    }
