"""What the trainer has to know of a family of models; each family is one record in a file of its own beside this one.

`fit` and everything around it speak only to these records: what a family calls its layers, how latents become tokens,
what its transformer is called with, and what it gives back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qrlora_core import EncodedText
from qrlora_core.storage import TensorSpec

from ...errors import TrainError
from .pipeline import Pipeline

Specs = Mapping[str, TensorSpec]


class StoredRows(NamedTuple):
    """A parameter's name in diffusers, and which rows of a stored tensor it is."""

    name: str
    start: int
    rows: int


class ModelFacts(NamedTuple):
    """What the shapes of a model's weights tell.

    Attributes:
        arguments: of diffusers' model class.
        hidden: width of the tokens inside.
        channels: of the latents.
        text_widths: of the encoded texts, one for each of the family's `text_fields`.
    """

    arguments: dict[str, Any]
    hidden: int
    channels: int
    text_widths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """One family of models.

    Attributes:
        family: its name in `qrlora_core`.
        title: its name for people.
        advice: which models to use, for messages.
        model_class: of diffusers.
        file_mark: a key that ComfyUI's files of the family have and no other's; "" when they use diffusers' names.
        folder_mark: a key that diffusers' folders of the family have and no other's.
        block_lists: the model's lists of blocks, in network order.
        activation_counts: for each of them what autograd keeps of a block, in multiples of tokens * hidden size.
        default_layers: for each of them which layers are adapted unless others are named.
        stored_rows: a key of ComfyUI's files, without prefix, and its number of rows -> diffusers' parameters; nothing
            for a key that is no parameter.
        swapped: diffusers' parameters whose halves change places (shift and scale).
        swapped_in_last: the same of the last block of the first list, without its name.
        uneven: whether blocks of one list have other layers than each other.
        facts: reads specs by diffusers' names, with the title of the file for messages.
        patch: side of the square of latent pixels that makes a token.
        stated: arguments that shapes do not tell; a folder's config.json has its say on them.
        inputs: (model, latents, sigmas, text, guidance) -> arguments of the transformer. Latents are (batch, channels,
            height, width), sigmas (batch,), the text's tensors have a batch dimension; all on the model's device, in
            its dtype but for the sigmas.
        velocity: (what the transformer gave, latents' shape) -> the velocity from picture to noise, of that shape.
        shift: tokens of a picture -> factor by which sampling moves sigmas towards noise.
        pipeline: how its diffusers pipelines encode and draw.
        text_fields: of an EncodedText, what the transformer takes.
    """

    family: str
    title: str
    advice: str
    model_class: str
    file_mark: str
    folder_mark: str
    block_lists: tuple[str, ...]
    activation_counts: Mapping[str, float]
    default_layers: Mapping[str, tuple[str, ...]]
    stored_rows: Callable[[str, int], Sequence[StoredRows]]
    facts: Callable[[Specs, str], ModelFacts]
    inputs: Callable[[Any, Tensor, Tensor, EncodedText, float], dict[str, Any]]
    velocity: Callable[[Any, torch.Size], Tensor]
    shift: Callable[[int], float]
    pipeline: Pipeline
    text_fields: tuple[str, ...] = ("embeds",)
    swapped: frozenset[str] = frozenset()
    swapped_in_last: tuple[str, ...] = ()
    uneven: bool = False
    stated: tuple[str, ...] = ()
    patch: int = 2

    def tokens(self, height: int, width: int) -> int:
        """How many tokens latents of this size are."""
        return height * width // self.patch**2

    def block_of(self, name: str) -> str:
        """`transformer_blocks.3` of `transformer_blocks.3.attn.to_q.weight`; "" outside of the blocks."""
        parts = name.split(".", 2)
        return f"{parts[0]}.{parts[1]}" if len(parts) == 3 and parts[0] in self.block_lists else ""

    def is_default(self, layer: str) -> bool:
        """Whether a layer is adapted unless others are named."""
        kind, _, suffix = layer.split(".", 2)
        return suffix in self.default_layers.get(kind, ())


def packed(latents: Tensor) -> Tensor:
    """(batch, channels, height, width) as tokens of 2x2 pixels: (batch, height * width / 4, channels * 4)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The opposite of `packed`; `shape` is that of the latents."""
    batch, channels, height, width = shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def count_blocks(specs: Specs, blocks: str, uneven: bool = False) -> int:
    """Number of blocks in a list, once it is sure that none is missing and that each has all of its tensors.

    Of `uneven` ones only the first; loading the model compares the rest.

    Raises:
        TrainError: reason "model", naming what is missing.
    """
    held: dict[int, set[str]] = {}
    for name in specs:
        kind, _, tail = name.partition(".")
        number, _, suffix = tail.partition(".")
        if kind == blocks and number.isdecimal() and len(number) < 5:
            held.setdefault(int(number), set()).add(suffix)
    if set(held) != set(range(len(held))):
        raise TrainError("model", f"{blocks} are numbered {sorted(held)}: some are missing")
    whole = set().union(*held.values())
    for block, suffixes in held.items():
        if suffixes != whole and not uneven:
            lacking = f"{blocks}.{block}.{min(whole - suffixes)}"
            raise TrainError("model", f"{lacking} is missing: the file is not complete")
    return len(held)
