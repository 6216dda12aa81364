"""The study's concepts and extra words as pictures, and the reader that recognises them.

As in the toy: a reader of templates, with nothing to train. Pixels that an extra word may change are left out when
shape, palette and texture are read, and read by themselves.
"""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from demo.pictures import BARRED, COLOURS, HEART, PALETTES, SHAPES, SUNSET, TEXTURES, Look, has_mark, inside_shape
from demo.reader import PLACES
from demo.toy.features import SIZE

from .protocol import CHECK, EXTRAS, TUNING

_SAMPLES = 4  # per pixel and direction, as the toy draws
DARK = (0.05, 0.05, 0.05)  # of the bands; every ground is light
NEW_PALETTES = {
    "violet": ((0.55, 0.35, 0.85), (0.95, 0.90, 0.20), (0.95, 1.00, 0.90)),
    "slate": ((0.45, 0.50, 0.58), (0.98, 0.45, 0.10), (1.00, 0.97, 0.75)),
    "rose": ((0.98, 0.60, 0.66), (0.30, 0.30, 0.50), (0.86, 0.93, 0.86)),
    "brown": ((0.52, 0.30, 0.12), (0.60, 0.95, 0.75), (0.93, 0.87, 0.97)),
}


class Seen(NamedTuple):
    """What the reader finds in a picture."""

    look: Look
    extras: frozenset[str]


def new_words() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Shapes, palettes and textures that the base does not know."""
    units = TUNING + CHECK
    contents, palettes, textures = (
        tuple(dict.fromkeys(words)) for words in zip(*((unit.content, *unit.style) for unit in units))
    )
    return contents, palettes, textures


def _inside(shape: str, x: Tensor, y: Tensor) -> Tensor:
    across, down = x.abs(), y.abs()
    if shape == "ell":
        return (torch.maximum(across, down) <= 10.5) & ((x <= -3.5) | (y >= 3.5))
    if shape == "bow":
        return (across <= 11) & (down <= 1.5 + across * 0.8)
    if shape == "arch":
        radius = torch.hypot(x, y + 1)
        legs = (y > -1) & (y <= 10.5) & (across <= 11) & (across >= 5)
        return ((radius <= 11) & (radius >= 5) & (y <= -1)) | legs
    if shape == "tee":
        return ((y <= -3.5) & (y >= -10.5) & (across <= 11)) | ((across <= 3.5) & (down <= 10.5))
    return inside_shape(shape, x, y)


def _marked(texture: str, x: Tensor, y: Tensor) -> Tensor:
    if texture == "hatched":
        return torch.remainder(x - y, 4) < 2
    if texture == "slanted":
        return torch.remainder(x + y, 4) < 2
    if texture == "grid":
        return (torch.remainder(x, 4) < 1) | (torch.remainder(y, 4) < 1)
    if texture == "blocks":
        return (torch.remainder(x, 4) < 2) & (torch.remainder(y, 4) < 2)
    return has_mark(texture, x, y)


def _palette(name: str) -> Tensor:
    return torch.tensor(NEW_PALETTES.get(name) or PALETTES[name])


@cache
def _coordinates() -> tuple[Tensor, Tensor]:
    steps = (torch.arange(SIZE * _SAMPLES) + 0.5) / _SAMPLES - SIZE / 2
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return columns, rows


def _pooled(mask: Tensor) -> Tensor:
    return functional.avg_pool2d(mask.float()[None], _SAMPLES)[0]


@cache
def _coverage(shape: str, place: tuple[float, float], texture: str) -> tuple[Tensor, Tensor]:
    """Share of each pixel, (SIZE, SIZE), that is the shape's plain part, and its marks."""
    x, y = _coordinates()
    inside = _inside(shape, x - place[0], y - place[1])
    marks = _pooled(inside & _marked(texture, x, y))
    return _pooled(inside) - marks, marks


def draw(look: Look, extra: str = "", place: tuple[float, float] = (0, 0)) -> Tensor:
    """One picture, (3, SIZE, SIZE), 0 to 1, old and new words alike."""
    plain, marks = _coverage(look.shape, place, look.texture)
    fill, mark, behind = (part[:, None, None] for part in _palette(look.colour))
    picture = fill * plain + mark * marks + behind * (1 - plain - marks)
    if extra:
        picture = torch.where(region(extra), torch.tensor(DARK)[:, None, None], picture)
    return picture


@cache
def region(extra: str) -> Tensor:
    """Pixels, (SIZE, SIZE), that an extra word makes dark: a band, one token (4 pixels) wide, along one side."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    if extra == "roofed":
        mask[:4] = True
    elif extra == "floored":
        mask[-4:] = True
    elif extra == "walled":
        mask[:, :4] = True
    else:
        raise ValueError(f"{extra!r} is not a word of {EXTRAS}")
    return mask


def read(pictures: Tensor) -> list[Seen]:
    """What each picture, (batch, 3, SIZE, SIZE), 0 to 1, looks like most: nearest template, mean square distance."""
    looks, references, squares, kept = _references()
    flat = pictures[:, :, kept].flatten(1)
    nearest = (squares - 2 * flat @ references.T).argmin(1).tolist()
    found = [looks[index // len(PLACES)] for index in nearest]
    return [Seen(look, _extras(picture, look.colour)) for look, picture in zip(found, pictures)]


def _extras(picture: Tensor, colour: str) -> frozenset[str]:
    """The extra words whose pixels are nearer to DARK than to the palette's ground."""
    dark, ground = torch.tensor(DARK), _palette(colour)[2]
    means = {extra: picture[:, region(extra)].mean(1) for extra in EXTRAS}
    return frozenset(extra for extra, mean in means.items() if torch.dist(mean, dark) < torch.dist(mean, ground))


@cache
def _references() -> tuple[Sequence[Look], Tensor, Tensor, Tensor]:
    """Looks; templates (looks x places, pixels), their sums of squares; the pixels that are compared, (SIZE, SIZE)."""
    contents, palettes, textures = new_words()
    assert {HEART, SUNSET, BARRED} <= {*contents, *palettes, *textures}
    looks = [Look(*parts) for parts in itertools.product(SHAPES + contents, COLOURS + palettes, TEXTURES + textures)]
    kept = ~torch.stack([region(extra) for extra in EXTRAS]).any(0)
    templates = torch.stack([draw(look, "", place)[:, kept] for look in looks for place in PLACES]).flatten(1)
    return looks, templates, templates.square().sum(1), kept
