"""Between arrays of colours from 0 to 1, as ComfyUI has them, and PIL images."""

from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]


def images_of(batch: Array) -> list[Image.Image]:
    """The pictures of a batch of shape (n, height, width, 1, 3 or 4), numbers from 0 to 1; what lies outside is cut."""
    levels = np.rint(255.0 * np.clip(np.nan_to_num(batch), 0, 1)).astype(np.uint8)
    return [
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).convert("RGB") for picture in levels
    ]


def array_of(image: Image.Image) -> Array:
    """A picture as a batch of one: (1, height, width, 3), float32, 0 to 1."""
    return np.asarray(image.convert("RGB"), dtype=np.float32)[None] / 255.0
