"""The loss of a training over its steps: what the panel of the Train node draws, as a picture."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from .text import draw_line, fitted, font_for, text_size

SIZE = (960, 540)
_FINER = 2  # drawn so much larger and reduced: lines without steps
_MARGIN = (96, 56, 28, 62)  # left, top, right, bottom
_BACKGROUND, _GRID, _AXIS, _TEXT = (22, 24, 28), (52, 56, 64), (120, 126, 138), (214, 218, 226)
# A blue and the vermilion of Okabe and Ito, told apart by every kind of colour vision; width and shape differ as well
_RAW, _SMOOTHED, _VALIDATION = (122, 128, 138), (82, 166, 224), (230, 122, 54)
_LETTERS = 16
_LOG_FROM = 10  # a smoothed loss that falls to a tenth is read on a logarithmic scale
_HIGHEST = 1e30  # a loss above it is no point of a curve; the axis would become infinite

Point = tuple[float, float]


class _Scale(NamedTuple):
    """Where steps and losses lie in the plot, and the numbers at its edges."""

    box: tuple[float, float, float, float]
    steps: tuple[float, float]
    losses: tuple[float, float]
    log: bool

    def place(self, point: Point) -> Point:
        left, top, right, bottom = self.box
        loss = min(max(point[1], self.losses[0]), self.losses[1])
        low, high, loss = (math.log(value) if self.log else value for value in (*self.losses, loss))
        across = (point[0] - self.steps[0]) / (self.steps[1] - self.steps[0])
        return left + across * (right - left), bottom - (loss - low) / (high - low) * (bottom - top)

    def loss_ticks(self) -> list[float]:
        return decades(*self.losses) if self.log else ticks(*self.losses, 6)

    def step_ticks(self) -> list[float]:
        return [step for step in ticks(*self.steps, 8) if float(step).is_integer()]


def loss_image(
    steps: Sequence[Mapping[str, Any]], title: str, validation: Sequence[Mapping[str, Any]] = ()
) -> Image.Image:
    """Loss over steps: each step's, the smoothed one, and the validation's points.

    The highest and lowest hundredth are cut off, so that one peak does not press the curve flat; the smoothed loss and
    the validation are always inside. A smoothed loss that falls to a tenth gets a logarithmic axis.

    Args:
        steps: step events, in order: `step`, `loss`, `smoothed_loss`.
        title: above the plot.
        validation: validation events: `step`, `loss`.
    """
    raw, smoothed = _points(steps, "loss"), _points(steps, "smoothed_loss")
    checked = _points(validation, "loss")
    picture = Image.new("RGB", (SIZE[0] * _FINER, SIZE[1] * _FINER), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    if not raw:
        middle = (0, 0, picture.width, picture.height)
        draw_line(draw, middle, "no step was reported", _LETTERS * _FINER, fill=_TEXT)
        return picture.resize(SIZE, Image.Resampling.LANCZOS)
    scale = _scale(raw, smoothed, checked)
    _axes(picture, draw, scale)
    _line(draw, [scale.place(point) for point in raw], _RAW, 1 * _FINER)
    _line(draw, [scale.place(point) for point in smoothed], _SMOOTHED, 3 * _FINER)
    for point in checked:
        _diamond(draw, scale.place(point), 5 * _FINER)
    _head(draw, title, bool(checked), smoothed[-1:] or raw[-1:])
    return picture.resize(SIZE, Image.Resampling.LANCZOS)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, at most so many steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers, with 2 and 5 times them where the range is small."""
    factors = (1,) if high / low > 300 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def number_text(value: float) -> str:
    """Three digits, as the panel writes them."""
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.1e}"
    return f"{float(f'{value:.3g}'):g}"


def _points(events: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    pairs = [(float(event["step"]), event.get(key)) for event in events]
    return [(step, float(loss)) for step, loss in pairs if isinstance(loss, int | float) and abs(loss) < _HIGHEST]


def _scale(raw: Sequence[Point], smoothed: Sequence[Point], checked: Sequence[Point]) -> _Scale:
    inside = [loss for _, loss in (*smoothed, *checked)]
    losses = sorted(loss for _, loss in raw)
    cut = len(losses) // 100
    low, high = min([losses[cut], *inside]), max([losses[-1 - cut], *inside])
    log = bool(low > 0 and inside and max(inside) >= _LOG_FROM * min(inside))
    if log:
        low, high = low * math.exp(-0.05), high * math.exp(0.05)
    else:
        room = 0.06 * ((high - low) or abs(high) or 1.0)
        low, high = (max(0.0, low - room) if low >= 0 else low - room), high + room
    first = raw[0][0]
    left, top = _MARGIN[0] * _FINER, _MARGIN[1] * _FINER
    right, bottom = (SIZE[0] - _MARGIN[2]) * _FINER, (SIZE[1] - _MARGIN[3]) * _FINER
    return _Scale((left, top, right, bottom), (first, max(raw[-1][0], first + 1)), (low, high), log)


def _axes(picture: Image.Image, draw: ImageDraw.ImageDraw, scale: _Scale) -> None:
    left, top, right, bottom = scale.box
    size = _LETTERS * _FINER
    for loss in scale.loss_ticks():
        y = scale.place((scale.steps[0], loss))[1]
        draw.line([(left, y), (right, y)], fill=_GRID, width=_FINER)
        _text(draw, (left - 8 * _FINER, y), number_text(loss), "rm")
    for step in scale.step_ticks():
        x = scale.place((step, scale.losses[0]))[0]
        draw.line([(x, bottom), (x, bottom + 5 * _FINER)], fill=_AXIS, width=_FINER)
        _text(draw, (x, bottom + 8 * _FINER), f"{step:.0f}", "ma")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=_AXIS, width=_FINER)
    _text(draw, ((left + right) / 2, bottom + 32 * _FINER), "step", "ma")
    name = "loss (log)" if scale.log else "loss"
    label = Image.new("RGB", (text_size(name, size)[0] + 4, round(1.4 * size)), _BACKGROUND)
    _text(ImageDraw.Draw(label), (2, label.height / 2), name, "lm")
    label = label.transpose(Image.Transpose.ROTATE_90)
    picture.paste(label, (8 * _FINER, round((top + bottom - label.height) / 2)))


def _head(draw: ImageDraw.ImageDraw, title: str, has_validation: bool, last: Sequence[Point]) -> None:
    """Title at the left, what the lines are at the right."""
    names = [("loss", _RAW, 1), (f"smoothed {number_text(last[0][1])}", _SMOOTHED, 3)]
    if has_validation:
        names.append(("validation", _VALIDATION, 0))
    x, y, size = (SIZE[0] - _MARGIN[2]) * _FINER, 28 * _FINER, _LETTERS * _FINER
    for name, color, width in reversed(names):
        x -= text_size(name, size)[0]
        _text(draw, (x, y), name, "lm")
        x -= 32 * _FINER
        if width:
            draw.line([(x, y), (x + 24 * _FINER, y)], fill=color, width=width * _FINER)
        else:
            _diamond(draw, (x + 12 * _FINER, y), 5 * _FINER)
        x -= 22 * _FINER
    left = _MARGIN[0] * _FINER
    shown, size = fitted(title, 18 * _FINER, x - left)
    draw.text((left, y), shown, fill=_TEXT, font=font_for(shown, size), anchor="lm")


def _text(draw: ImageDraw.ImageDraw, place: Point, text: str, anchor: str) -> None:
    draw.text(place, text, fill=_TEXT, font=font_for(text, _LETTERS * _FINER), anchor=anchor)


def _line(draw: ImageDraw.ImageDraw, points: Sequence[Point], color: tuple[int, int, int], width: int) -> None:
    if len(points) == 1:
        x, y = points[0]
        draw.ellipse([x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width], fill=color)
    elif points:
        draw.line(list(points), fill=color, width=width, joint="curve")


def _diamond(draw: ImageDraw.ImageDraw, place: Point, size: float) -> None:
    x, y = place
    draw.polygon([(x - size, y), (x, y - size), (x + size, y), (x, y + size)], outline=_VALIDATION, width=2 * _FINER)
