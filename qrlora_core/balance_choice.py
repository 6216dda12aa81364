"""What to propose for a pair of adapters whose settings were measured (`balance`), and all of it as plain JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .acts import ACTS
from .balance import Cell, Point, Prompts, pulls
from .errors import SettingError

SCHEMA, VERSION = "qr-lora/balance", 1
CHOICES = ("balanced", "content", "style", "quiet")
BY_HAND = "by hand"
# What a setting costs: evaluations of the model in a step in which both act
EVALUATIONS = {act: 3 if way.one_pass_each else 1 for act, way in ACTS.items()}

# By how much scores of one setting differ from noise to noise, on the tuning pairs of the study
NOISE = 0.1
# Chosen on the tuning pairs of the study (docs/fusion.md): a concept is read only where nearly all its effect is left
_STEEP = 2
_SAME = 1e-3  # scores that are nearer to each other are equal


def presence(survival: float | None, purity: float | None) -> float | None:
    """How far an adapter shows, 0 to 1: more than all of its effect counts as all, and what drowns it lowers it.

    `min(survival, 1)^2 purity`; None for an adapter that does nothing alone.
    """
    if survival is None or purity is None:
        return None
    return float(min(max(survival, 0.0), 1.0) ** _STEEP * max(purity, 0.0))


def shown(cell: Cell) -> tuple[float | None, float | None]:
    """Presence of style and content."""
    return presence(cell.style, cell.style_purity), presence(cell.content, cell.content_purity)


def both_shown(cell: Cell) -> float:
    """Presence of the one that is worse off; 0 where neither adapter does anything."""
    return min((share for share in shown(cell) if share is not None), default=0.0)


def quiet(cell: Cell) -> float:
    """What is left of prompts that ask for neither, 0 to 1."""
    return max(0.0, 1.0 - cell.drift)


def score(cell: Cell, choice: str) -> float:
    """What a choice looks for.

    balanced: the worse of the two times what stays quiet. quiet: the same, quiet counted three times. content, style:
    that one fully and the other by its root, times what stays quiet.

    Raises:
        KeyError: there is no such choice.
    """
    style, content = (1.0 if share is None else share for share in shown(cell))
    scores = {
        "balanced": both_shown(cell) * quiet(cell),
        "quiet": both_shown(cell) * quiet(cell) ** 3,
        "content": content * math.sqrt(style) * quiet(cell),
        "style": style * math.sqrt(content) * quiet(cell),
    }
    return scores[choice]


def proposal(measured: Sequence[Cell], choice: str) -> Cell:
    """The setting that a choice likes best, or one of the same act that is as good and nearer to factors of 1.

    Scores that differ by no more than NOISE are those of one setting with other noises. Of acts that are exactly equal
    the one with fewer evaluations is taken.

    Raises:
        SettingError: nothing was measured: content first needs two noise levels, to switch between them.
    """
    if not measured:
        raise SettingError(
            "there are no two measured noise levels between which content first could switch to style; raise points "
            "to 2 or more, or set act to another one"
        )
    best = max(measured, key=lambda cell: (round(score(cell, choice) / _SAME), -EVALUATIONS[cell.act]))
    enough = (1 - NOISE) * score(best, choice)
    equal = [cell for cell in measured if cell.act == best.act and score(cell, choice) >= enough]
    return min(equal, key=lambda cell: (round(_distance(cell), 6), -score(cell, choice)))


def frontier(measured: Sequence[Cell]) -> list[Cell]:
    """The settings that no other one of their act beats in both numbers, act by act, by rising drift."""
    unbeaten: list[Cell] = []
    for act in dict.fromkeys(cell.act for cell in measured):
        best: list[Cell] = []
        of_act = [cell for cell in measured if cell.act == act]
        for cell in sorted(of_act, key=lambda setting: (setting.drift, -both_shown(setting), _distance(setting))):
            if not best or both_shown(cell) > both_shown(best[-1]) + _SAME:
                best.append(cell)
        unbeaten += best
    return unbeaten


def balance_report(
    measured: Sequence[Cell], chosen: Cell, choice: str, points: Sequence[Point], prompts: Prompts
) -> dict[str, Any]:
    """Everything as plain JSON, which is also what is drawn."""
    best = frontier(measured)
    style_pull, content_pull = pulls(points)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "prompts": dict(prompts),
        "noise_levels": [point.level for point in points],
        "pull_without_a_gate": {"style_on_content_prompts": style_pull, "content_on_style_prompts": content_pull},
        "choice": choice,
        "chosen": _entry(chosen, best),
        "proposals": {name: _entry(proposal(measured, name), best) for name in CHOICES},
        "cells": [_entry(cell, best) for cell in measured],
    }


def _entry(cell: Cell, best: Sequence[Cell]) -> Mapping[str, Any]:
    style, content = shown(cell)
    more = {"style_shown": style, "content_shown": content, "shown": both_shown(cell)}
    return {**cell._asdict(), **more, "evaluations": EVALUATIONS[cell.act], "frontier": cell in best}


def _distance(cell: Cell) -> float:
    return abs(cell.alpha - 1) + abs(cell.beta - 1)
