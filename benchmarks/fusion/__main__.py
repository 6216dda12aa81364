"""How well a content and a style adapter of one picture each go together, on the toy FLUX.

    python -m benchmarks.fusion [--folder runs/fusion] [--quick] [--bf16]

Trains the adapters, chooses what the methods leave open on tuning units, runs the check units, and
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

from . import learnt, optimizer, report
from .judged import judged_last
from .measures import numbers
from .protocol import CHECK, FINAL, LATER, PICTURES, TUNING, TUNING_PICTURES, VERSION, Unit
from .store import Study, trained
from .tuning import PASSES, QUIET_PASSES, REFERENCE, single_adapters, tuned

log = logging.getLogger(__name__)
LEFT_OUT = ("lora", "lora8", "qr40", "qr60", "preserve", "yielding", "attention", "small", "null", "classes")
TRIED = ("yielding", "attention", "small", "classes")  # on tuning units only
JUDGED = {"check": CHECK, "later": LATER, "final": FINAL, "all": CHECK + LATER + FINAL}
QUICK = {"pictures": 6, "adapter_steps": 10}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/fusion"), help="where everything is kept")
    parser.add_argument("--quick", action="store_true", help="untrained in minutes: whether the program works")
    parser.add_argument(
        "--units", choices=list(JUDGED), default="check", help="judge by these; but for check with nothing chosen anew"
    )
    parser.add_argument("--until", choices=("tuning", "check"), default="check", help="stop there")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="RECIPE", help=f"leave out some of {', '.join(LEFT_OUT)}"
    )
    parser.add_argument(
        "--optimizer", type=Path, metavar="FOLDER", help="a clone of ComfyUI-LoRA-Optimizer, to be compared with"
    )
    parser.add_argument("--learnt", action="store_true", help="also a merge that is learnt, some minutes for each unit")
    parser.add_argument("--threads", type=int, default=1, help="of torch; layers this small gain little from more")
    parser.add_argument("--bf16", action="store_true", help="products in bf16: faster where the processor knows it")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    torch.set_num_threads(args.threads)
    print(f"{machine()}; version {__version__}, protocol {VERSION}, {datetime.date.today()}")
    study = Study(args.folder, half=args.bf16, **(QUICK if args.quick else {"pictures": PICTURES}))
    judged = JUDGED[args.units]
    tuning, check = (TUNING[:1], judged[:2]) if args.quick else (TUNING, judged)
    if args.optimizer is None:
        log.info("LoRA-Optimizer is left out: --optimizer names no clone of it")
    else:
        study.joints[optimizer.NAME] = optimizer.Optimizer(args.optimizer, check)
    if args.learnt:
        study.joints[learnt.NAME] = learnt.teach
    return run(study, tuning, check, args.until, args.without, args.units)


def run(
    study: Study,
    tuning: Sequence[Unit],
    check: Sequence[Unit],
    until: str = "check",
    without: Sequence[str] = (),
    name: str = "check",
) -> int:
    """Tune and check one method after another, each from where it was left; tables at the end.

    Args:
        study: where everything is kept.
        tuning, check: what is chosen on, and what is judged by.
        until: see `main`.
        without: recipes that are left out.
        name: of the units in JUDGED; for all but "check" nothing is chosen anew, and results have files of their own.
    """
    quick_look = study.with_pictures(TUNING_PICTURES)
    fusions, results = [], {}
    anew = name == "check"
    if anew:
        methods = tuned(quick_look, tuning, without)
    else:
        whole = name == "final" and len(tuning) == len(TUNING)  # 120 candidates are nothing for a quick look
        methods = judged_last(quick_look, (*tuning, *LATER) if whole else (), without)
    for fusion in methods:
        fusions.append(fusion)
        if until == "check":
            results[fusion.name] = [numbers(study.readings(fusion, unit)) for unit in check]
            log.info("%s on check units: %s", fusion.name, report.row(results[fusion.name], check))
    print(f"\nChosen on {len(tuning)} tuning units:\n\n{report.chosen(fusions)}\n")
    if anew:
        alone = single_adapters(study.with_pictures(2 * study.pictures), tuning, without)
        print(f"Adapters alone, on tuning units:\n\n{report.curve(alone)}\n", flush=True)
    if until == "tuning":
        return 0
    used = list(dict.fromkeys(one.adapters for one in fusions))
    print(f"Adapters of the check units:\n\n{report.fidelity(list(trained(study, check, used)))}\n")
    alone = single_adapters(study.with_pictures(2 * study.pictures), check, {*without, *TRIED})
    print(f"Adapters alone, on check units:\n\n{report.curve(alone)}\n", flush=True)
    print(f"On {len(check)} check units:\n\n{report.table(results, check)}\n")
    for reference in (REFERENCE, PASSES, *([QUIET_PASSES] if QUIET_PASSES in results else [])):
        print(f"{report.comparison(results, reference, check)}\n")
    facts = {"version": VERSION, "date": str(datetime.date.today()), "pack": __version__, "machine": machine()}
    facts["pictures"] = study.pictures
    suffix = "" if anew else f"-{name}"
    print(report.save(study.folder / f"results{suffix}.json", check, results, facts))
    print(report.picture(results, check, study.folder / f"fusion{suffix}.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
