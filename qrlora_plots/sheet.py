"""Many pictures as one, with the numbers they were made with at its edges."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from .text import PAPER, SMALLEST, draw_line, text_size

# Pictures smaller than this are enlarged by a whole factor: nobody can compare stamps
_SMALLEST_PICTURE = 160
_FRAME = (136, 136, 136)
_WIDEST_LABEL = 30  # of a row, in letter heights: a longer one is shortened and does not widen the sheet for all


class Cell(NamedTuple):
    """One picture of a sheet: where it is in the grid, its label, and its pixels (left, top, right, bottom)."""

    row: int
    column: int
    label: str
    box: tuple[int, int, int, int]


class ContactSheet(NamedTuple):
    """The sheet.

    Attributes:
        image: RGB.
        cells: in the order of the pictures.
        row_labels, column_labels: what stands at the left and at the top; empty when every picture has its own label.
    """

    image: Image.Image
    cells: tuple[Cell, ...]
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]


class _Grid(NamedTuple):
    places: tuple[tuple[int, int], ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def contact_sheet(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    *,
    columns: int = 0,
    max_size: int = 512,
    title: str = "",
) -> ContactSheet:
    """Put labelled pictures into a grid.

    Labels that all read "name=value, name=value" with the same two names, and that are a whole grid, become axes: the
    first name downwards, the second to the right. Any others are written below their pictures.

    Args:
        images: at least one; they may differ in size.
        labels: one for each picture.
        columns: pictures in a row, 0 for about as many as there are rows. Not used with axes.
        max_size: longest side of a picture on the sheet in pixels; larger ones are reduced.
        title: a line at the top.

    Raises:
        ValueError: no pictures, or not as many labels.
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"{len(images)} pictures and {len(labels)} labels; there must be one label for each picture")
    pictures = [_sized(image.convert("RGB"), max_size) for image in images]
    grid = label_axes(labels)
    if grid is None:
        across = min(columns, len(labels)) if columns > 0 else math.ceil(math.sqrt(len(labels)))
        places = tuple(divmod(index, across) for index in range(len(labels)))
        return _draw(pictures, labels, _Grid(places, (), ()), title)
    return _draw(pictures, labels, _Grid(*grid), title)


def label_axes(
    labels: Sequence[str],
) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...], tuple[str, ...]] | None:
    """Read labels as the two axes of a grid.

    Where labels name more than two things, those that are the same on every picture are left out; of what then is
    left, the last stands in the columns and all others in the rows.

    Returns:
        (row, column) of each label, the row labels and the column labels, in order of appearance; None when the labels
        are no grid.
    """
    named = [parts for label in labels if (parts := _named_values(label))]
    if len(named) != len(labels) or len({tuple(name for name, _ in parts) for parts in named}) != 1:
        return None
    kept = _axes(named)
    label_pairs = [
        tuple(", ".join(f"{parts[index][0]} = {parts[index][1]}" for index in side) for side in (kept[:-1], kept[-1:]))
        for parts in named
    ]
    rows, columns = (tuple(dict.fromkeys(pair[side] for pair in label_pairs)) for side in (0, 1))
    places = tuple((rows.index(row), columns.index(column)) for row, column in label_pairs)
    if len(set(places)) != len(places) or len(places) != len(rows) * len(columns):
        return None
    return places, rows, columns


def _axes(named: list[tuple[tuple[str, str], ...]]) -> list[int]:
    """Which of the named values make the axes, at least two of them."""
    axes = list(range(len(named[0])))
    for index in list(axes):
        if len(axes) > 2 and len({parts[index] for parts in named}) == 1:
            axes.remove(index)
    return axes


def _named_values(label: str) -> tuple[tuple[str, str], ...] | None:
    """((name, value), ...) of "name=value, name=value" with two or three of them; None for any other text."""
    parts = [tuple(word.strip() for word in part.split("=")) for part in label.split(",", 3)]
    if len(parts) not in (2, 3) or any(len(part) != 2 or not all(part) for part in parts):
        return None
    return tuple((name, value) for name, value in parts)


def _draw(pictures: Sequence[Image.Image], labels: Sequence[str], grid: _Grid, title: str) -> ContactSheet:
    rows, columns = (1 + max(place[side] for place in grid.places) for side in (0, 1))
    width, height = (max(picture.size[side] for picture in pictures) for side in (0, 1))
    # Letters grow with the sheet, because a large sheet is looked at reduced
    size = max(SMALLEST, round(columns * width / 42))
    gap = max(6, size // 2)
    line = text_size("Ag", size)[1]
    longest = max((text_size(label, size)[0] for label in grid.rows), default=0)
    left = gap + (min(longest, _WIDEST_LABEL * size) + gap if grid.rows else 0)
    top = gap + (line + gap if title else 0) + (line + gap if grid.columns else 0)
    below = 0 if grid.columns else line
    step = width + gap, height + below + gap
    sheet = Image.new("RGB", (left + columns * step[0], top + rows * step[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw_line(draw, (gap, gap, sheet.width - gap, gap + line), title, size)
    for row, label in enumerate(grid.rows):
        middle = top + row * step[1] + height // 2
        draw_line(draw, (gap, middle - line, left - gap, middle + line), label, size, align="right")
    for column, label in enumerate(grid.columns):
        start = left + column * step[0]
        draw_line(draw, (start, top - gap - line, start + width, top - gap), label, size)
    cells = []
    for picture, label, (row, column) in zip(pictures, labels, grid.places):
        x = left + column * step[0] + (width - picture.width) // 2
        y = top + row * step[1] + (height - picture.height) // 2
        box = (x, y, x + picture.width, y + picture.height)
        draw.rectangle((x - 1, y - 1, box[2], box[3]), outline=_FRAME)
        sheet.paste(picture, box)
        if below:
            start, floor = left + column * step[0], top + row * step[1] + height
            draw_line(draw, (start, floor, start + width, floor + line), label, size)
        cells.append(Cell(row, column, label, box))
    return ContactSheet(sheet, tuple(cells), grid.rows, grid.columns)


def _sized(picture: Image.Image, max_size: int) -> Image.Image:
    longest = max(picture.size)
    if longest > max_size:
        scale = max_size / longest
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        return picture.resize(size, Image.Resampling.LANCZOS)
    factor = min(math.ceil(_SMALLEST_PICTURE / longest), max_size // longest)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
