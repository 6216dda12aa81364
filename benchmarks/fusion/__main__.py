"""How well a content and a style adapter of one picture each go together, on the toy FLUX.

    python -m benchmarks.fusion [--folder runs/fusion] [--quick] [--bf16]

Trains the study's base and adapters, chooses what the methods leave open on tuning units, runs the check units, and
prints tables; `results.json` and `fusion.png` go into the folder. What is there already is not made again. What is
fixed beforehand stands in `protocol.py`.
"""

import argparse
import datetime
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import machine
from qrlora_core import __version__

from . import report
from .base import Lesson
from .learn import RECIPES
from .measures import numbers
from .protocol import CHECK, PICTURES, TUNING, VERSION, Unit
from .store import Study, trained
from .tuning import tuned

QUICK = {"pictures": 6, "lessons": (Lesson(10, 1 / 3, 3),), "adapter_steps": 10}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/fusion"), help="where everything is kept")
    parser.add_argument("--quick", action="store_true", help="untrained in minutes: whether the program works")
    parser.add_argument("--until", choices=("base", "adapters", "tuning", "check"), default="check", help="stop there")
    parser.add_argument("--threads", type=int, default=1, help="of torch; layers this small gain little from more")
    parser.add_argument("--bf16", action="store_true", help="products in bf16: faster where the processor knows it")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    torch.set_num_threads(args.threads)
    print(f"{machine()}; version {__version__}, protocol {VERSION}, {datetime.date.today()}")
    study = Study(args.folder, half=args.bf16, **(QUICK if args.quick else {"pictures": PICTURES}))
    tuning, check = (TUNING[:1], CHECK[:2]) if args.quick else (TUNING, CHECK)
    return run(study, tuning, check, args.until)


def run(study: Study, tuning: Sequence[Unit], check: Sequence[Unit], until: str = "check") -> int:
    """The steps of the study, each from where it was left."""
    if until == "base":
        return 0
    recipes = ["qr", "lora", "lora8", "preserve"]
    rows = [(recipe, side, unit.name, made) for recipe, side, unit, made in trained(study, [*tuning, *check], recipes)]
    print(_fidelity(rows))
    if until == "adapters":
        return 0
    fusions = tuned(study, tuning, ["preserve"])
    print(report.chosen(fusions))
    print("\nOn tuning units:\n")
    print(report.table({one.name: [numbers(study.readings(one, unit)) for unit in tuning] for one in fusions}))
    if until == "tuning":
        return 0
    results = {one.name: [numbers(study.readings(one, unit)) for unit in check] for one in fusions}
    print("\nOn check units:\n")
    print(report.table(results))
    print()
    print(report.comparison(results, "best fixed alpha, beta"))
    facts = {"date": str(datetime.date.today()), "pack": __version__, "machine": machine(), "pictures": study.pictures}
    print(report.save(study.folder, check, results, facts))
    print(report.picture(results, study.folder / "fusion.png"))
    return 0


def _fidelity(rows: Sequence[tuple[str, str, str, object]]) -> str:
    """Steps of the single adapters and how often they are read right, by recipe and side."""
    lines = ["| adapters | side | steps | read alone | lowest |", "|---|---|---|---|---|"]
    for recipe in dict.fromkeys(row[0] for row in rows):
        for side in ("content", "style"):
            made = [row[3] for row in rows if row[:2] == (recipe, side)]
            steps, shares = [one.steps for one in made], [one.fidelity for one in made]
            lines.append(
                f"| {recipe} (rank {RECIPES[recipe].rank}) | {side} | {sum(steps) / len(steps):.0f} "
                f"| {sum(shares) / len(shares):.2f} | {min(shares):.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
