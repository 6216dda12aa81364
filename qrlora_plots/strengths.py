"""Two curves over the strength of an adapter: what shows of its concept, and how far everything else drifts."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from .text import INK, PAPER, draw_line, font_for

SHOWN, DRIFT = (0, 114, 178), (213, 94, 0)  # Okabe and Ito's blue and vermilion
_GRID = (227, 227, 227)
_HEIGHT = 300
_MARGIN = (52, 44, 24, 46)  # left, top, right, bottom


def strengths_image(report: Mapping[str, Any], width: int = 900) -> Image.Image:
    """Draw a report, at least 360 pixels wide.

    Args:
        report: what the trainer writes as `strengths/step-*.json`: lists `strengths`, `shown` and `drift`, where null
            is a value that is not defined.
        width: of the picture.
    """
    width = max(width, 360)
    image = Image.new("RGB", (width, _HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = _MARGIN[0], _MARGIN[1], width - _MARGIN[2], _HEIGHT - _MARGIN[3]
    strengths = [float(value) for value in report["strengths"]]
    lines = [(SHOWN, "concept shown", report["shown"]), (DRIFT, "drift without the trigger", report["drift"])]
    values = [float(value) for _, _, line in lines for value in line if value is not None]
    highest = max([1.0, *values]) * 1.05
    lowest = min([0.0, *values]) * 1.05
    last = max([1.0, *strengths])

    def place(strength: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * strength / last
        return x, bottom - (bottom - top) * (value - lowest) / (highest - lowest)

    for value in (0.0, 0.5, 1.0):
        y = place(0.0, value)[1]
        draw.line([(left, y), (right, y)], fill=_GRID)
        draw_line(draw, (0, round(y) - 10, left - 6, round(y) + 10), f"{value:g}", 13, align="right")
    for strength in strengths:
        x = round(place(strength, 0.0)[0])
        draw_line(draw, (x - 30, bottom + 2, x + 30, bottom + 22), f"{strength:g}", 13)
    draw_line(draw, (left, bottom + 22, right, bottom + 42), "strength", 13)
    for index, (colour, name, line) in enumerate(lines):
        points = [place(strength, float(value)) for strength, value in zip(strengths, line) if value is not None]
        _curve(draw, [place(0.0, 0.0), *points] if points else [], colour)
        x = left + index * (right - left) // 2
        draw.line([(x, 20), (x + 22, 20)], fill=colour, width=4)
        draw.text((x + 30, 20), _with_end(name, strengths, line), fill=INK, font=font_for(name, 14), anchor="lm")
    return image


def _curve(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    if points:
        draw.line(list(points), fill=colour, width=3, joint="curve")
    for x, y in points[1:]:
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)


def _with_end(name: str, strengths: Sequence[float], line: Sequence[float | None]) -> str:
    """A line's name and its value at strength 1."""
    value = dict(zip(strengths, line)).get(1.0)
    return name if value is None else f"{name}: {value:.2f} at 1"
