"""Finding layers in the families' tables, by diffusers' names and by native ones, with dots or with underscores."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..errors import TargetError
from ..targets import LayerTarget, WeightSlice, nearest
from .chroma import CHROMA
from .flux import FLUX
from .flux2 import FLUX2
from .krea2 import KREA2
from .qwen_image import QWEN_IMAGE
from .record import BlockKind, Family, Layer
from .sd3 import SD3
from .sdxl import SDXL
from .z_image import Z_IMAGE

# Where two know the same names of a file, the first of them is taken
FAMILIES: tuple[Family, ...] = (FLUX, FLUX2, CHROMA, Z_IMAGE, QWEN_IMAGE, KREA2, SD3, SDXL)
OTHER = "other"
_SHAPE_TOLERANCE = 0.02


class LayerKind(NamedTuple):
    """What a layer is in its network.

    Attributes:
        block: kind of block: "double" (image and text have weights of their own), "single" (they share them), a kind
            of its family's own, or "other" outside of blocks and for layers that no family here knows.
        number: of the block among its kind.
        layer: the rest of the name, such as "attn.to_q".
        part: "attention", "feed_forward" (with the layer that closes a single block's both), "modulation" or "other".
        stream: "image", "text", or "both" where they share weights.
    """

    block: str
    number: int
    layer: str
    part: str
    stream: str


class TableEntry(NamedTuple):
    """A name in a family's table: the block, and the layers that the name stands for (several in a fused module)."""

    kind: BlockKind
    running: int
    layers: tuple[Layer, ...]
    native: bool

    def name(self, layer: Layer) -> str:
        """Diffusers' name of one of the layers."""
        return _joined(self.kind.path.format(self.running), layer.suffix)

    @property
    def module(self) -> str:
        """The native name of the module that holds the layers."""
        return _joined(self.kind.native.format(self.running), self.layers[0].module)

    @property
    def number(self) -> int:
        return self.running if self.kind.number is None else self.kind.number


def find(family: Family, name: str) -> TableEntry | None:
    """The layers that a name stands for in a family: diffusers' or native, dots written as dots or as underscores."""
    numbered, fixed = _tables(family)
    plain = name.replace(".", "_")
    hits = [TableEntry(kind, 0, layers, native) for kind, layers, native in fixed.get(plain, ())]
    for pattern, kind, suffixes, native in numbered:
        match = pattern.fullmatch(plain)
        if match and match[2] in suffixes:
            hits.append(TableEntry(kind, int(match[1]), suffixes[match[2]], native))
    return hits[0] if hits else None


def family_of(shapes: Mapping[str, Sequence[int]]) -> Family | None:
    """The family that knows most of these names, their shapes agreeing; None when none knows any.

    Args:
        shapes: layer or module name -> shape of its weight, (out, in, ...); an empty shape tells nothing.
    """
    return next(iter(likely_families(shapes)), None)


def likely_families(shapes: Mapping[str, Sequence[int]]) -> tuple[Family, ...]:
    """The families that know most of these names equally well, in the order of `FAMILIES`; see `family_of`.

    Several where the names do not tell: FLUX.1 and Chroma have the same attention and feed-forward layers.
    """
    scores = {family: _score(family, shapes) for family in FAMILIES}
    best = max(scores.values())
    return tuple(family for family in FAMILIES if scores[family] == best) if best[0] > 0 else ()


def family_of_targets(targets: Iterable[LayerTarget]) -> Family | None:
    """The family that some layers are of."""
    return family_of({target.name: target.shape for target in targets})


def layer_kind(name: str, family: Family | None = None) -> LayerKind:
    """Block, part and stream of a layer.

    Args:
        name: diffusers' name; a native one will do.
        family: where to look; by default in all, which is ambiguous where two families share a name.
    """
    for searched in (family,) if family is not None else FAMILIES:
        entry = find(searched, name)
        if entry is not None:
            layer = entry.layers[0]
            return LayerKind(entry.kind.name, entry.number, layer.suffix, layer.part, layer.stream)
    return LayerKind(OTHER, 0, name, OTHER, "both")


def network_order(name: str) -> tuple[int, int, int, str]:
    """Sort key: kinds of blocks as the families list them, then by block, then in the order of their tables.

    Layers that no family knows come last, in natural order (block 2 before block 10).
    """
    key = _network_order(name)
    return key


def is_known(name: str) -> bool:
    """Whether a name is diffusers' own for a layer of some family."""
    entries = [find(family, name) for family in FAMILIES]
    return any(entry is not None and entry.name(entry.layers[0]) == name for entry in entries)


def has_layer(family: Family, name: str) -> bool:
    """Whether a name is diffusers' own for a layer of this family."""
    entry = find(family, name)
    return entry is not None and entry.name(entry.layers[0]) == name


def native_place(family: Family, name: str, shape: Sequence[int]) -> WeightSlice:
    """Where the family's native layout keeps the layer `name` whose weight has `shape` (out, in).

    Raises:
        TargetError: the family has no such layer.
    """
    entry = find(family, name)
    if entry is None or entry.name(entry.layers[0]) != name:
        names = [_joined(kind.path.format(0), layer.suffix) for kind in family.block_kinds for layer in kind.layers]
        raise TargetError(f"{name!r} is not a layer of {family.name}{nearest(name, names)}")
    layer = entry.layers[0]
    module = f"{entry.module}.weight"
    before = [sibling for sibling in entry.kind.layers if sibling.module == layer.module]
    if len(before) == 1:
        return WeightSlice(module, None, None)
    start = sum(_rows(sibling, shape[1]) for sibling in before[: before.index(layer)])
    return WeightSlice(module, start, shape[0])


def native_layers(family: Family, module: str) -> tuple[str, ...]:
    """The diffusers names of the layers that a native module holds, in row order; empty for any other name."""
    entry = find(family, module)
    if entry is None or entry.module != module:
        return ()
    return tuple(entry.name(layer) for layer in entry.kind.layers if layer.module == entry.layers[0].module)


def cut(entry: TableEntry, shape: Sequence[int]) -> dict[str, tuple[int, int]] | None:
    """Diffusers' name -> (first row, rows) of each layer in a module with this shape (out, in); None if it has others.

    The last layer has the rest of the rows. A module that ends with a whole layer may leave the others out.
    """
    rows, columns = shape[0], shape[1]
    places, start = {}, 0
    for layer in entry.layers:
        last = layer is entry.layers[-1]
        size = rows - start if last else _rows(layer, columns)
        if size <= 0 or start + size > rows:
            return None
        places[entry.name(layer)] = (start, size)
        start += size
        if start == rows:
            return places
    return None


def published_layers(family: Family, shapes: Mapping[str, Sequence[int]]) -> tuple[LayerTarget, ...]:
    """The layers that are adapted by default in a model with these native modules, in network order."""
    targets = []
    for module, shape in shapes.items():
        entry = find(family, module) if len(shape) > 1 else None
        if entry is None or not any(layer.published for layer in entry.layers):
            continue
        columns = 1
        for size in shape[1:]:
            columns *= size
        suffixes = {entry.name(layer) for layer in entry.layers if layer.published}
        for name, (_, rows) in (cut(entry, (shape[0], columns)) or {}).items():
            if name in suffixes:
                targets.append(LayerTarget(name, (rows, columns)))
    return tuple(sorted(targets, key=lambda target: network_order(target.name)))


def _joined(block: str, suffix: str) -> str:
    return f"{block}.{suffix}" if block else suffix


def _rows(layer: Layer, columns: int) -> int:
    if layer.rows is None:
        raise TargetError(f"{layer.suffix} has no fixed number of rows, so {layer.module} cannot be cut")
    return round(layer.rows * columns)


_Numbered = tuple[re.Pattern[str], BlockKind, dict[str, tuple[Layer, ...]], bool]


@functools.cache
def _tables(family: Family) -> tuple[list[_Numbered], dict[str, list[tuple[BlockKind, tuple[Layer, ...], bool]]]]:
    """Patterns of numbered blocks, and the whole names of all others; both with underscores for dots."""
    numbered: list[_Numbered] = []
    fixed: dict[str, list[tuple[BlockKind, tuple[Layer, ...], bool]]] = {}
    for kind in family.block_kinds:
        own = {layer.suffix: (layer,) for layer in kind.layers}
        modules: dict[str, tuple[Layer, ...]] = {}
        for layer in kind.layers:
            modules[layer.module] = modules.get(layer.module, ()) + (layer,)
        others = {theirs: modules[ours] for theirs, ours in family.aliases if ours in modules}
        for path, names, native in ((kind.path, {**others, **own}, False), (kind.native, {**others, **modules}, True)):
            flat = {name.replace(".", "_"): layers for name, layers in names.items()}
            if "{}" in path:
                before, after = path.replace(".", "_").split("{}")
                pattern = re.compile(rf"{re.escape(before)}(0|[1-9]\d{{0,3}}){re.escape(after)}_(.+)")
                numbered.append((pattern, kind, flat, native))
                continue
            prefix = path.replace(".", "_") + "_" if path else ""
            for name, layers in flat.items():
                fixed.setdefault(prefix + name, []).append((kind, layers, native))
    return numbered, fixed


def _score(family: Family, shapes: Mapping[str, Sequence[int]]) -> tuple[float, int]:
    """How many names a family knows (half where the shape is not the family's), and by how few blocks it is larger.

    0 when it knows none in any block: what lies outside of blocks has the same names in models of many families.
    """
    score, highest, in_blocks = 0.0, 0, False
    largest = max(kind.blocks for kind in family.block_kinds)
    swapped = {theirs.replace(".", "_") for theirs, _ in family.swapped}
    flat_marks = tuple(mark.replace(".", "_") for mark in family.marks)
    for name, shape in shapes.items():
        entry = find(family, name)
        if name.replace(".", "_").startswith(flat_marks) and flat_marks:
            score += 10
            in_blocks = True
        if entry is None:
            score += name.replace(".", "_") in swapped
            continue
        ratios = [layer.rows for layer in entry.layers]
        expected = None if None in ratios else sum(ratio for ratio in ratios if ratio is not None)
        likely = expected is None or len(shape) != 2 or abs(shape[0] / shape[1] / expected - 1) < _SHAPE_TOLERANCE
        score += 1.0 if likely else 0.5
        in_blocks = in_blocks or bool(entry.kind.path)
        if "{}" in entry.kind.path:
            highest = max(highest, entry.running + 1)
    return (score if in_blocks else 0.0), -max(0, highest - largest)


@functools.cache
def _ranks() -> dict[str, tuple[int, dict[str, int]]]:
    """Path of a block kind -> its rank among all, and the positions of its suffixes in all families' tables."""
    ranks: dict[str, tuple[int, dict[str, int]]] = {}
    for family in FAMILIES:
        for kind in family.block_kinds:
            rank = len(ranks) if kind.path else len(FAMILIES) * 1000
            _, positions = ranks.setdefault(kind.path, (rank, {}))
            for layer in kind.layers:
                positions.setdefault(layer.suffix, len(positions))
    return ranks


@functools.lru_cache(maxsize=1 << 16)
def _network_order(name: str) -> tuple[int, int, int, str]:
    for family in FAMILIES:
        entry = find(family, name)
        if entry is not None and entry.name(entry.layers[0]) == name:
            rank, positions = _ranks()[entry.kind.path]
            return (rank, entry.running, positions[entry.layers[0].suffix], name)
    natural = re.sub(r"\d+", lambda match: match[0].zfill(6), name)
    return (len(FAMILIES) * 1000 + 1, 0, 0, natural)
