"""The study's concepts as pictures, and the reader that recognises them: of templates, as the toy's own."""

import itertools
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from demo.pictures import COLOURS, PALETTES, SHAPES, TEXTURES, Look, has_mark, inside_shape
from demo.reader import PLACES
from demo.toy.features import SIZE

from .protocol import CHECK, FINAL, LATER, TUNING, Unit

_SAMPLES = 4  # per pixel and direction, as the toy draws


def new_words(units: Sequence[Unit] = TUNING + CHECK) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Shapes, palettes and textures that the base does not know."""
    contents, palettes, textures = (
        tuple(dict.fromkeys(words)) for words in zip(*((unit.content, *unit.style) for unit in units))
    )
    return contents, palettes, textures


def _palette(name: str) -> Tensor:
    return torch.tensor(PALETTES[name])


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
    inside = inside_shape(shape, x - place[0], y - place[1])
    marks = _pooled(inside & has_mark(texture, x, y))
    return _pooled(inside) - marks, marks


def draw(look: Look, place: tuple[float, float] = (0, 0)) -> Tensor:
    """One picture, (3, SIZE, SIZE), 0 to 1, old and new words alike."""
    plain, marks = _coverage(look.shape, place, look.texture)
    fill, mark, behind = (part[:, None, None] for part in _palette(look.colour))
    return fill * plain + mark * marks + behind * (1 - plain - marks)


def read(pictures: Tensor, unit: Unit | None = None) -> list[Look]:
    """What each picture, (batch, 3, SIZE, SIZE), 0 to 1, looks like most: nearest template, mean square distance.

    Args:
        unit: decides which new words can be read: those of tuning units and of the nine units that it is one of.
    """
    nine = next((units for units in (LATER, FINAL) if unit in units), CHECK)
    looks, templates, squares = _templates(TUNING + nine)
    nearest = (squares - 2 * pictures.flatten(1) @ templates.T).argmin(1).tolist()
    return [looks[index // len(PLACES)] for index in nearest]


@cache
def _templates(units: tuple[Unit, ...]) -> tuple[Sequence[Look], Tensor, Tensor]:
    """Looks; templates (looks x places, pixels); the templates' sums of squares."""
    contents, palettes, textures = new_words(units)
    looks = [Look(*parts) for parts in itertools.product(SHAPES + contents, COLOURS + palettes, TEXTURES + textures)]
    templates = torch.stack([draw(look, place) for look in looks for place in PLACES]).flatten(1)
    return looks, templates, templates.square().sum(1)
