"""From readings to numbers of a unit, means over units, and intervals."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .protocol import Unit

Readings = Mapping[str, Mapping[str, float]]  # kind -> shares


class Numbers(NamedTuple):
    """What one way to put one unit's adapters together gives, each 0 to 1.

    Attributes:
        content, style: shares of the prompts with both triggers that show the one, and the other.
        h: their harmonic mean.
        words: other words right, mean over prompts with one trigger and with none, both adapters on.
        colour: prompts with both triggers and a colour, which neither adapter claims: colour right. No gate gives it.
        h_colour: H in these prompts.
        joint: pictures that are right in all that the prompt asks for, mean over kinds of prompts but `both+`.
    """

    content: float
    style: float
    h: float
    words: float
    colour: float
    h_colour: float
    joint: float


def numbers(readings: Readings) -> Numbers:
    """The numbers of one unit; `readings` of all kinds."""
    right = [readings[kind]["right"] for kind in ("both", "content", "style", "none")]
    return Numbers(
        readings["both"]["content"],
        readings["both"]["style"],
        h(readings["both"]),
        other_words(readings),
        readings["both+"]["words"],
        h(readings["both+"]),
        sum(right) / len(right),
    )


def h(shares: Mapping[str, float]) -> float:
    """Both concepts shown: the harmonic mean of content and style."""
    return harmonic(shares["content"], shares["style"])


def other_words(readings: Readings) -> float:
    """Other words right, mean over prompts with one trigger and with none."""
    return sum(readings[kind]["words"] for kind in ("content", "style", "none")) / 3


def harmonic(*shares: float) -> float:
    """Their harmonic mean, 0 where one is 0."""
    return len(shares) / sum(1 / share for share in shares) if min(shares) > 0 else 0.0


def mean(rows: Sequence[Numbers]) -> Numbers:
    """Means over units."""
    return type(rows[0])(*(sum(column) / len(column) for column in zip(*rows)))


class Interval(NamedTuple):
    """A mean and where 95 % of resampled means lie."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interval(values: Sequence[float], units: Sequence[Unit], resamples: int = 10_000, seed: int = 0) -> Interval:
    """Bootstrap over contents and styles, independently, as units share adapters (Owen 2007).

    Args:
        values: one for each unit; for a paired comparison, the units' differences.
        units: all pairs of some contents and some styles.
    """
    contents, styles = (list(dict.fromkeys(parts)) for parts in zip(*((unit.content, unit.style) for unit in units)))
    table = np.full((len(contents), len(styles)), np.nan)
    for value, unit in zip(values, units):
        table[contents.index(unit.content), styles.index(unit.style)] = value
    generator = np.random.default_rng(seed)
    rows, columns = (generator.integers(size, size=(resamples, size)) for size in table.shape)
    means = np.nanmean(table[rows[:, :, None], columns[:, None, :]], axis=(1, 2))
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(np.nanmean(table)), float(low), float(high))


def difference(rows: Sequence[Numbers], others: Sequence[Numbers], field: str, units: Sequence[Unit]) -> Interval:
    """How much more of a field `rows` have than `others`, unit by unit."""
    return interval([getattr(one, field) - getattr(other, field) for one, other in zip(rows, others)], units)


def gain(
    shown: Sequence[float],
    rest: Sequence[float],
    curve: Sequence[tuple[Sequence[float], Sequence[float]]],
    seed: int = 0,
) -> Interval:
    """How much more of the rest an adapter leaves unchanged than a curve does where that shows its concept as often.

    Args:
        shown, rest: a number for each concept.
        curve: pairs of the same, such as those of several strengths; it is interpolated between neighbours in shown.

    Returns:
        The mean over concepts, and a bootstrap over them. Where the curve does not reach as far, its end counts.
    """
    points = sorted(curve, key=lambda point: np.mean(point[0]))
    at = [float(np.mean(point[0])) for point in points]
    wanted = min(max(float(np.mean(shown)), at[0]), at[-1])
    rests = np.array([point[1] for point in points])
    differences = np.array(rest) - [np.interp(wanted, at, column) for column in rests.T]
    drawn = np.random.default_rng(seed).integers(len(differences), size=(10_000, len(differences)))
    low, high = np.percentile(differences[drawn].mean(1), (2.5, 97.5))
    return Interval(float(differences.mean()), float(low), float(high))
