"""Block strengths by name: presets that all families have or one of them, and strengths of a person's own as JSON."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from .blocks import LIMIT, BlockRange, BlockScale, parse_kind_ranges
from .errors import FileFormatError, SettingError, TargetError
from .families import FAMILIES, OTHER, Family, layer_kind, network_order

Block = tuple[str, int]  # kind and number

# Which share of the blocks, in network order, keeps 1; all else is off
_DEPTHS = {"first half": (0.0, 0.5), "middle half": (0.25, 0.75), "second half": (0.5, 1.0)}
# Which factor of a BlockScale is 0
_PARTS = {
    "without attention": "attention",
    "without feed-forward": "feed_forward",
    "without image stream": "image",
    "without text stream": "text",
}
_FACTORS = ("double", "single", "attention", "feed_forward", "image", "text")
_VERSION = 1
_MOST_RANGES = 1000
LARGEST_FILE = 100_000  # bytes of JSON


def preset_names(family: Family | None = None) -> tuple[str, ...]:
    """Names of the presets that a family has; of all families without one."""
    own = [preset.name for owner in (FAMILIES if family is None else (family,)) for preset in owner.presets]
    return tuple(dict.fromkeys([*_DEPTHS, *_PARTS, *own]))


def preset_scale(preset: str, names: Iterable[str], family: Family | None) -> BlockScale:
    """The factors that a preset gives to an adapter's layers.

    Args:
        preset: one of `preset_names`.
        names: the layers.
        family: theirs; without one there are no kinds of blocks, and so no presets.

    Raises:
        SettingError: there is no such preset.
        TargetError: it is for another family, or for blocks that the adapter does not have.
    """
    if preset not in preset_names():
        raise SettingError(f"preset is {preset!r:.80}, expected one of {', '.join(preset_names())}")
    if family is None:
        raise TargetError(f"the preset {preset!r} needs kinds of blocks, and no family knows the adapter's layers")
    if preset in _PARTS:
        off: dict[str, Any] = {_PARTS[preset]: 0.0}
        return BlockScale(family=family, **off)
    present = blocks_of(names, family)
    blocks = [block for block in present if block[0] != OTHER]
    if preset in _DEPTHS:
        low, high = (math.floor(share * len(blocks) + 0.5) for share in _DEPTHS[preset])
        kept = blocks[low:high]
        factors: Mapping[Block, float] = {block: float(block in kept) for block in present}
    else:
        factors = _family_factors(preset, present, family)
    if not any(factors.get(block, 1.0) for block in blocks):
        raise TargetError(f"the preset {preset!r} is for blocks that this adapter does not have")
    return BlockScale(other_ranges=_ranges(factors), family=family)


def blocks_of(names: Iterable[str], family: Family | None) -> list[Block]:
    """The blocks that some layers are in, in network order; layers outside of blocks are the block ("other", 0)."""
    kinds = (layer_kind(name, family) for name in sorted(names, key=network_order))
    return list(dict.fromkeys((kind.block, kind.number) for kind in kinds))


def combined(first: BlockScale, second: BlockScale) -> BlockScale:
    """Both at once: their factors multiply."""
    factors: dict[str, Any] = {name: getattr(first, name) * getattr(second, name) for name in _FACTORS}
    ranges = [entry for scale in (first, second) for entry in _all_ranges(scale)]
    return BlockScale(**factors, other_ranges=tuple(ranges), family=first.family or second.family)


def block_factors(scale: BlockScale, names: Iterable[str]) -> dict[str, list[tuple[int, float, float, float]]]:
    """Kind of block -> (number, mean, lowest, highest factor of its layers) of each, in network order."""
    layers: dict[Block, list[float]] = {}
    for name in sorted(names, key=network_order):
        kind = layer_kind(name, scale.family)
        layers.setdefault((kind.block, kind.number), []).append(scale.factor(name))
    by_kind: dict[str, list[tuple[int, float, float, float]]] = {}
    for (block, number), factors in layers.items():
        by_kind.setdefault(block, []).append((number, sum(factors) / len(factors), min(factors), max(factors)))
    return by_kind


def scale_to_json(scale: BlockScale) -> str:
    """Block strengths as a small text that `scale_from_json` reads.

    Raises:
        SettingError: two factors multiplied to more than one may be.
    """
    beyond = [value for value in (getattr(scale, name) for name in _FACTORS) if abs(value) > LIMIT]
    if beyond:
        raise SettingError(f"a factor of {beyond[0]:g} cannot be saved; {-LIMIT:g} to {LIMIT:g} can")
    ranges = [
        [kind, block_range.first, block_range.last, block_range.factor] for kind, block_range in _all_ranges(scale)
    ]
    factors = {name: getattr(scale, name) for name in _FACTORS}
    family = scale.family.name if scale.family else None
    return json.dumps({"qrlora.blocks": _VERSION, "family": family, **factors, "ranges": ranges}, indent=1) + "\n"


def scale_from_json(text: str, title: str, family: Family | None) -> BlockScale:
    """Block strengths that somebody saved.

    Args:
        text: JSON.
        title: how to call it in messages.
        family: of the adapter that they are for; ranges are checked against its layers when they are used.

    Raises:
        FileFormatError: it is no such text, or a factor is out of range.
    """
    try:
        table = json.loads(text)
        if not isinstance(table, dict) or table.get("qrlora.blocks") != _VERSION:
            raise ValueError("it does not say 'qrlora.blocks': 1")
        if len(table.get("ranges", [])) > _MOST_RANGES:
            raise ValueError(f"it has more than {_MOST_RANGES} ranges")
        ranges = tuple(_range(entry) for entry in table.get("ranges", []))
        factors: dict[str, Any] = {name: _factor(table.get(name, 1.0)) for name in _FACTORS}
    except (ValueError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{title} holds no block strengths: {error}") from error
    return BlockScale(**factors, other_ranges=ranges, family=family)


def _family_factors(preset: str, present: list[Block], family: Family) -> Mapping[Block, float]:
    chosen = next((entry for entry in family.presets if entry.name == preset), None)
    if chosen is None:
        raise TargetError(f"{family.name} has no preset {preset!r}; it has {', '.join(preset_names(family))}")
    named = parse_kind_ranges(chosen.ranges, preset)
    factors = {}
    for kind, number in present:
        fits = (entry.factor for name, entry in named if name == kind and entry.first <= number <= entry.last)
        factors[kind, number] = next(fits, chosen.rest)
    return factors


def _ranges(factors: Mapping[Block, float]) -> tuple[tuple[str, BlockRange], ...]:
    """Neighbours of one kind and factor together; those that keep 1 are left out."""
    joined: list[tuple[str, BlockRange]] = []
    for (kind, number), factor in factors.items():
        last = joined[-1] if joined else None
        if last is not None and last[0] == kind and last[1].last == number - 1 and last[1].factor == factor:
            joined[-1] = (kind, BlockRange(last[1].first, number, factor))
        else:
            joined.append((kind, BlockRange(number, number, factor)))
    return tuple(entry for entry in joined if entry[1].factor != 1)


def _all_ranges(scale: BlockScale) -> list[tuple[str, BlockRange]]:
    own = [("double", block_range) for block_range in scale.double_ranges] + [
        ("single", block_range) for block_range in scale.single_ranges
    ]
    return [*own, *scale.other_ranges]


def _range(entry: Any) -> tuple[str, BlockRange]:
    kind, first, last, factor = entry
    if not isinstance(kind, str) or not kind.isidentifier() or type(first) is not int or type(last) is not int:
        raise ValueError(f"{entry!r:.80} is not [kind, first, last, factor]")
    if not 0 <= first <= last <= 9999:
        raise ValueError(f"{entry!r:.80} has no such blocks")
    return kind, BlockRange(first, last, _factor(factor))


def _factor(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LIMIT:  # also for NaN
        raise ValueError(f"{value!r:.40} is not a factor from {-LIMIT:g} to {LIMIT:g}")
    return float(value)
