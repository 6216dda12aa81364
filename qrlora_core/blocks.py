"""Strength per block, part and stream of FLUX, as data: nothing is multiplied before a merge is computed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .errors import SettingError, TargetError
from .targets import layer_kind

LIMIT = 4.0  # strengths of all nodes lie in -4 to 4
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
    found: list[BlockRange] = []
    for part in (part.strip() for part in re.split(r"[,;\n]", text)):
        if not part:
            continue
        match = _RANGE.fullmatch(part)
        if not match:
            raise SettingError(f"{what}: {part!r} is not a block range; write blocks and a factor, as in '0-9: 0.5'")
        one = BlockRange(int(match[1]), int(match[2] or match[1]), parse_factor(match[3], f"{what}: {part!r}"))
        if one.last < one.first:
            raise SettingError(f"{what}: {part!r} ends before it begins")
        for other in found:
            if one.first <= other.last and other.first <= one.last:
                raise SettingError(f"{what}: {part!r} and {_shown(other)!r} share blocks; give each block one factor")
        found.append(one)
    return tuple(found)


def parse_factor(text: str, where: str) -> float:
    """A number from -4 to 4.

    Raises:
        SettingError: it is none; `where` begins the message.
    """
    try:
        value = float(text)
    except ValueError:
        raise SettingError(f"{where}: {text.strip()!r} is not a number") from None
    if not abs(value) <= LIMIT:  # false for NaN too
        raise SettingError(f"{where}: {text.strip()} is out of range; use {-LIMIT:g} to {LIMIT:g}")
    return value


def _shown(one: BlockRange) -> str:
    blocks = f"{one.first}" if one.first == one.last else f"{one.first}-{one.last}"
    return f"{blocks}: {one.factor:g}"
