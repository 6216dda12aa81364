"""Reads samples of the toy FLUX, and draws a sheet of them.

    python -m demo.evaluate [--weights toy/toy_flux.safetensors] [--sheet toy_samples.png]

Combinations that the pre-training saw must be read right in 90 % of the samples; held-out ones are only reported.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import nn

from benchmarks.common import machine
from qrlora_plots import contact_sheet

from .concepts import to_image
from .model import WEIGHTS, load_toy, sample
from .pictures import COLOURS, SHAPES, TEXTURES, Look, caption, combinations
from .reader import accuracy

ENOUGH = 0.9
FIRST_SEED = 100


def main() -> int:
    """0 when enough samples of the seen combinations are read right in all three words, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--samples", type=int, default=4, help="of each combination")
    parser.add_argument("--sheet", type=Path, help="also write a sheet of samples")
    args = parser.parse_args()
    print(machine())
    model = load_toy(args.weights)
    print(f"{'combinations':<14} samples  shape colour texture   all")
    shares = []
    for title, looks in zip(("seen", "held out"), combinations()):
        many = looks * args.samples
        shares.append(sampled_accuracy(model, many))
        print(f"{title:<14} {len(many):>7}", *(f"{share:6.3f}" for share in shares[-1].values()))
    if args.sheet:
        sheet(model).save(args.sheet)
        print(args.sheet)
    return 0 if shares[0]["all"] >= ENOUGH else 1


def sampled_accuracy(model: nn.Module, looks: Sequence[Look], first_seed: int = FIRST_SEED) -> dict[str, float]:
    """How one sample for each look, by its caption and a seed of its own, is read; see `reader.accuracy`."""
    return accuracy(sample(model, [caption(look) for look in looks], range(first_seed, first_seed + len(looks))), looks)


def sheet(model: nn.Module) -> Image.Image:
    """Samples of every shape in every colour, with two textures for each."""
    styles = [(colour, TEXTURES[(number + 2 * half) % 4]) for half in (0, 1) for number, colour in enumerate(COLOURS)]
    looks = [Look(shape, *style) for shape in SHAPES for style in styles]
    pictures = sample(model, [caption(look) for look in looks], range(len(looks)))
    labels = [f"shape={look.shape}, style={look.colour} {look.texture}" for look in looks]
    return contact_sheet([to_image(picture) for picture in pictures], labels).image


if __name__ == "__main__":
    sys.exit(main())
