"""Pictures of a training: the loss curve, the adapter's own picture, a sheet that says why there are no samples."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...qrlora_core import NameTakenError, PathError, whole_file
from ...qrlora_plots import array_of, loss_image

log = logging.getLogger(__name__)

_PREVIEW_SIDE = 512
_BACKGROUND, _TEXT = "#16181c", "#c8ccd4"


def loss_curve(steps: Sequence[dict[str, Any]], title: str, validation: Sequence[dict[str, Any]] = ()) -> Tensor:
    """Loss over steps as a picture, (1, height, width, 3), 0 to 1; see `loss_image`."""
    return to_image(loss_image(steps, title, validation))


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
    return torch.from_numpy(array_of(picture))
