"""Layers by name and shape, and choosing some of them. Which layers a model has is known to `families`.

Names are diffusers' (`transformer_blocks.0.attn.to_q`), without a trailing `.weight`. A layer that no family here
knows keeps its native name, beginning with the prefix by which any LoRA loader of the host finds it.
"""

import difflib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import TargetError

_MOST_CANDIDATES = 1000
_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class LayerTarget:
    """One layer: its name and the (out, in) shape of its weight; a convolution's (out, in * height * width)."""

    name: str
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Where a layer lies in ComfyUI's model: a key, and the rows `start : start + length` of it (None: all of it)."""

    key: str
    start: int | None
    length: int | None


def match_targets(targets: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The names that `targets` select, in the order of `names`.

    A target matches a name exactly or as a whole dotted suffix: "attn.to_q" selects
    "transformer_blocks.0.attn.to_q" and not "...attn.to_qkv". A trailing ".weight" is ignored on both sides.

    Raises:
        TargetError: a target matches nothing; the message names the nearest candidates.
    """
    plain = [name.removesuffix(".weight") for name in names]
    chosen: set[str] = set()
    for target in (target.removesuffix(".weight") for target in targets):
        matching = [name for name in plain if name == target or name.endswith(f".{target}")]
        if not matching:
            raise TargetError(f"target {target!r} matches no layer{nearest(target, plain)}")
        chosen.update(matching)
    return tuple(name for name in plain if name in chosen)


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """`; did you mean 'a', 'b'?` with the candidates (and their suffixes) closest to `name`, or an empty string."""
    pool = dict.fromkeys(itertools.islice(candidates, _MOST_CANDIDATES))
    for candidate in list(pool):
        parts = candidate.split(".")
        pool.update(dict.fromkeys(".".join(parts[index:]) for index in range(1, len(parts) - 1)))
    close = difflib.get_close_matches(name[:_LONGEST_NAME], pool, n=count, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""
