"""How much of two adapters survives when both act, against how far other prompts drift: by the model's predictions.

With v a prediction (velocity), 0 the model alone, i an adapter alone at full strength, and `both` a merge:

    e_i = v_i - v_0            on the prompt that asks for adapter i only
    e = v_both - v_0           on the prompt that asks for both
    survival_i = <e, e_i> / |e_i|^2
    drift = |v_both - v_0| / (|e_style| + |e_content|)    on the prompt that asks for neither

over all points of a path together. Survival is 1 where the merge does all that the adapter does alone in its direction.
No picture is made and no reader asked; docs/fusion.md says how far the numbers agree with what a reader sees.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .acts import ACTS
from .gate import DOUBLED, holds, without

Asked = Literal["both", "style", "content", "none"]
ASKED: tuple[Asked, ...] = ("both", "style", "content", "none")
SCHEMA, VERSION = "qr-lora/balance", 1


class Trial(NamedTuple):
    """Factors of style and content that the model is asked with; `own_pass`: each in a pass of its own."""

    alpha: float
    beta: float
    own_pass: bool = False


BASE = Trial(0.0, 0.0)
ALONE = (Trial(1.0, 0.0, True), Trial(0.0, 1.0, True))


class Point(NamedTuple):
    """What the model predicts at one place of a path.

    Attributes:
        level: of the noise, see `Schedule`: 1 to 0.
        predictions: trial and what the prompt asks for -> velocity.
    """

    level: float
    predictions: Mapping[tuple[Trial, Asked], Tensor]


class Cell(NamedTuple):
    """One setting and what it does.

    Attributes:
        act, alpha, beta, switch: as Merge has them; no switch where there is nothing to switch.
        style, content: survival; None where the adapter has no effect alone.
        style_cosine, content_cosine: of the merge's effect and the adapter's own.
        drift: see above; by the prompt it is 0 by construction.
    """

    act: str
    alpha: float
    beta: float
    switch: float | None
    style: float | None
    content: float | None
    style_cosine: float | None
    content_cosine: float | None
    drift: float

    @property
    def shown(self) -> float:
        """What survives of the adapter that is worse off; more than all of it counts as all."""
        return min((min(one, 1.0) for one in (self.style, self.content) if one is not None), default=0.0)


def four_prompts(prompt: str, style: Sequence[str], content: Sequence[str]) -> dict[Asked, str]:
    """The prompt that asks for both adapters, and what is left of it without the triggers of one and of both.

    A trigger that the prompt lacks altogether is put before it, as QR-LoRA Prompt does.
    """
    missing = [words[0] for words in (style, content) if words and not any(holds(prompt, word) for word in words)]
    both = " ".join([*dict.fromkeys(missing), prompt])
    only_style = [word for word in style if word not in content]
    only_content = [word for word in content if word not in style]
    return {
        "both": both,
        "style": without(both, only_content),
        "content": without(both, only_style),
        "none": without(both, [*style, *content]),
    }


def questions(alphas: Sequence[float], betas: Sequence[float], acts: Iterable[str]) -> dict[Trial, tuple[Asked, ...]]:
    """What the model has to be asked at each point, trial by trial."""
    found: dict[Trial, tuple[Asked, ...]] = {
        BASE: ASKED,
        ALONE[0]: ("both", "style", "none"),
        ALONE[1]: ("both", "content", "none"),
    }
    ways = [ACTS[act] for act in acts]
    if any(not way.one_pass_each and not way.content_first for way in ways):
        found |= {Trial(*pair): ("both", "none") for pair in itertools.product(alphas, betas) if any(pair)}
    if any(way.content_first for way in ways):
        lonely = [Trial(alpha, 0.0) for alpha in alphas] + [Trial(0.0, beta) for beta in betas]
        found |= {trial: ("both",) for trial in lonely if trial not in found}
    return found


def cells(points: Sequence[Point], alphas: Sequence[float], betas: Sequence[float], acts: Iterable[str]) -> list[Cell]:
    """Every setting of a grid, measured.

    Args:
        points: with the answers to `questions`.
        alphas, betas: factors of style and content.
        acts: names of ACTS; each is tried with the whole grid, and content first with a switch between any two points.
    """
    own = [[_effect(point, trial, side) for point in points] for trial, side in zip(ALONE, ("style", "content"))]
    levels = [point.level for point in points]
    between = [round((high + low) / 2, 2) for high, low in itertools.pairwise(levels)]
    found = []
    for act in acts:
        switches = [one for one in between if 0.01 <= one <= 0.99] if ACTS[act].content_first else [None]
        for alpha, beta, switch in itertools.product(alphas, betas, switches):
            merged = [_merged(point, act, alpha, beta, switch, "both") for point in points]
            drift = 0.0
            if not ACTS[act].by_prompt:
                size = sum(math.sqrt(_dot(one, one)) for one in own)
                moved = [_merged(point, act, alpha, beta, switch, "none") for point in points]
                drift = math.sqrt(_dot(moved, moved)) / size if size else 0.0
            (style, style_cosine), (content, content_cosine) = (_survival(merged, one) for one in own)
            found.append(Cell(act, alpha, beta, switch, style, content, style_cosine, content_cosine, drift))
    return found


def frontier(measured: Sequence[Cell]) -> list[Cell]:
    """The settings that no other one beats in both numbers, by rising drift."""
    best: list[Cell] = []
    for cell in sorted(measured, key=lambda one: (one.drift, *_preference(one))):
        if not best or cell.shown > best[-1].shown + _EQUAL:
            best.append(cell)
    return best


def proposal(measured: Sequence[Cell], most_drift: float) -> Cell:
    """The setting that shows most within a limit of drift; the one that drifts least where none keeps to it.

    Among equals it is the one whose factors are nearest to 1.
    """
    within = [cell for cell in measured if cell.drift <= most_drift]
    if not within:
        return min(measured, key=lambda cell: (cell.drift, *_preference(cell)))
    return min(within, key=_preference)


def as_json(
    measured: Sequence[Cell], proposed: Cell, prompts: Mapping[Asked, str], levels: Sequence[float]
) -> dict[str, Any]:
    """Everything as plain JSON, which is also what is drawn."""
    best = frontier(measured)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "prompts": dict(prompts),
        "noise_levels": list(levels),
        "proposed": measured.index(proposed),
        "cells": [{**cell._asdict(), "shown": cell.shown, "frontier": cell in best} for cell in measured],
    }


_EQUAL = 1e-3


def _preference(cell: Cell) -> tuple[float, float]:
    return -round(cell.shown / _EQUAL), abs(cell.alpha - 1) + abs(cell.beta - 1)


def _effect(point: Point, trial: Trial, asked: Asked) -> Tensor:
    """How a trial differs from the model alone on one prompt."""
    if trial == BASE:
        return torch.zeros_like(point.predictions[BASE, asked])
    return point.predictions[trial, asked] - point.predictions[BASE, asked]


def _merged(point: Point, act: str, alpha: float, beta: float, switch: float | None, asked: Asked) -> Tensor:
    """What a merge changes on a prompt that it acts on."""
    way = ACTS[act]
    if way.one_pass_each:
        content = beta * (DOUBLED if way.by_prompt else 1.0)
        return alpha * _effect(point, ALONE[0], asked) + content * _effect(point, ALONE[1], asked)
    if switch is not None:
        pair = (0.0, beta) if point.level > switch else (alpha, 0.0)
        return _effect(point, Trial(*pair), asked)
    return _effect(point, Trial(alpha, beta), asked)


def _survival(merged: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[float | None, float | None]:
    """Projection of a merge's effect on an adapter's own, and their cosine; (None, None) without an effect."""
    size, made = _dot(own, own), _dot(merged, merged)
    if not size:
        return None, None
    along = _dot(merged, own)
    return along / size, along / math.sqrt(size * made) if made else 0.0


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return sum(float(torch.dot(a.flatten().double(), b.flatten().double())) for a, b in zip(one, other))
