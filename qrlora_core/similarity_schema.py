"""The form and the summary of a similarity report. It is its JSON: new versions add keys and keep these.

Everything is null where it is not defined: a file that does not hold the tensor, ranks that differ, a matrix of zeros.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

SCHEMA = "qr-lora/similarity"
VERSION = 1
QUANTITIES = ("delta_r", "q", "r", "update", "sign_conflict")


class AdapterEntry(TypedDict):
    """One of the two adapters."""

    name: str
    method: str
    rank: int
    alpha: float
    layers: int
    basis_fingerprint: str | None


class Quantities(TypedDict):
    """A number for each pair of matrices: dR, Q, R (flattened), and the whole update `scaling * Q dR`."""

    delta_r: float | None
    q: float | None
    r: float | None
    update: float | None


class Angles(TypedDict):
    """Principal angles between the column spans of the two Q, in degrees: 0 one direction in common, 90 none."""

    min: float
    mean: float
    max: float


class Norms(TypedDict):
    """Frobenius norms; `update` is that of `scaling * Q dR`, which is added to the weight."""

    delta_r_a: float | None
    delta_r_b: float | None
    r_a: float | None
    r_b: float | None
    update_a: float | None
    update_b: float | None


class LayerEntry(TypedDict):
    """One layer that both adapters have.

    name: its diffusers name. block, number, layer, part, stream: see `LayerKind`. shape: (out, in).
    same_basis: whether the two Q agree column by column to float32 rounding.
    cosine: cosine similarities. null_band: 95 % of random matrices of that shape have a smaller |cosine|.
    angles: principal angles. span_overlap: mean squared cosine of them, 1 for one span, 0 for orthogonal ones.
    energy_ratio: (update_b / update_a) ** 2.
    sign_conflict: share of the entries of dR with opposite signs, 0.5 for random ones; null on different bases, where
    entries of dR do not correspond.
    """

    name: str
    block: str
    number: int
    layer: str
    part: str
    stream: str
    shape: list[int]
    rank_a: int
    rank_b: int
    same_basis: bool
    cosine: Quantities
    null_band: Quantities
    angles: Angles
    span_overlap: float
    norms: Norms
    energy_ratio: float | None
    sign_conflict: float | None


class Statistics(TypedDict):
    """Over the layers in which the number is defined; std is that of the population, as in the published tool.

    outside_null_band: share of layers whose |cosine| is larger than chance explains; about 0.05 for random adapters.
    """

    layers: int
    mean: float
    median: float
    std: float
    min: float
    max: float
    min_layer: str
    max_layer: str
    outside_null_band: float | None


class Total(TypedDict):
    """All layers as one long vector: cosine, norms and energy ratio of the two updates."""

    cosine_update: float | None
    update_norm_a: float | None
    update_norm_b: float | None
    energy_ratio: float | None


class SimilarityReport(TypedDict):
    """The whole report. schema, version: what it is. summary: by QUANTITIES. layers: in network order."""

    schema: str
    version: int
    a: AdapterEntry
    b: AdapterEntry
    same_basis: bool
    only_in_a: list[str]
    only_in_b: list[str]
    total: Total
    summary: dict[str, Statistics | None]
    layers: list[LayerEntry]


def statistics(layers: Sequence[LayerEntry], key: str) -> Statistics | None:
    """Over the layers that have the value; None when no layer has it."""
    measured: list[tuple[float, LayerEntry]] = []
    for entry in layers:
        value = entry["sign_conflict"] if key == "sign_conflict" else _quantity(entry["cosine"], key)
        if value is not None:
            measured.append((value, entry))
    if not measured:
        return None
    values = np.array([value for value, _ in measured])
    bands = [None if key == "sign_conflict" else _quantity(entry["null_band"], key) for _, entry in measured]
    outside = [abs(value) > band for (value, _), band in zip(measured, bands) if band is not None]
    return {
        "layers": len(values),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        "min_layer": measured[int(values.argmin())][1]["name"],
        "max_layer": measured[int(values.argmax())][1]["name"],
        "outside_null_band": sum(outside) / len(outside) if outside else None,
    }


def _quantity(entry: Quantities, key: str) -> float | None:
    return {"delta_r": entry["delta_r"], "q": entry["q"], "r": entry["r"], "update": entry["update"]}[key]
