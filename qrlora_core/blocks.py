"""Strength per block, part and stream of FLUX, as data: nothing is multiplied before a merge is computed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from .errors import SettingError, TargetError
from .targets import layer_kind

LIMIT = 4.0  # strengths of all nodes lie in -4 to 4
LONGEST_TEXT = 10_000  # characters of a list that a person writes
_LONGEST_NUMBER = 50  # characters
_SMALLEST_EXPONENT = -30  # of a number other than 0
_RANGE = re.compile(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*:\s*(.+)")


class BlockRange(NamedTuple):
    """The blocks `first` to `last`, both included, and their factor."""

    first: int
    last: int
    factor: float


@dataclass(frozen=True, slots=True)
class BlockScale:
    """Factors of the layers of one adapter or merge; those that meet in a layer multiply.

    Attributes:
        double, single: for the two kinds of blocks.
        attention, feed_forward: for the two parts of a block.
        image, text: for the two streams of double blocks; single blocks have one stream for both and keep 1.
        double_ranges, single_ranges: for some blocks; those that are in no range keep 1.
    """

    double: float = 1.0
    single: float = 1.0
    attention: float = 1.0
    feed_forward: float = 1.0
    image: float = 1.0
    text: float = 1.0
    double_ranges: tuple[BlockRange, ...] = ()
    single_ranges: tuple[BlockRange, ...] = ()

    def factor(self, name: str) -> float:
        """The factor of one layer.

        Raises:
            TargetError: no FLUX layer has that name.
        """
        kind = layer_kind(name)
        result = self.double if kind.block == "double" else self.single
        result *= {"attention": self.attention, "feed_forward": self.feed_forward}.get(kind.part, 1.0)
        result *= {"image": self.image, "text": self.text}.get(kind.stream, 1.0)
        for first, last, factor in self.double_ranges if kind.block == "double" else self.single_ranges:
            if first <= kind.number <= last:
                result *= factor
        return result

    def check(self, names: Iterable[str]) -> None:
        """Raise TargetError when a range holds no block of these layers: it would be ignored in silence."""
        kinds = [layer_kind(name) for name in names]
        if not kinds:
            return  # nothing is scaled, so nothing is ignored
        for block, ranges in (("double", self.double_ranges), ("single", self.single_ranges)):
            present = sorted({kind.number for kind in kinds if kind.block == block})
            for one in ranges:
                if not any(one.first <= index <= one.last for index in present):
                    known = f"{present[0]} to {present[-1]}" if present else "none"
                    raise TargetError(
                        f"{block}_ranges: {_shown(one)!r} matches no block; the adapter has {block} blocks: {known}"
                    )

    def __str__(self) -> str:
        """What differs from 1, in a few words."""
        names = ("double", "single", "attention", "feed_forward", "image", "text")
        parts = [f"{name} {getattr(self, name):g}" for name in names if getattr(self, name) != 1]
        for block, ranges in (("double", self.double_ranges), ("single", self.single_ranges)):
            parts += [f"{block} {_shown(one)}" for one in ranges]
        return ", ".join(parts) or "all 1"


def parse_ranges(text: str, what: str) -> tuple[BlockRange, ...]:
    """Read "0-9: 1.0, 10-18: 0.5"; a single block is "7: 0".

    Args:
        text: ranges, separated by commas, semicolons or lines; an empty text has none.
        what: how to call the text in messages.

    Raises:
        SettingError: a part is no range, its factor is not a number from -4 to 4, or two ranges share a block.
    """
    require_short(text, what)
    found: list[BlockRange] = []
    for part in (part.strip() for part in re.split(r"[,;\n]", text)):
        if not part:
            continue
        match, where = _RANGE.fullmatch(part), f"{what}: {shortened(part)!r}"
        if not match:
            raise SettingError(f"{where} is not a block range; write blocks and a factor, as in '0-9: 0.5'")
        one = BlockRange(int(match[1]), int(match[2] or match[1]), parse_factor(match[3], where))
        if one.last < one.first:
            raise SettingError(f"{where} ends before it begins")
        for other in found:
            if one.first <= other.last and other.first <= one.last:
                raise SettingError(f"{where} and {_shown(other)!r} share blocks; give each block one factor")
        found.append(one)
    return tuple(found)


def parse_factor(text: str, where: str) -> float:
    """A number from -4 to 4.

    Raises:
        SettingError: it is none; `where` begins the message.
    """
    return float(parse_decimal(text, f"{where}: {shortened(text.strip())!r}"))


def parse_decimal(text: str, shown: str) -> Decimal:
    """A number from -4 to 4 as it is written.

    Lengths and exponents are compared before anything is calculated: a Decimal of 1e-999999 is made at once, and the
    integer or the quotient that it leads to takes minutes, in which no other thread runs.

    Args:
        text: the number.
        shown: begins the message: where it stands, and the number itself.

    Raises:
        SettingError: it is no number, out of range, or written with more than a number needs.
    """
    plain = text.strip()
    if len(plain) > _LONGEST_NUMBER:
        raise SettingError(f"{shown} is not a number: it has {len(plain)} characters, {_LONGEST_NUMBER} are the most")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        raise SettingError(f"{shown} is not a number") from None
    if not value.is_finite() or (value and value.adjusted() > 0) or value.copy_abs() > Decimal(LIMIT):
        raise SettingError(f"{shown} is out of range; use {-LIMIT:g} to {LIMIT:g}")
    if value and value.adjusted() < _SMALLEST_EXPONENT:
        raise SettingError(f"{shown} is smaller than 1e{_SMALLEST_EXPONENT}; write 0")
    return value or Decimal(0)  # 0e999999 has an exponent, too


def require_short(text: str, what: str) -> None:
    """Raise SettingError when a list is longer than any person writes."""
    if len(text) > LONGEST_TEXT:
        raise SettingError(f"{what} has {len(text)} characters, {LONGEST_TEXT} are the most that is read")


def shortened(text: str, length: int = 60) -> str:
    """A text as a message shows it: its beginning and its end where it is long."""
    return text if len(text) <= length else f"{text[: length - 20]}...{text[-17:]}"


def _shown(one: BlockRange) -> str:
    blocks = f"{one.first}" if one.first == one.last else f"{one.first}-{one.last}"
    return f"{blocks}: {one.factor:g}"
