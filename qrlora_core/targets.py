"""Which layers of FLUX are adapted, and where each one lies in ComfyUI's fused weights.

Names are diffusers' (`transformer_blocks.0.attn.to_q`), without a trailing `.weight`. ComfyUI keeps q, k, v (and the
MLP of a single block) in one weight; a layer is then a slice of its rows.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .errors import TargetError

# Suffixes of the layers that the published scripts adapt.
DOUBLE_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
SINGLE_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v")

# suffix -> (module in ComfyUI, position of its rows in a fused weight, or None when the weight is its own)
_DOUBLE = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.to_out.0": ("img_attn.proj", None),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.to_add_out": ("txt_attn.proj", None),
    "ff.net.0.proj": ("img_mlp.0", None),
    "ff.net.2": ("img_mlp.2", None),
    "ff_context.net.0.proj": ("txt_mlp.0", None),
    "ff_context.net.2": ("txt_mlp.2", None),
    "norm1.linear": ("img_mod.lin", None),
    "norm1_context.linear": ("txt_mod.lin", None),
}
_SINGLE = {
    "attn.to_q": ("linear1", 0),
    "attn.to_k": ("linear1", 1),
    "attn.to_v": ("linear1", 2),
    "proj_mlp": ("linear1", 3),
    "proj_out": ("linear2", None),
    "norm.linear": ("modulation.lin", None),
}
_NAME = re.compile(r"(single_)?transformer_blocks\.(0|[1-9]\d{0,3})\.(.+)")
_FUSED_NAME = re.compile(r"(double|single)_blocks\.(0|[1-9]\d{0,3})\.(.+)\.weight")

# of a file's names that a hint looks through: real models have some hundred layers
_MOST_CANDIDATES = 1000
_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class LayerTarget:
    """One linear layer: its diffusers name and the (out, in) shape of its weight."""

    name: str
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Where a layer lies in ComfyUI's model: a key, and the rows `start : start + length` of it (None: all of it)."""

    key: str
    start: int | None
    length: int | None


class LayerKind(NamedTuple):
    """What a layer is in its network.

    Attributes:
        block: "double" (image and text have weights of their own) or "single" (they share them).
        number: of the block among its kind.
        layer: the rest of the name, such as "attn.to_q".
        part: "attention", "feed_forward" (with `proj_out` of a single block, which closes both) or "modulation".
        stream: "image", "text", or "both" in single blocks.
    """

    block: Literal["double", "single"]
    number: int
    layer: str
    part: Literal["attention", "feed_forward", "modulation"]
    stream: Literal["image", "text", "both"]


def layer_kind(name: str) -> LayerKind:
    """Block, part and stream of a layer.

    Raises:
        TargetError: no FLUX layer has that name.
    """
    module, position, _ = _locate(name)
    match = _NAME.fullmatch(name)
    assert match is not None  # _locate has refused everything else
    if match[1]:
        modulation = module == "modulation.lin"
        attention = module == "linear1" and position is not None and position < 3
        part: Literal["attention", "feed_forward", "modulation"]
        part = "modulation" if modulation else "attention" if attention else "feed_forward"
        return LayerKind("single", int(match[2]), match[3], part, "both")
    part = "attention" if "attn" in module else "feed_forward" if "mlp" in module else "modulation"
    return LayerKind("double", int(match[2]), match[3], part, "image" if module.startswith("img") else "text")


def flux_targets(num_double: int, num_single: int, hidden_size: int, mlp_ratio: int = 4) -> tuple[LayerTarget, ...]:
    """The published target layers of a FLUX with so many blocks, in network order (FLUX.1: 19, 38, 3072 -> 342)."""
    wide = hidden_size * mlp_ratio
    shapes = {"ff.net.0.proj": (wide, hidden_size), "ff_context.net.0.proj": (wide, hidden_size)}
    shapes |= {"ff.net.2": (hidden_size, wide), "ff_context.net.2": (hidden_size, wide)}
    square = (hidden_size, hidden_size)
    return tuple(
        LayerTarget(f"{kind}.{block}.{suffix}", shapes.get(suffix, square))
        for kind, count, suffixes in (
            ("transformer_blocks", num_double, DOUBLE_TARGETS),
            ("single_transformer_blocks", num_single, SINGLE_TARGETS),
        )
        for block in range(count)
        for suffix in suffixes
    )


def comfy_slice(name: str, shape: Sequence[int]) -> WeightSlice:
    """Where ComfyUI keeps the layer `name` whose weight has `shape` (out, in).

    Raises:
        TargetError: no FLUX layer has that name.
    """
    module, position, prefix = _locate(name)
    key = f"{prefix}.{module}.weight"
    if position is None:
        return WeightSlice(key, None, None)
    # q, k and v are `in` wide each, in single blocks followed by the MLP's rows
    hidden = shape[1] if module == "linear1" else shape[0]
    return WeightSlice(key, position * hidden, shape[0])


def is_flux_layer(name: str) -> bool:
    """Whether `name` is the diffusers name of a linear layer in a FLUX block."""
    match = _NAME.fullmatch(name)
    return match is not None and match[3] in (_SINGLE if match[1] else _DOUBLE)


def layer_names(comfy_key: str) -> tuple[str, ...]:
    """The diffusers names of the layers that one of ComfyUI's keys holds, in row order; empty for any other key."""
    match = _FUSED_NAME.fullmatch(comfy_key)
    if not match:
        return ()
    table, kind = (_DOUBLE, "transformer_blocks") if match[1] == "double" else (_SINGLE, "single_transformer_blocks")
    return tuple(f"{kind}.{match[2]}.{suffix}" for suffix, (module, _) in table.items() if module == match[3])


def network_order(name: str) -> tuple[int, int, int, str]:
    """Sort key: double blocks before single blocks, then by block, then in the order of the tables above."""
    match = _NAME.fullmatch(name)
    if not match:
        return (2, 0, 0, name)
    table = list(_SINGLE if match[1] else _DOUBLE)
    position = table.index(match[3]) if match[3] in table else len(table)
    return (1 if match[1] else 0, int(match[2]), position, name)


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
        found = [name for name in plain if name == target or name.endswith(f".{target}")]
        if not found:
            raise TargetError(f"target {target!r} matches no layer{nearest(target, plain)}")
        chosen.update(found)
    return tuple(name for name in plain if name in chosen)


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """`; did you mean 'a', 'b'?` with the candidates (and their suffixes) closest to `name`, or an empty string."""
    pool = dict.fromkeys(itertools.islice(candidates, _MOST_CANDIDATES))
    for candidate in list(pool):
        parts = candidate.split(".")
        pool.update(dict.fromkeys(".".join(parts[index:]) for index in range(1, len(parts) - 1)))
    close = difflib.get_close_matches(name[:_LONGEST_NAME], pool, n=count, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


def _locate(name: str) -> tuple[str, int | None, str]:
    match = _NAME.fullmatch(name)
    table = _SINGLE if match and match[1] else _DOUBLE
    if not match or match[3] not in table:
        known = [f"transformer_blocks.0.{s}" for s in _DOUBLE] + [f"single_transformer_blocks.0.{s}" for s in _SINGLE]
        raise TargetError(f"{name!r} is not a layer of FLUX{nearest(name, known)}")
    module, position = table[match[3]]
    return module, position, f"{'single' if match[1] else 'double'}_blocks.{match[2]}"
