"""How far the numbers of dR Balance agree with what the reader sees, on the study's adapters.

    python -m benchmarks.fusion.balance --folder runs/fusion [--bf16] [--units tuning]

For every unit: the model's predictions on a grid of alpha and beta (nothing is sampled for that), rank correlations
with the reader's numbers over the grid, and what the reader says of the settings that are proposed, beside the best
fixed alpha and beta of the study, which were chosen on tuning units with the reader.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.pictures import CONTENT_TRIGGER, STYLE_TRIGGER
from qrlora_core import (
    ACTS,
    ASKED,
    Cell,
    Point,
    Trial,
    both_shown,
    cells,
    four_prompts,
    needed,
    products,
    proposal,
    shown,
)
from qrlora_core.gate import DOUBLED, HALF_UNTIL

from .fusions import Fusion, Schedule, Stage, content_first, content_then_base, fixed, half_then_full
from .judged import BEST_FIXED
from .learn import RECIPES
from .live import Live, encoded, noise_tokens
from .measures import difference, h, interval, numbers, other_words
from .protocol import CHECK, FINAL, LATER, PICTURES, SAMPLER_STEPS, TUNING, TUNING_PICTURES, Unit
from .store import Study

log = logging.getLogger(__name__)

UNITS = {"tuning": TUNING, "check": CHECK, "later": LATER, "final": FINAL}
GRID = (0.4, 0.6, 0.8, 1.0, 1.2)
MEASURED = (0, 4, 8)  # steps of the base's own path, as the node measures 3 of 12
FIRST_NOISE = 50_000  # of no picture of the study
PROMPT = f"a {CONTENT_TRIGGER} in {STYLE_TRIGGER} style"
PROPOSED = {  # title: acts to choose from
    "proposed among all acts": tuple(ACTS),
    "proposed, always": ("always",),
}


def measured(study: Study, unit: Unit, noises: int) -> list[Point]:
    """A unit's pair along the base's own sampling path, from so many noises."""
    study.live.wear([study.adapter(unit, side, RECIPES["qr"]).update for side in ("content", "style")])
    return _points(study.live, noises)


@torch.no_grad()
def _points(live: Live, count: int) -> list[Point]:
    """What the adapters do that are worn, content and style."""
    texts = four_prompts(PROMPT, [STYLE_TRIGGER], [CONTENT_TRIGGER])
    features = {
        asked: tuple(part.expand(count, *part.shape[1:]) for part in encoded([text])) for asked, text in texts.items()
    }

    def predicted(trial: Trial, asked: str) -> torch.Tensor:
        table = torch.tensor([[trial.beta, trial.alpha]]).expand(count, 2) if any(trial) else None
        return live.velocity(tokens, torch.full((count,), sigma), *features[asked], table)

    tokens, points = noise_tokens([FIRST_NOISE + number for number in range(count)]), []
    for step in range(SAMPLER_STEPS):
        sigma = 1 - step / SAMPLER_STEPS
        base = {asked: predicted(Trial(0, 0), asked) for asked in (ASKED if step in MEASURED else ASKED[:1])}
        if step in MEASURED:
            style, content = (
                {asked: predicted(trial, asked) - base[asked] for asked in ASKED}
                for trial in (Trial(1, 0), Trial(0, 1))
            )
            effects = {
                (trial, asked): products(predicted(trial, asked) - base[asked], style[asked], content[asked])
                for trial, prompts in needed(GRID, GRID, ACTS).items()
                for asked in prompts
            }
            norms = {asked: float(base[asked].double().square().sum()) for asked in ASKED}
            points.append(Point(sigma, norms, effects))
        tokens = tokens - base["both"] / SAMPLER_STEPS
    return points


def fusion_of(cell: Cell) -> Fusion:
    """A setting as the study samples it: just what Merge does with the same values."""
    alpha, beta, way = cell.alpha, cell.beta, ACTS[cell.act]

    def scaled(schedule: Schedule) -> Schedule:
        return tuple(Stage(stage.down_to, beta * stage.content, alpha * stage.style) for stage in schedule)

    name = f"{cell.act} {alpha:g} {beta:g}" + (f" at {cell.switch:g}" if cell.switch else "")
    both = fixed(alpha, beta * (DOUBLED if way.one_pass_each and way.by_prompt else 1))
    content, style = fixed(0, beta), fixed(alpha, 0)
    if way.content_first and cell.switch is not None:
        both = scaled(content_first(cell.switch))
        content, style = scaled(content_then_base(cell.switch)), scaled(half_then_full(cell.switch))
    elif way.one_pass_each and way.by_prompt:
        style = scaled(half_then_full(HALF_UNTIL))
    return Fusion(name, "qr", both, way.by_prompt, content, style, way.one_pass_each)


def correlations(study: Study, unit: Unit, grid: Sequence[Cell]) -> dict[str, float]:
    """Spearman's, over the plain sums of a grid: the model's numbers with the reader's."""
    read = [study.readings(fusion_of(cell), unit, ("both", "content", "style", "none")) for cell in grid]
    return {
        "survival : style": rank_correlation([cell.style for cell in grid], [one["both"]["style"] for one in read]),
        "survival : content": rank_correlation(
            [cell.content for cell in grid], [one["both"]["content"] for one in read]
        ),
        "shown : style": rank_correlation([shown(cell)[0] for cell in grid], [one["both"]["style"] for one in read]),
        "shown : content": rank_correlation(
            [shown(cell)[1] for cell in grid], [one["both"]["content"] for one in read]
        ),
        "both shown : H": rank_correlation([both_shown(cell) for cell in grid], [h(one["both"]) for one in read]),
        "- drift : other words": rank_correlation([-cell.drift for cell in grid], [other_words(one) for one in read]),
    }


def rank_correlation(one: Sequence[float | None], other: Sequence[float]) -> float:
    """Spearman's; equal values share their ranks. NaN where one side is all alike."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: Sequence[float | None]) -> Any:
    _, where, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/fusion"), help="of the study; its adapters are used")
    parser.add_argument("--units", choices=list(UNITS), default="tuning")
    parser.add_argument("--bf16", action="store_true", help="as the study was run")
    parser.add_argument("--noises", type=int, default=1, help="the node measures with one")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    torch.set_num_threads(1)
    tuning = args.units == "tuning"
    study = Study(args.folder, TUNING_PICTURES if tuning else PICTURES, half=args.bf16)
    print(json.dumps(run(study, UNITS[args.units], tuning, args.noises), indent=1))
    return 0


def run(study: Study, units: Sequence[Unit], with_grid: bool, noises: int = 1) -> dict[str, Any]:
    """What the program prints.

    Args:
        study, units: whose adapters, and which pairs.
        with_grid: sample the whole grid for the correlations, too.
        noises: see `measured`.
    """
    found: dict[str, Any] = {"units": [unit.name for unit in units]}
    every = {unit: cells(measured(study, unit, noises), GRID, GRID, ACTS) for unit in units}
    if with_grid:
        rows = [correlations(study, unit, [cell for cell in every[unit] if cell.act == "always"]) for unit in units]
        found["rank correlations"] = {name: [round(row[name], 2) for row in rows] for name in rows[0]}
    reference = [numbers(study.readings(Fusion("fixed", both=fixed(*BEST_FIXED)), unit)) for unit in units]
    results = {f"best fixed {BEST_FIXED}": reference}
    chosen = {}
    for title, acts in PROPOSED.items():
        picked = [proposal([cell for cell in every[unit] if cell.act in acts], "balanced") for unit in units]
        chosen[title] = [fusion_of(cell).name for cell in picked]
        results[title] = [numbers(study.readings(fusion_of(cell), unit)) for cell, unit in zip(picked, units)]
        log.info("%s: %s", title, chosen[title])
    found["chosen"] = chosen
    fields = ("h", "words", "joint")
    found["read"] = {
        title: {name: str(interval([getattr(row, name) for row in rows], units)) for name in fields}
        for title, rows in results.items()
    }
    found["minus best fixed"] = {
        title: {name: str(difference(results[title], reference, name, units)) for name in fields} for title in PROPOSED
    }
    return found


if __name__ == "__main__":
    sys.exit(main())
