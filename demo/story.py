"""The whole story on a toy FLUX: train a content and a style on one picture each, merge, and look.

python -m demo.story [--out demo_results] [--pair heart-sunset] [--no-wait] [--headless]

In a ComfyUI where one is found (COMFYUI_PATH, or ~/ComfyUI), in a scratch folder: the graph trains, merges and draws
the sheet, and the page stays open. Without one: the same from the shell. Either way `--out` gets the two pictures, the
two adapters, the alpha x beta sheet, four prompts drawn by a plain sum and by one pass each, the similarity picture,
and the numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import nn
from tqdm import tqdm

from demo.golden import installed_host
from qrlora_core import Adapter, MergeRecipe, merge_acting, open_adapter, similarity_report, sweep
from qrlora_plots import contact_sheet, similarity_png

from . import in_comfyui as demo_host
from .concepts import ACT, DEFAULT_PAIR, FIT, MERGED_PROMPT, MORE, PAIRS, SUM, Pair, Settings, fit, to_image
from .fused import Fused
from .judge import judge, summary, verdict
from .model import load_toy
from .server import WorkflowError

GRID = "0, 0.25, 0.5, 0.75, 1"
SHEET, BESIDE, SIMILARITY, NUMBERS = "sheet.png", "beside.png", "similarity.png", "numbers.json"
SEED = 15  # chosen among 32 for the default pair, see `demo.noise`
ASKED = (MERGED_PROMPT, "a <c> in blue dotted style", "a square in <s> style", "a ring in green checked style")


class Adapters(NamedTuple):
    style: Adapter
    content: Adapter


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when both adapters do what they were trained for, 1 when not, 2 on a wrong setting."""
    contents, styles = (dict.fromkeys(parts) for parts in zip(*(name.split("-") for name in PAIRS)))
    parser = argparse.ArgumentParser(
        prog="dev.py demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder of the results")
    parser.add_argument(
        "--pair",
        default=DEFAULT_PAIR,
        choices=list(PAIRS),
        metavar="CONTENT-STYLE",
        help=f"what is learned ({DEFAULT_PAIR}): one of {', '.join(contents)}; and one of {', '.join(styles)}",
    )
    parser.add_argument("--no-wait", action="store_true", help="end afterwards instead of keeping ComfyUI open")
    parser.add_argument("--headless", action="store_true", help="do without ComfyUI even where one is found")
    parser.add_argument("--steps", type=int, help="training steps of each adapter (fewer: a quick look)")
    parser.add_argument("--pictures", type=int, default=48, help="pictures that the reader judges per experiment")
    args = parser.parse_args(argv)
    pair = PAIRS[args.pair]
    wait = not args.no_wait and sys.stdin.isatty()
    try:
        host = None if args.headless else installed_host()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    changes = {} if args.steps is None else {"steps": args.steps}

    def train_outside() -> None:
        train(args.out, changes, pair)

    def numbers(with_sheet: bool = False) -> bool:
        result = show(args.out, args.pictures, with_sheet, pair)
        print(f"\ndone in {time.monotonic() - start:.0f} s", flush=True)
        return result

    try:
        if host is None:
            why = "" if args.headless else ": none was found (COMFYUI_PATH may name one)"
            print(f"without ComfyUI{why}", flush=True)
            train_outside()
            good = numbers(with_sheet=True)
        else:
            os.environ["COMFYUI_PATH"] = str(host)  # where the host's part looks for an interpreter
            settings = {**FIT, **MORE, **changes}
            good = demo_host.run(host, args.out, settings, SEED, GRID, train_outside, numbers, wait, pair)
    except subprocess.CalledProcessError as error:  # the trainer has said why
        return error.returncode
    except WorkflowError as error:
        print(f"\nThe workflow stopped. {error}\nlog      {args.out / 'comfyui.log'}", file=sys.stderr)
        return 1
    return 0 if good else 1


def train(out: Path, changes: Settings, pair: Pair = PAIRS[DEFAULT_PAIR]) -> None:
    """Train both adapters by the trainer's own command; `changes` are settings other than the demo's."""
    with tempfile.TemporaryDirectory(prefix="qr-lora-demo-") as scratch:
        for concept in (pair.content, pair.style):
            print(f"\ntraining {concept.name} on one picture, {concept.prompt!r}", flush=True)
            fit(concept, out, Path(scratch), **changes)


def opened(out: Path, pair: Pair = PAIRS[DEFAULT_PAIR]) -> Adapters:
    """The adapters of a demo's folder."""
    return Adapters(*(open_adapter(out / f"{concept.name}.safetensors") for concept in pair))


def show(out: Path, pictures: int, with_sheet: bool = True, pair: Pair = PAIRS[DEFAULT_PAIR]) -> bool:
    """Sheets, similarity picture and numbers of the adapters in `out`; whether each does what it was trained for."""
    adapters = opened(out, pair)
    model = load_toy()
    if with_sheet:
        sheet(model, adapters).save(out / SHEET)
    beside(model, adapters).save(out / BESIDE)
    similarity(adapters, out / SIMILARITY)
    rows = judge(model, *adapters, pictures, lambda work: tqdm(work, desc="reading samples", unit="experiment"), pair)
    (out / NUMBERS).write_text(json.dumps([row._asdict() for row in rows], indent=1), encoding="utf-8")
    wide = max(len(row.title) for row in rows)
    print(
        f"\n{'prompts and adapters':<{wide}} {'pictures':>8} {'new content':>12} {'new style':>10} {'other words':>12}"
    )
    for row in rows:
        print(f"{row.title:<{wide}} {row.pictures:>8} {row.content:>12.0%} {row.style:>10.0%} {row.rest:>12.0%}")
    print(f"\n{summary(rows)}\n")
    for name in (SHEET, BESIDE, SIMILARITY, NUMBERS):
        print(out / name, flush=True)
    good = verdict(rows)
    if not good:
        print("\nalone, each should show in 90 %, and nothing without them in 30 %; more --steps may help", flush=True)
    return good


def sheet(model: nn.Module, adapters: Adapters) -> Image.Image:
    """One noise at every alpha and beta of the grid, labelled."""
    labels, pictures = grid_pictures(model, adapters, GRID)
    return contact_sheet(pictures, labels, title=f"{MERGED_PROMPT}; alpha: style, beta: content").image


def grid_pictures(model: nn.Module, adapters: Adapters, grid: str) -> tuple[list[str], list[Image.Image]]:
    """Labels and pictures of the merged prompt at every pair of the grid's numbers."""
    fused = Fused(model, adapters)
    cells = sweep(MergeRecipe.of(adapters.style), grid, MergeRecipe.of(adapters.content), grid, act=ACT)
    pictures = []
    for cell in tqdm(cells, desc="alpha x beta", unit="picture"):
        pictures.append(to_image(fused.sample(cell.recipe, [MERGED_PROMPT], [SEED])[0]))
    return [cell.label for cell in cells], pictures


def beside(model: nn.Module, adapters: Adapters) -> Image.Image:
    """Four prompts from one noise: the model alone, both adapters as a plain sum, and with one pass each."""
    fused = Fused(model, adapters)
    columns = {"no adapter": (0.0, SUM), "plain sum": (1.0, SUM), "one pass each": (1.0, ACT)}
    labels, pictures = [], []
    for prompt in ASKED:
        for column, (strength, act) in columns.items():
            parts = MergeRecipe.of(adapters.style), MergeRecipe.of(adapters.content)
            recipe = merge_acting(parts[0], strength, parts[1], strength, act=act)
            pictures.append(to_image(fused.sample(recipe, [prompt], [SEED])[0]))
            labels.append(f"prompt={prompt}, merge={column}")
    return contact_sheet(pictures, labels).image


def similarity(adapters: Adapters, path: Path) -> None:
    """The picture of how alike the two adapters are, layer by layer."""

    path.write_bytes(similarity_png(similarity_report(*adapters)))


if __name__ == "__main__":
    sys.exit(main())
