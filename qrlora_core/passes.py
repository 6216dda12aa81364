"""Adapters in passes of their own: predictions are composed instead of weights.

    v = v_0 + sum_i a_i (v_i - v_0)

v_0 is what the model predicts without the adapters that have a pass of their own, v_i what it predicts with the i-th
of them alone. No adapter sees what another does in the layers before, so one cannot draw over the other's part. It
takes an evaluation of the model for each of them, and one for v_0 (Liu et al. 2022, arXiv 2206.01714, for prompts;
Zhong et al. 2024, arXiv 2402.16843, for LoRAs).
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

Factors = tuple[float, ...]  # of every term


class Evaluation(NamedTuple):
    """One evaluation of the model.

    Attributes:
        table: the factors of all terms in it, one tuple for each prompt of the batch.
        weights: what its prediction counts, one for each prompt; those of all evaluations add up to 1.
    """

    table: tuple[Factors, ...]
    weights: tuple[float, ...]


def evaluations(passes: Sequence[Hashable | None], table: Sequence[Factors]) -> tuple[Evaluation, ...]:
    """What the model has to be asked for these factors, as few times as it takes.

    Terms of one pass act together: the largest of their factors is that of the pass, and within it they keep their
    proportions. Where at most one pass acts on a prompt, and fully, one evaluation is all there is to it.

    Args:
        passes: the pass of each term; None for a term that acts in all of them.
        table: the factor of each term, one tuple for each prompt.

    Returns:
        One evaluation or more; for each prompt the weights add up to 1. What would count nothing is not among them.
    """
    rows = tuple(table)
    own = [key for key in dict.fromkeys(passes) if key is not None]
    outer = [{key: _largest(passes, row, key) for key in own} for row in rows]
    acting = [[factor for factor in factors.values() if factor] for factors in outer]
    if all(factors in ([], [1.0]) for factors in acting):
        return (Evaluation(rows, (1.0,) * len(rows)),)
    first = tuple(1.0 - sum(factors) for factors in acting)
    candidates = [Evaluation(tuple(_within(passes, row, None, 0.0) for row in rows), first)]
    for key in own:
        weights = tuple(factors[key] for factors in outer)
        factors_of = tuple(_within(passes, row, key, weight) for row, weight in zip(rows, weights))
        candidates.append(Evaluation(factors_of, weights))
    return tuple(evaluation for evaluation in candidates if any(evaluation.weights))


def _largest(passes: Sequence[Hashable | None], row: Factors, key: Hashable) -> float:
    return max((factor for factor, own in zip(row, passes) if own == key), key=abs)


def _within(passes: Sequence[Hashable | None], row: Factors, key: Hashable | None, outer: float) -> Factors:
    """A prompt's factors in the pass `key`, whose own factor stands before its prediction."""
    return tuple(
        factor if own is None else factor / outer if own == key and outer else 0.0 for factor, own in zip(row, passes)
    )
