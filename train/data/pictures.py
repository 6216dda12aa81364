"""Picture files as they are meant to be seen, and cut to size."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import TrainError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
# What Pillow's decoders raise for damaged files; many check little
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, NotImplementedError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip


def read_picture(path: Path) -> Image.Image:
    """A picture, turned as its camera was held, RGB or RGBA.

    Raises:
        TrainError: reason "data", naming the file.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits of grey: Pillow would cut off what is above 255
                levels = np.asarray(picture, dtype=np.float32)
                picture = Image.fromarray((levels / (257.0 if levels.max() > 255 else 1.0)).astype(np.uint8))
            transparent = "A" in picture.getbands() or "transparency" in picture.info
            return picture.convert("RGBA" if transparent else "RGB")
    except _BROKEN as error:
        raise TrainError(
            "data", f"the picture {path.name} cannot be read ({error}); mend or remove it, or set skip_broken"
        ) from error


def fitted(picture: Image.Image, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Resize to cover `size` (width, height) and cut off what is too much; `place` 0.5, 0.5 keeps the middle.

    Colours and alpha are resized apart: Pillow multiplies them for RGBA, and what a mask hides would turn black.
    """
    parts = [picture.convert("RGB"), *([picture.getchannel("A")] if "A" in picture.getbands() else [])]
    done = [ImageOps.fit(part, size, Image.Resampling.LANCZOS, centering=place) for part in parts]
    if len(done) > 1:
        done[0].putalpha(done[1])
    return done[0]
