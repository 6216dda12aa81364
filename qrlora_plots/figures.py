"""What every plot by matplotlib shares: the figure, its fonts and its file, and what is said where it is missing.

Drawn with matplotlib's objects, never with pyplot: no global state, no windows.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

DPI = 100
GRID = "#E3E3E3"
_FALLBACK_FONTS = ("Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "Noto Sans CJK JP", "Arial Unicode MS")


class PlotsUnavailableError(RuntimeError):
    """matplotlib is not installed; the message says how to get it."""


@contextmanager
def new_figure(size: tuple[float, float]) -> Iterator["Figure"]:
    """A white figure to draw on; it is drawn at the end, while the fonts are set, and `figure_image` has the picture.

    Args:
        size: width and height in units of DPI pixels.

    Raises:
        PlotsUnavailableError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsUnavailableError(
            f"plots need matplotlib, which is not installed; run: {sys.executable} -m pip install matplotlib"
        ) from error
    with matplotlib.rc_context({"font.family": _fonts(), "axes.axisbelow": True, "font.size": 10}):
        figure = Figure(figsize=size, dpi=DPI, facecolor="white")
        canvas = FigureCanvasAgg(figure)  # which the figure then has as its own
        yield figure
        canvas.draw()  # type: ignore[no-untyped-call]


def figure_image(figure: "Figure") -> Image.Image:
    """A figure of `new_figure` as it was drawn, RGB; its size in units of DPI pixels."""
    canvas = cast("FigureCanvasAgg", figure.canvas)
    drawn = canvas.buffer_rgba()  # type: ignore[no-untyped-call]
    return Image.fromarray(np.asarray(drawn)).convert("RGB")


def figure_png(figure: "Figure") -> bytes:
    """The same as a PNG file."""
    buffer = io.BytesIO()
    figure_image(figure).save(buffer, format="png")
    return buffer.getvalue()


def _fonts() -> list[str]:
    """matplotlib's own font, then what is installed for names in other scripts."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed)]
