"""Text on PIL images: a font that has the characters, at a size that fits."""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, PAPER = (17, 17, 17), (255, 255, 255)
SMALLEST = 13
_LONGEST = 1000  # letters of a line; more have no room on any sheet
_NOT_DRAWN = ("Cc", "Cs", "Zl", "Zp")  # categories of Unicode: control characters, surrogates, line separators
# What Pillow brings along has little more than ASCII; these are what systems have for names in other scripts
_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "arial.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "Arial Unicode.ttf",
)


def font_for(text: str, size: int) -> Font:
    """The first known font that has every character of `text`, or Pillow's own where none has."""
    own = _font("", size)
    if own is None:
        return ImageFont.load_default()
    return _font(_font_name(frozenset(text)), size) or own


def text_size(text: str, size: int) -> tuple[int, int]:
    """Width and height of one line in pixels; the height does not depend on its letters."""
    text = one_line(text)
    left, _, right, _ = font_for(text, size).getbbox(text)
    return round(right - left), round(1.35 * size)


def fitted(text: str, size: int, width: int) -> tuple[str, int]:
    """Text and size that fit into `width`: first smaller letters, then an ellipsis in the middle.

    Line breaks and other control characters become spaces: it is one line.
    """
    text = one_line(text)
    while size > SMALLEST and text_size(text, size)[0] > width:
        size -= 1
    if len(text) < 2 or text_size(text, size)[0] <= width:
        return text, size
    low, high = 1, len(text) - 1  # `low` letters are taken even where they do not fit
    while low < high:
        middle = (low + high + 1) // 2
        if text_size(_cut(text, middle), size)[0] <= width:
            low = middle
        else:
            high = middle - 1
    return _cut(text, low), size


def one_line(text: str) -> str:
    """A text without control characters and lone surrogates, at most _LONGEST letters of it."""
    if len(text) > _LONGEST:
        text = _cut(text, _LONGEST)
    text = "".join(" " if unicodedata.category(char) in _NOT_DRAWN else char for char in text)
    if _font("", SMALLEST) is None:  # Pillow before 10.1 draws its one bitmap font, which raises for other letters
        return text.encode("latin-1", errors="replace").decode("latin-1")
    return text


def draw_line(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    text: str,
    size: int,
    *,
    align: str = "center",
    fill: tuple[int, int, int] = INK,
) -> None:
    """One line of text in the middle of a box (left, top, right, bottom)."""
    shown, size = fitted(text, size, box[2] - box[0])
    width = text_size(shown, size)[0]
    left = {"center": (box[0] + box[2] - width) // 2, "left": box[0], "right": box[2] - width}[align]
    draw.text((left, (box[1] + box[3]) // 2), shown, fill=fill, font=font_for(shown, size), anchor="lm")


def text_card(lines: Sequence[str], *, width: int = 900, size: int = 20) -> Image.Image:
    """Lines of text as a picture, for when nothing better can be drawn."""
    height = round(1.35 * size)
    card = Image.new("RGB", (width, height * (len(lines) + 2)), PAPER)
    draw = ImageDraw.Draw(card)
    for index, line in enumerate(lines):
        draw_line(draw, (height, height * (index + 1), width - height, height * (index + 2)), line, size, align="left")
    return card


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font by its file name, "" for Pillow's own; None where it is not there or Pillow has no FreeType."""
    try:
        font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except (OSError, ImportError, TypeError):  # TypeError: Pillow before 10.1 has one bitmap font and no sizes
        return None
    return font if isinstance(font, ImageFont.FreeTypeFont) else None


def _cut(text: str, keep: int) -> str:
    """The first and last letters, `keep` in all, and three dots between them."""
    head = (keep + 1) // 2
    return f"{text[:head]}...{text[len(text) - (keep - head) :]}"


@lru_cache(maxsize=256)
def _font_name(characters: frozenset[str]) -> str:
    """The first font that has all of these, "" for Pillow's own."""
    for name in ("", *_SYSTEM_FONTS):
        if _font(name, SMALLEST) is not None and all(_draws(name, char) for char in characters - {" "}):
            return name
    return ""


@lru_cache(maxsize=8192)
def _draws(name: str, character: str) -> bool:
    """Whether a font draws a character as something else than its box for missing ones."""
    font = _font(name, SMALLEST)
    assert font is not None
    mask, missing = font.getmask(character), font.getmask("\U0010ffff")
    return mask.size != missing.size or bytes(mask) != bytes(missing)
