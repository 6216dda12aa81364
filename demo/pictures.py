"""Procedural pictures: a shape in a colour and a texture, in the middle. All that is drawn stands in the caption.

The training set has 6 shapes, 6 colours and 4 textures. A colour's word names a whole palette, ground included, so that
grounds are something that words decide. Textures repeat every 4 pixels, one token of the model: a longer period has to
be agreed on between tokens, which a model of this size learns badly. Shapes (`NEW_SHAPES`) and styles, each a palette
with a texture of its own (`NEW_STYLES`), are outside of the training set; the first of each is the demo's own. Further
ones that can be drawn are the study's (`benchmarks/fusion/protocol.py`).
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
NEW_SHAPES = (HEART, "ell", "bow", "arch", "tee")
NEW_STYLES = {SUNSET: BARRED, "violet": "hatched", "slate": "slanted", "rose": "grid", "brown": "blocks"}
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
    "violet": ((0.55, 0.35, 0.85), (0.95, 0.90, 0.20), (0.95, 1.00, 0.90)),
    "slate": ((0.45, 0.50, 0.58), (0.98, 0.45, 0.10), (1.00, 0.97, 0.75)),
    "rose": ((0.98, 0.60, 0.66), (0.30, 0.30, 0.50), (0.86, 0.93, 0.86)),
    "brown": ((0.52, 0.30, 0.12), (0.60, 0.95, 0.75), (0.93, 0.87, 0.97)),
    "olive": ((0.52, 0.54, 0.16), (0.98, 0.80, 0.92), (0.87, 0.90, 1.00)),
    "teal": ((0.05, 0.45, 0.45), (1.00, 0.75, 0.35), (0.98, 0.92, 1.00)),
    "wine": ((0.50, 0.06, 0.24), (0.75, 0.92, 1.00), (0.94, 0.98, 0.84)),
    "navy": ((0.08, 0.10, 0.42), (1.00, 0.55, 0.55), (1.00, 0.96, 0.80)),
    "mint": ((0.45, 0.85, 0.65), (0.50, 0.10, 0.30), (0.98, 0.93, 0.90)),
    "coral": ((1.00, 0.45, 0.40), (0.10, 0.35, 0.40), (0.84, 0.98, 0.88)),
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
    if shape == "ell":
        return (torch.maximum(across, down) <= 10.5) & ((x <= -3.5) | (y >= 3.5))
    if shape == "bow":
        return (across <= 11) & (down <= 1.5 + across * 0.8)
    if shape == "arch":
        bend = torch.hypot(x, y + 1)
        legs = (y > -1) & (y <= 10.5) & (across <= 11) & (across >= 5)
        return ((bend <= 11) & (bend >= 5) & (y <= -1)) | legs
    if shape == "tee":
        return ((y <= -3.5) & (y >= -10.5) & (across <= 11)) | ((across <= 3.5) & (down <= 10.5))
    if shape == "moon":
        return (radius <= 11) & (torch.hypot(x - 5, y) >= 8.5)
    if shape == "zed":
        return (torch.maximum(across, down) <= 10.5) & ((down >= 5.5) | ((x + y).abs() <= 4.5))
    if shape == "hourglass":
        return (down <= 11) & (across <= 1.5 + down * 0.8)
    if shape == "cup":
        return (torch.maximum(across, down) <= 10.5) & ((across >= 5) | (y >= 4.5))
    if shape == "arrow":
        return ((y >= -11) & (y <= 0) & (across <= y + 11)) | ((y > 0) & (y <= 10.5) & (across <= 3.5))
    if shape == "stairs":
        return (torch.maximum(across, down) <= 10.5) & (torch.floor((x + 10.5) / 7) >= torch.floor((10.5 - y) / 7))
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
    if texture == "hatched":
        return torch.remainder(x - y, 4) < 2
    if texture == "slanted":
        return torch.remainder(x + y, 4) < 2
    if texture == "grid":
        return (torch.remainder(x, 4) < 1) | (torch.remainder(y, 4) < 1)
    if texture == "blocks":
        return (torch.remainder(x, 4) < 2) & (torch.remainder(y, 4) < 2)
    if texture == "mesh":
        return (torch.remainder(x, 2) < 1) ^ (torch.remainder(y, 2) < 1)
    if texture == "pinstriped":
        return torch.remainder(x, 2) < 1
    if texture == "ridged":
        return torch.remainder(y, 2) < 1
    if texture == "laced":
        return (torch.remainder(x - y, 4) < 1) | (torch.remainder(x + y, 4) < 1)
    if texture == "stepped":
        return torch.remainder(y + (torch.remainder(x, 4) < 2), 4) < 2
    if texture == "pegged":
        return (torch.remainder(x, 2) < 1) & (torch.remainder(y, 4) < 2)
    raise ValueError(f"{texture!r} is not a texture that can be drawn")
