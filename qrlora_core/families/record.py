"""What is known of a model family before any model is at hand: names, shapes by proportion, kinds of blocks."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Part = Literal["attention", "feed_forward", "modulation", "other"]
Stream = Literal["image", "text", "both"]


class Layer(NamedTuple):
    """One linear layer (or convolution) of a block.

    Attributes:
        suffix: its diffusers name within the block, such as "attn.to_q".
        module: its name in the family's native layout, in which ComfyUI, kohya and others keep it. Layers of one
            block that share a module lie in it one below the other, in the order of the table.
        part, stream: see `LayerKind`.
        rows: rows of its weight for each column, where the family fixes that. A fused module is cut by it; it also
            tells families apart that share names.
        published: whether it is adapted by default.
    """

    suffix: str
    module: str
    part: Part
    stream: Stream = "both"
    rows: float | None = None
    published: bool = False


class BlockKind(NamedTuple):
    """Blocks of one kind, with the layers that each of them has.

    Attributes:
        name: what block strengths call it, such as "double".
        path, native: where a block lies in diffusers' and in the native layout, {} standing for its number; without
            {} there is one. Both are empty for layers outside of blocks.
        layers: in network order.
        blocks: how many blocks the released models have.
        number: the block's number where the path does not hold it.
    """

    name: str
    path: str
    native: str
    layers: tuple[Layer, ...]
    blocks: int = 0
    number: int | None = None


class Preset(NamedTuple):
    """Block strengths by a name.

    Attributes:
        name: what a person chooses.
        ranges: factors of some blocks, such as "single: 0" or "output 1: 1".
        rest: factor of all other blocks, and of layers outside of blocks.
    """

    name: str
    ranges: str
    rest: float = 1.0


DOUBLE_OR_SINGLE = (Preset("only double blocks", "double: 1", 0.0), Preset("only single blocks", "single: 1", 0.0))


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A model family, as data.

    Attributes:
        name: what people call it.
        architecture: `modelspec.architecture` of a LoRA for it.
        block_kinds: in network order.
        marks: names (diffusers or native) that begin so are found in this family only.
        aliases: other names of native modules: (theirs, the table's).
        swapped: (diffusers' name, native module) of layers whose two halves of rows change places between the layouts.
        portable: how a file names a layer that every LoRA loader finds. "transformer." is followed by the layer's
            name; after an ending "_" its dots become "_" too.
        widened: (native module, keys) of LoRAs that make a module larger: a file that has all of the keys is one.
        presets: block strengths by name, beside those that every family has.
    """

    name: str
    architecture: str
    block_kinds: tuple[BlockKind, ...]
    marks: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    swapped: tuple[tuple[str, str], ...] = ()
    portable: str = "transformer."
    widened: tuple[tuple[str, tuple[str, ...]], ...] = ()
    presets: tuple[Preset, ...] = ()


def layers_of(pairs: dict[str, str], part: Part, stream: Stream = "both", published: bool = False) -> tuple[Layer, ...]:
    """Layers from diffusers suffix -> native module, all of one part and stream."""
    return tuple(Layer(suffix, module, part, stream, published=published) for suffix, module in pairs.items())


def outside(pairs: dict[str, str]) -> BlockKind:
    """The layers outside of blocks: diffusers name -> native name."""
    return BlockKind("other", "", "", layers_of(pairs, "other"))
