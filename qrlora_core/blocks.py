"""Strength per block, part and stream of a model, as data: nothing is multiplied before a merge is computed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from .errors import SettingError, TargetError
from .families import Family, layer_kind
from .written import split_points

LIMIT = 4.0  # strengths of all nodes lie in -4 to 4
LONGEST_TEXT = 10_000  # characters of a list that a person writes
_LONGEST_NUMBER = 50  # characters
_SMALLEST_EXPONENT = -30  # of a number other than 0
_RANGE = re.compile(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*:\s*(.+)")
_KIND = re.compile(r"([A-Za-z]\w{0,63})\s*(.*)")
_LAST = 9999  # no block has a higher number


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
        other_ranges: (kind of block, range) for kinds of a family's own, such as a U-Net's "input" and "output".
        family: where layers are looked up; by default in all families, which is ambiguous where two share a name.
    """

    double: float = 1.0
    single: float = 1.0
    attention: float = 1.0
    feed_forward: float = 1.0
    image: float = 1.0
    text: float = 1.0
    double_ranges: tuple[BlockRange, ...] = ()
    single_ranges: tuple[BlockRange, ...] = ()
    other_ranges: tuple[tuple[str, BlockRange], ...] = ()
    family: Family | None = None

    def factor(self, name: str) -> float:
        """The factor of one layer; 1 for a layer that no family knows."""
        kind = layer_kind(name, self.family)
        result = {"double": self.double, "single": self.single}.get(kind.block, 1.0)
        result *= {"attention": self.attention, "feed_forward": self.feed_forward}.get(kind.part, 1.0)
        result *= {"image": self.image, "text": self.text}.get(kind.stream, 1.0)
        for _, block, (first, last, factor) in self._ranges():
            if block == kind.block and first <= kind.number <= last:
                result *= factor
        return result

    def _ranges(self) -> list[tuple[str, str, BlockRange]]:
        """(input, kind of block, range) of all ranges."""
        named = [("double_ranges", "double", block_range) for block_range in self.double_ranges]
        named += [("single_ranges", "single", block_range) for block_range in self.single_ranges]
        return named + [("other_ranges", block, block_range) for block, block_range in self.other_ranges]

    def check(self, names: Iterable[str]) -> None:
        """Raise TargetError when a range holds no block of these layers: it would be ignored in silence."""
        kinds = [layer_kind(name, self.family) for name in names]
        if not kinds:
            return  # nothing is scaled, so nothing is ignored
        for where, block, block_range in self._ranges():
            present = sorted({kind.number for kind in kinds if kind.block == block})
            if not any(block_range.first <= index <= block_range.last for index in present):
                numbers = f"{present[0]} to {present[-1]}" if present else "none"
                others = ", ".join(dict.fromkeys(kind.block for kind in kinds if kind.block != block))
                raise TargetError(
                    f"{where}: {_shown(block_range)!r} matches no block; the adapter has {block} blocks: {numbers}"
                    + (f" (it has {others} blocks)" if others and not present else "")
                )

    def beyond(self, names: Iterable[str]) -> list[str]:
        """Of each range that goes beyond the last of these layers' blocks, that it does, in words."""
        last: dict[str, int] = {}
        for kind in (layer_kind(name, self.family) for name in names):
            last[kind.block] = max(last.get(kind.block, -1), kind.number)
        return [
            f"{_shown(block_range)}: the last of the {block} blocks is {last[block]}"
            for _, block, block_range in self._ranges()
            if block in last and block_range.last > last[block] and block_range.last != _LAST
        ]

    def __str__(self) -> str:
        """What differs from 1, in a few words."""
        names = ("double", "single", "attention", "feed_forward", "image", "text")
        parts = [f"{name} {getattr(self, name):g}" for name in names if getattr(self, name) != 1]
        for block, ranges in (("double", self.double_ranges), ("single", self.single_ranges)):
            parts += [f"{block} {_shown(block_range)}" for block_range in ranges]
        parts += [f"{block} {_shown(block_range)}" for block, block_range in self.other_ranges]
        return ", ".join(parts) or "all 1"


def parse_ranges(text: str, what: str) -> tuple[BlockRange, ...]:
    """Read "0-9: 1.0, 10-18: 0.5"; a single block is "7: 0".

    Args:
        text: ranges, separated by commas, semicolons or lines; an empty text has none. Decimal commas are understood.
        what: how to call the text in messages.

    Raises:
        SettingError: a part is no range, its factor is not a number from -4 to 4, or two ranges share a block.
    """
    require_short(text, what)
    ranges: list[BlockRange] = []
    for part in split_points(text, _RANGE.fullmatch):
        match, where = _RANGE.fullmatch(part), f"{what}: {shortened(part)!r}"
        if not match:
            raise SettingError(f"{where} is not a block range; write blocks and a factor, as in '0-9: 0.5'")
        block_range = BlockRange(int(match[1]), int(match[2] or match[1]), parse_factor(match[3], where))
        if block_range.last < block_range.first:
            raise SettingError(f"{where} ends before it begins")
        for earlier in ranges:
            if block_range.first <= earlier.last and earlier.first <= block_range.last:
                raise SettingError(f"{where} and {_shown(earlier)!r} share blocks; give each block one factor")
        ranges.append(block_range)
    return tuple(ranges)


def parse_kind_ranges(text: str, what: str) -> tuple[tuple[str, BlockRange], ...]:
    """Read "input 4-5: 0.5, middle: 0": ranges with the kind of block before each; without numbers all of that kind.

    Raises:
        SettingError: as for `parse_ranges`, or a part that names no kind of block.
    """
    require_short(text, what)
    parts_of_kind: dict[str, list[str]] = {}
    for part in split_points(text, _kind_range):
        match = _kind_range(part)
        if match is None:
            raise SettingError(
                f"{what}: {shortened(part)!r} names no kind of block; write kind, blocks and a factor, as in "
                "'input 4-5: 0.5' or 'middle: 0'"
            )
        blocks_and_factor = match[2] if not match[2].startswith(":") else f"0-{_LAST}{match[2]}"
        parts_of_kind.setdefault(match[1], []).append(blocks_and_factor)
    return tuple(
        (kind, block_range)
        for kind, parts in parts_of_kind.items()
        for block_range in parse_ranges(", ".join(parts), what)
    )


def _kind_range(part: str) -> re.Match[str] | None:
    match = _KIND.fullmatch(part)
    return match if match and ":" in match[2] else None


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


def _shown(block_range: BlockRange) -> str:
    if (block_range.first, block_range.last) == (0, _LAST):
        return f"all: {block_range.factor:g}"
    first, last = block_range.first, block_range.last
    blocks = f"{first}" if first == last else f"{first}-{last}"
    return f"{blocks}: {block_range.factor:g}"
