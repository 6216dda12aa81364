"""From readings to numbers of a unit, means over units, and intervals."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Readings = Mapping[str, Mapping[str, float]]  # kind -> shares


class Numbers(NamedTuple):
    """What one way to put one unit's adapters together gives, each 0 to 1.

    Attributes:
        content, style: shares of the prompts with both triggers that show the one, and the other.
        h: their harmonic mean.
        words: other words right, mean over prompts with one trigger and with none, both adapters on.
        extra: prompts with both triggers whose extra word, which no adapter claims, is drawn: not free with a gate.
        joint: pictures that are right in all that the prompt asks for, mean over kinds of prompts but `both+`.
    """

    content: float
    style: float
    h: float
    words: float
    extra: float
    joint: float


def numbers(readings: Readings) -> Numbers:
    """The numbers of one unit; `readings` of all kinds."""
    both = readings["both"]
    words = [readings[kind]["words"] for kind in ("content", "style", "none")]
    right = [readings[kind]["right"] for kind in ("both", "content", "style", "none")]
    return Numbers(
        both["content"],
        both["style"],
        harmonic(both["content"], both["style"]),
        sum(words) / len(words),
        readings["both+"]["extra"],
        sum(right) / len(right),
    )


def harmonic(*shares: float) -> float:
    """Their harmonic mean, 0 where one is 0."""
    return len(shares) / sum(1 / share for share in shares) if min(shares) > 0 else 0.0


def score(found: Numbers) -> float:
    """What tuning raises: harmonic mean of H and other words."""
    return harmonic(found.h, found.words)


def mean(rows: Sequence[Numbers]) -> Numbers:
    """Means over units."""
    return Numbers(*(sum(column) / len(column) for column in zip(*rows)))


class Interval(NamedTuple):
    """A mean and where 95 % of resampled means lie."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interval(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> Interval:
    """Bootstrap over units. For a paired comparison, `values` are the units' differences."""
    array = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    low, high = np.percentile(array[picks].mean(1), (2.5, 97.5))
    return Interval(float(array.mean()), float(low), float(high))


def difference(rows: Sequence[Numbers], others: Sequence[Numbers], field: str) -> Interval:
    """How much more of a field `rows` have than `others`, unit by unit."""
    return interval([getattr(one, field) - getattr(other, field) for one, other in zip(rows, others)])
