"""From which noise the sheet's corner is its best picture: which alpha and beta come nearest to what was asked for.

    python -m demo.noise [FOLDER] [--noises 32] [--act "by prompt, one pass each"]

FOLDER holds the adapters of a demo; without one, those that ship with the pack are used. Nearest is the mean square
distance to the drawing of both concepts, at the place where it fits best.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from qrlora_core import ACTS, MergeRecipe, open_adapter, sweep

from .concepts import ACT, DEFAULT_PAIR, MERGED_PROMPT, PAIRS
from .fused import Fused
from .model import load_toy
from .pictures import Look, draw
from .reader import PLACES
from .toy.files import FOLDER

GRID = "0, 0.25, 0.5, 0.75, 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--pair", default=DEFAULT_PAIR, choices=list(PAIRS), metavar="CONTENT-STYLE")
    parser.add_argument("--noises", type=int, default=32)
    parser.add_argument("--act", default=ACT, choices=list(ACTS))
    args = parser.parse_args()
    pair, seeds = PAIRS[args.pair], range(args.noises)
    style, content = (open_adapter(args.folder / f"{concept.name}.safetensors") for concept in pair)
    fused = Fused(load_toy(), (style, content))
    found = {}
    for cell in sweep(MergeRecipe.of(style), GRID, MergeRecipe.of(content), GRID, act=args.act):
        pictures = fused.sample(cell.recipe, [MERGED_PROMPT] * len(seeds), seeds)
        found[cell.label] = distances(pictures, pair.look)
        print(f"{cell.label:<24} mean square distance {float(found[cell.label].mean()):.4f}")
    best = [min(found, key=lambda label: float(found[label][seed])) for seed in seeds]
    print(
        *(f"nearest at {label}: {count} of {len(best)} noises" for label, count in Counter(best).most_common()),
        sep="\n",
    )
    corner = list(found)[-1]
    print(f"noises where {corner} is nearest: {[seed for seed in seeds if best[seed] == corner]}")


def distances(pictures: Tensor, look: Look) -> Tensor:
    """How far each picture, (batch, 3, 32, 32), is from the drawing of a look, (batch,)."""
    drawn = torch.stack([draw(look, place) for place in PLACES])
    return (pictures[:, None] - drawn).square().mean((2, 3, 4)).amin(1)


if __name__ == "__main__":
    main()
