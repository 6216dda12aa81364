"""Text on PIL images: a font that has the characters, at a size that fits."""

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, PAPER = (17, 17, 17), (255, 255, 255)
SMALLEST = 13
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
    for name in ("", *_SYSTEM_FONTS):
        font = _font(name, size)
        if font is not None and _covers(font, text):
            return font
    return own


def text_size(text: str, size: int) -> tuple[int, int]:
    """Width and height of one line in pixels; the height does not depend on its letters."""
    font = font_for(text, size)
    left, _, right, _ = font.getbbox(text)
    return round(right - left), round(1.35 * size)


def fitted(text: str, size: int, width: int) -> tuple[str, int]:
    """Text and size that fit into `width`: first smaller letters, then an ellipsis in the middle."""
    while size > SMALLEST and text_size(text, size)[0] > width:
        size -= 1
    shown, keep = text, len(text)
    while keep > 1 and text_size(shown, size)[0] > width:
        keep -= 1
        head = (keep + 1) // 2
        shown = f"{text[:head]}...{text[len(text) - (keep - head) :]}"
    return shown, size


def draw_line(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], text: str, size: int, *, align: str = "center"
) -> None:
    """One line of text in the middle of a box (left, top, right, bottom)."""
    shown, size = fitted(text, size, box[2] - box[0])
    width = text_size(shown, size)[0]
    left = {"center": (box[0] + box[2] - width) // 2, "left": box[0], "right": box[2] - width}[align]
    draw.text((left, (box[1] + box[3]) // 2), shown, fill=INK, font=font_for(shown, size), anchor="lm")


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


def _covers(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether no character of `text` is drawn as the font's box for missing ones."""
    missing = font.getmask("\U0010ffff")
    for character in set(text) - {" "}:
        mask = font.getmask(character)
        if mask.size == missing.size and bytes(mask) == bytes(missing):
            return False
    return True
