"""Pictures of a training: the loss curve, the adapter's own picture, a sheet that says why there are no samples."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...qrlora_core import NameTakenError, PathError, whole_file

log = logging.getLogger(__name__)

_SIZE = (960, 540)
_PREVIEW_SIDE = 512
_HIGHEST = 1e30  # a loss above it is no point of a curve; the axis would become infinite
_MARGIN = (84, 44, 24, 56)  # left, top, right, bottom
_BACKGROUND, _GRID, _TEXT = "#16181c", "#2c3038", "#c8ccd4"
_RAW, _SMOOTH = "#3a6f6a", "#1fbfa8"


def loss_curve(steps: Sequence[dict[str, Any]], title: str) -> Tensor:
    """Loss over steps as a picture.

    Args:
        steps: step events, in order.
        title: printed above.

    Returns:
        (1, height, width, 3), 0 to 1.
    """
    picture = Image.new("RGB", _SIZE, _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(15)
    left, top, right, bottom = _MARGIN[0], _MARGIN[1], _SIZE[0] - _MARGIN[2], _SIZE[1] - _MARGIN[3]
    raw = [(step["step"], step["loss"]) for step in steps if _finite(step["loss"])]
    smooth = [(step["step"], step["smoothed_loss"]) for step in steps if _finite(step["smoothed_loss"])]
    draw.text((left, 14), title.encode("ascii", "replace").decode(), fill=_TEXT, font=font)
    if not raw:
        draw.text((left, top + 20), "no step was reported", fill=_TEXT, font=font)
        return to_image(picture)
    low, high = _bounds([loss for _, loss in raw])
    first, last = raw[0][0], max(raw[-1][0], raw[0][0] + 1)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + (right - left) * (step - first) / (last - first)
        return x, bottom - (bottom - top) * (min(max(loss, low), high) - low) / (high - low)

    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + fraction * (high - low)
        y = place(first, value)[1]
        draw.line([(left, y), (right, y)], fill=_GRID)
        draw.text((left - 8, y), f"{value:.4g}", fill=_TEXT, font=font, anchor="rm")
        step = first + fraction * (last - first)
        x = place(step, low)[0]
        draw.text((x, bottom + 8), f"{step:.0f}", fill=_TEXT, font=font, anchor="ma")
    draw.text(((left + right) / 2, bottom + 30), "step", fill=_TEXT, font=font, anchor="ma")
    _line(draw, [place(*point) for point in raw], _RAW, 1)
    _line(draw, [place(*point) for point in smooth], _SMOOTH, 3)
    for x, name, color in ((right - 190, "loss", _RAW), (right - 110, "smoothed", _SMOOTH)):
        draw.line([(x, 22), (x + 22, 22)], fill=color, width=3)
        draw.text((x + 28, 14), name, fill=_TEXT, font=font)
    return to_image(picture)


def note(text: str) -> Tensor:
    """A small sheet with a line of text, (1, height, width, 3)."""
    picture = Image.new("RGB", (512, 128), _BACKGROUND)
    ImageDraw.Draw(picture).text((256, 64), text, fill=_TEXT, font=ImageFont.load_default(16), anchor="mm")
    return to_image(picture)


def write_preview(adapter: Path, picture: Tensor) -> None:
    """`<adapter>.preview.png`, where managers of LoRAs look for a picture; one that is there already stays.

    A disk that refuses it does not fail a training.

    Args:
        adapter: the published file.
        picture: (height, width, 3), 0 to 1.
    """
    path = adapter.with_suffix(".preview.png")
    if path.exists():
        return
    try:
        image = Image.fromarray(picture.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy())
        image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
        with suppress(NameTakenError), whole_file(path) as file:
            image.save(file, "PNG")
    except PathError as error:
        log.warning("QR-LoRA: no picture beside the adapter: %s", error)


def to_image(picture: Image.Image) -> Tensor:
    """(1, height, width, 3), 0 to 1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0)[None]


def _line(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], color: str, width: int) -> None:
    if len(points) == 1:
        x, y = points[0]
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
    else:
        draw.line(points, fill=color, width=width, joint="curve")


def _bounds(losses: list[float]) -> tuple[float, float]:
    """The range of the axis: single peaks above the 99th percentile are cut off, not the curve pressed flat."""
    low = min(losses)
    high = max(float(np.percentile(losses, 99)), low)
    room = 0.08 * (high - low) or 0.1 * abs(low) or 1.0
    return low - room, high + room


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < _HIGHEST  # false for NaN
