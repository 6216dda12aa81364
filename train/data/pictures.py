"""Picture files as they are meant to be seen, and cut to size. PIL and numpy only: the Train node uses it, too."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from .captions import DatasetError, is_dangling

# A file is read by what it holds, not by what it is called, and Pillow has decoders for some seventy formats (one of
# them starts Ghostscript). These few are what pictures are kept in.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF", "GIF")
# Decoded, a picture takes up to 16 bytes for a pixel; a file of 300 kB can claim a billion of them.
MAX_PIXELS = 128_000_000
MAX_BYTES = 8 * MAX_PIXELS  # four colours of 16 bits, not compressed
# What Pillow's decoders raise for damaged files; many check little
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, NotImplementedError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip


def read_picture(path: Path) -> Image.Image:
    """The first frame of a picture file, turned as its camera was held, 8 bits each of RGB or RGBA.

    Raises:
        DatasetError: a link that leads nowhere, another format, more than MAX_PIXELS, or a damaged file.
    """
    if is_dangling(path):
        raise DatasetError(f"the picture {path.name} is a link that leads nowhere; mend or remove it")
    try:
        # from memory: a damaged PNG may announce a chunk of 4 GB, which is allocated before a file's end is seen
        with Image.open(io.BytesIO(_content(path)), formats=_known_formats()) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise DatasetError(
                    f"the picture {path.name} has {width}x{height} pixels, {MAX_PIXELS // 1_000_000} million are the "
                    "most that is read; make it smaller"
                )
            picture = ImageOps.exif_transpose(opened)
            if picture.mode[0] in "IF":  # more than 8 bits of grey: Pillow's own conversion cuts off what is above 255
                picture = _eight_bits(picture, opened.format == "PNG")
            transparent = "A" in picture.getbands() or "transparency" in picture.info
            return picture.convert("RGBA" if transparent else "RGB")
    except DatasetError:
        raise
    except UnidentifiedImageError as error:  # its own message holds the whole path
        reason = f"it is none of {', '.join(_known_formats())}, or it is damaged"
        if path.suffix.lower() == ".avif" and "AVIF" not in _known_formats():
            reason = "this Python's Pillow has no AVIF; install Pillow 11.3 or newer, or save it as PNG"
        raise DatasetError(f"the picture {path.name} cannot be read ({reason}); mend or remove it") from error
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except _BROKEN as error:
        raise _unreadable(path, str(error)) from error


def _content(path: Path) -> bytes:
    """A whole file, unless it is larger than any picture of MAX_PIXELS.

    Raises:
        DatasetError: it is.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DatasetError(f"the picture {path.name} has {size / 1e9:.1f} GB, {MAX_BYTES / 1e9:.0f} GB are the most")
    return path.read_bytes()


def require_visible(name: str, mask: "np.ndarray | None") -> None:
    """Whether a loss mask made of a picture's alpha channel leaves anything to train on.

    Raises:
        DatasetError: it is zero everywhere.
    """
    if mask is not None and not mask.any():
        raise DatasetError(f"{name} is transparent everywhere: as a mask that leaves nothing to train on")


def fitted(picture: Image.Image, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Resize to cover `size` (width, height) and cut off what is too much; `place` 0.5, 0.5 keeps the middle.

    Colours and alpha are resized apart: Pillow multiplies them for RGBA, and what a mask hides would turn black.
    """
    parts = [picture.convert("RGB"), *([picture.getchannel("A")] if "A" in picture.getbands() else [])]
    done = [ImageOps.fit(part, size, Image.Resampling.LANCZOS, centering=place) for part in parts]
    if len(done) > 1:
        done[0].putalpha(done[1])
    return done[0]


def _known_formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    return [name for name in FORMATS if name != "AVIF" or features.check("avif")]


def _unreadable(path: Path, reason: str) -> DatasetError:
    shown = reason.replace(str(path), path.name)
    return DatasetError(f"the picture {path.name} cannot be read ({shown}); mend or remove it")


def _eight_bits(picture: Image.Image, is_png: bool) -> Image.Image:
    """Grey of 16 or 32 bits, or of floating point, as 8 bits.

    A PNG and the modes I;16* have 16 bits, however dark they are. Of other integers and of floating point the largest
    value tells the scale: up to 1, 255 or 65535.
    """
    levels = np.asarray(picture)
    largest = float(levels.max(initial=0))
    if not np.isfinite(largest) or largest > 65535 or (levels.dtype.kind == "f" and not np.isfinite(levels).all()):
        raise ValueError(f"its greys reach {largest:g}, expected numbers up to 65535")
    if picture.mode.startswith("I;16") or (is_png and picture.mode == "I") or largest > 255:
        scale = 255.0 / 65535.0
    else:
        scale = 255.0 if picture.mode == "F" and largest <= 1.0 else 1.0
    if levels.dtype.kind == "f":
        return Image.fromarray(np.rint(levels.clip(min=0.0) * scale).astype(np.uint8))
    # whole numbers are looked up: no array of floats for a hundred million pixels
    table = np.rint(np.arange(65536, dtype=np.float32) * scale).clip(max=255).astype(np.uint8)
    return Image.fromarray(table[levels if levels.dtype.kind == "u" else np.maximum(levels, 0)])
