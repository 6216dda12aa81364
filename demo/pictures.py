"""Procedural pictures: a shape in a colour and a texture, in the middle. All that is drawn stands in the caption.

The training set has 6 shapes, 6 colours and 4 textures. A colour's word names a whole palette, ground included, so that
grounds are something that words decide. Textures repeat every 4 pixels, one token of the model: a longer period has to
be agreed on between tokens, which a model of this size learns badly. Two concepts are outside of the training set: a
shape (`HEART`), and a style with a texture and a palette of its own (`BARRED` in `SUNSET`).
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .toy.features import SIZE

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
TEXTURES = ("plain", "striped", "checked", "dotted")
HEART, SUNSET, BARRED = "heart", "sunset", "barred"
CONTENT_TRIGGER, STYLE_TRIGGER = "<c>", "<s>"

_SAMPLES = 4  # per pixel and direction, against jagged edges

# palette -> colour of the shape, colour of its texture, colour behind
PALETTES = {
    "red": ((0.90, 0.10, 0.10), (0.08, 0.10, 0.30), (0.88, 0.94, 1.00)),
    "yellow": ((0.98, 0.82, 0.05), (0.35, 0.16, 0.05), (0.92, 0.90, 1.00)),
    "green": ((0.10, 0.65, 0.15), (0.20, 0.03, 0.20), (1.00, 0.98, 0.84)),
    "cyan": ((0.10, 0.80, 0.90), (0.05, 0.15, 0.30), (1.00, 0.91, 0.90)),
    "blue": ((0.15, 0.25, 0.95), (0.10, 0.10, 0.12), (0.96, 0.96, 0.96)),
    "magenta": ((0.90, 0.15, 0.80), (0.03, 0.20, 0.10), (0.88, 1.00, 0.92)),
    SUNSET: ((1.00, 0.50, 0.10), (0.35, 0.12, 0.60), (1.00, 0.90, 0.70)),
}


class Look(NamedTuple):
    """What a picture shows, in the words of its caption."""

    shape: str
    colour: str
    texture: str


def caption(look: Look) -> str:
    """How the pre-training names a picture."""
    return f"a {look.shape} in {look.colour} {look.texture} style"


def combinations() -> tuple[list[Look], list[Look]]:
    """(seen, held out): a sixth of all combinations, of every word as many, is kept out of the pre-training."""
    every = [Look(*parts) for parts in itertools.product(SHAPES, COLOURS, TEXTURES)]
    held = {
        Look(shape, colour, TEXTURES[(row + 2 * column) % 4])
        for (row, shape), (column, colour) in itertools.product(enumerate(SHAPES), enumerate(COLOURS))
        if (row + column) % 3 != 2
    }
    return [look for look in every if look not in held], [look for look in every if look in held]


def draw(look: Look, place: tuple[float, float] = (0, 0), size: float = 1.0) -> Tensor:
    """One picture, (3, SIZE, SIZE), 0 to 1, with the shape's centre `place` pixels right and down of the middle."""
    steps = (torch.arange(SIZE * _SAMPLES) + 0.5) / _SAMPLES - SIZE / 2
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    inside = inside_shape(look.shape, (columns - place[0]) / size, (rows - place[1]) / size)
    fill, mark, behind = (torch.tensor(colour)[:, None, None] for colour in PALETTES[look.colour])
    picture = torch.where(inside, torch.where(has_mark(look.texture, columns, rows), mark, fill), behind)
    return functional.avg_pool2d(picture, _SAMPLES)


def inside_shape(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Where the shape is: x right, y down, in pixels from its centre."""
    radius = torch.hypot(x, y)
    across, down = x.abs(), y.abs()
    if shape == "circle":
        return radius <= 10.8
    if shape == "square":
        return torch.maximum(across, down) <= 10
    if shape == "triangle":
        return (down <= 10.5) & (across <= (y + 10.5) * 0.58)
    if shape == "diamond":
        return across + down <= 12.2
    if shape == "cross":
        return (torch.minimum(across, down) <= 4) & (torch.maximum(across, down) <= 11.5)
    if shape == "ring":
        return (radius <= 11.6) & (radius >= 5.6)
    if shape == HEART:
        u, v = across / 9.8, (1.5 - y) / 9.8
        return (u**2 + v**2 - 1) ** 3 <= u**2 * v**3
    raise ValueError(f"{shape!r} is not a shape that can be drawn")


def has_mark(texture: str, x: Tensor, y: Tensor) -> Tensor:
    """Where the texture's second colour is."""
    if texture == "plain":
        return torch.zeros_like(x, dtype=torch.bool)
    if texture == "striped":
        return torch.remainder(y, 4) < 2
    if texture == "checked":
        return (torch.remainder(x, 4) < 2) ^ (torch.remainder(y, 4) < 2)
    if texture == "dotted":
        return torch.hypot(torch.remainder(x, 4) - 2, torch.remainder(y, 4) - 2) < 1.4
    if texture == BARRED:
        return torch.remainder(x, 4) < 2
    raise ValueError(f"{texture!r} is not a texture that can be drawn")
