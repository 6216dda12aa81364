"""Reads shape, colour and texture from pictures: the nearest of all drawn references, in mean square difference.

    python -m demo.reader    its accuracy on drawn pictures, clean and spoilt

References are every shape x palette x texture, the new ones of a pair included and mixed with the old ones, at nine
places. There is nothing to train and no file to keep.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from .pictures import BARRED, COLOURS, HEART, SHAPES, SUNSET, TEXTURES, Look, draw

PLACES = tuple(itertools.product((-2, 0, 2), repeat=2))  # of a shape's centre, pixels right and down of the middle


def looks_with(new: Look) -> tuple[Look, ...]:
    """Everything that a picture can be read as where shape, palette and texture of `new` are known beside the old."""
    words = (SHAPES + (new.shape,), COLOURS + (new.colour,), TEXTURES + (new.texture,))
    return tuple(Look(*parts) for parts in itertools.product(*words))


LOOKS = looks_with(Look(HEART, SUNSET, BARRED))


def read(pictures: Tensor, looks: tuple[Look, ...] = LOOKS) -> list[Look]:
    """Which of `looks` each picture, (batch, 3, 32, 32), 0 to 1, looks like most."""
    references, squares = _references(looks)
    distance = squares - 2 * pictures.flatten(1) @ references.T  # the pictures' own squares decide nothing
    return [looks[index // len(PLACES)] for index in distance.argmin(1).tolist()]


@cache
def _references(looks: tuple[Look, ...]) -> tuple[Tensor, Tensor]:
    """All references, (looks x places, pixels), and the sum of squares of each."""
    references = torch.stack([draw(look, place) for look in looks for place in PLACES]).flatten(1)
    return references, references.square().sum(1)


def accuracy(pictures: Tensor, looks: Sequence[Look]) -> dict[str, float]:
    """Shares of pictures whose shape, colour, texture, and all three are read as `looks` say."""
    found = read(pictures)
    shares = {
        field: sum(getattr(one, field) == getattr(other, field) for one, other in zip(found, looks)) / len(looks)
        for field in Look._fields
    }
    return shares | {"all": sum(one == other for one, other in zip(found, looks)) / len(looks)}


def spoilers(generator: torch.Generator) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways in which a sample may differ from a drawing."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    return {
        "clean": lambda pictures: pictures,
        "noise of 0.2": lambda pictures: pictures + 0.2 * torch.randn(pictures.shape, generator=generator),
        "blurred by 3 x 3": lambda pictures: functional.conv2d(
            functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), kernel, groups=3
        ),
        "contrast of 0.7": lambda pictures: 0.7 * pictures + 0.15,
    }


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    print(f"{'pictures':<34} shape colour texture   all")
    drawn = {"as trained": ((0, 0), 1.0), "moved by a pixel": ((0.5, -1.5), 1.0), "7 % smaller": ((0, 0), 0.93)}
    for title, (place, size) in drawn.items():
        pictures = torch.stack([draw(look, place, size) for look in LOOKS])
        for way, spoil in spoilers(generator).items():
            shares = accuracy(spoil(pictures), LOOKS)
            print(f"{title + ', ' + way:<34}", *(f"{share:6.3f}" for share in shares.values()))


if __name__ == "__main__":
    main()
