"""What the trainer has to know of a family of models; each family is one record in a file of its own beside this one.

`fit` and everything around it speak only to these records: what a family calls its layers, how latents become tokens,
what its transformer is called with, and what it gives back.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qrlora_core import EncodedText
from qrlora_core.storage import TensorSpec

from ...errors import TrainError
from .pipeline import Pipeline
from .process import FLOW, Process

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
        since: the first version of diffusers that has it and that the trainer works with.
        file_mark: a key that ComfyUI's files of the family have and no other's; "" when they use diffusers' names.
        folder_mark: a key that diffusers' folders of the family have and no other's.
        block_lists: where the model's lists of blocks lie, in network order; a model need not have all of them.
        activation_counts: for each of them what autograd keeps of a block, in multiples of tokens * hidden size.
        activations: (specs, height and width of the latents, tokens of the text) -> how many numbers autograd keeps of
            each block for a picture, and how many where it is recomputed; where that is no multiple of tokens * hidden
            size.
        default_layers: for each of them which layers are adapted unless others are named.
        stored_rows: a key of ComfyUI's files, without prefix, and its number of rows -> diffusers' parameters; nothing
            for a key that is no parameter.
        swapped: diffusers' parameters whose halves change places (shift and scale).
        swapped_in_last: the same of the last block of the first list, without its name.
        folded: ending of diffusers' parameters that ComfyUI keeps as one row -> how many rows they are.
        uneven: whether blocks of one list have other layers than each other.
        facts: reads specs by diffusers' names, with the title of the file for messages.
        patch: side of the square of latent pixels that makes a token.
        stated: arguments that shapes do not tell; a folder's config.json has its say on them.
        inputs: (model, latents, sigmas, text, guidance) -> arguments of the transformer. Latents are (batch, channels,
            height, width), sigmas (batch,), the text's tensors have a batch dimension; all on the model's device, in
            its dtype but for the sigmas.
        prediction: (what the transformer gave, latents' shape) -> what `process` says that it predicts, of that shape.
        shift: tokens of a picture -> factor by which sampling moves sigmas towards noise.
        process: what noise is to it, and what it predicts.
        process_of: (keys of a file or folder, its path) -> the same of that model, where models of the family differ.
        pipeline: how its diffusers pipelines encode and draw.
        text_fields: of an EncodedText, what the transformer takes.
    """

    family: str
    title: str
    advice: str
    model_class: str
    since: str
    file_mark: str
    folder_mark: str
    block_lists: tuple[str, ...]
    default_layers: Mapping[str, tuple[str, ...]]
    stored_rows: Callable[[str, int], Sequence[StoredRows]]
    facts: Callable[[Specs, str], ModelFacts]
    inputs: Callable[[Any, Tensor, Tensor, EncodedText, float], dict[str, Any]]
    prediction: Callable[[Any, torch.Size], Tensor]
    shift: Callable[[int], float]
    pipeline: Pipeline
    text_fields: tuple[str, ...] = ("embeds",)
    swapped: frozenset[str] = frozenset()
    swapped_in_last: tuple[str, ...] = ()
    activation_counts: Mapping[str, float] = field(default_factory=dict)
    activations: Callable[[Specs, int, int, int], tuple[list[float], list[float]]] | None = None
    folded: Mapping[str, int] = field(default_factory=dict)
    uneven: bool = False
    stated: tuple[str, ...] = ()
    patch: int = 2
    process: Process = FLOW
    process_of: Callable[[Collection[str], Path], Process] | None = None

    def tokens(self, height: int, width: int) -> int:
        """How many tokens latents of this size are."""
        return height * width // self.patch**2

    def block_of(self, name: str) -> str:
        """`transformer_blocks.3` of `transformer_blocks.3.attn.to_q.weight`; "" outside of the blocks."""
        for blocks in self.block_lists:
            if name.startswith(f"{blocks}."):
                number, inside, _ = name.removeprefix(f"{blocks}.").partition(".")
                return f"{blocks}.{number}" if inside else ""
        return ""

    def is_default(self, layer: str) -> bool:
        """Whether a layer is adapted unless others are named."""
        block = self.block_of(layer)
        return layer.removeprefix(f"{block}.") in self.default_layers.get(block.rpartition(".")[0], ())


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
        if name.startswith(f"{blocks}."):
            number, _, suffix = name.removeprefix(f"{blocks}.").partition(".")
            if number.isdecimal() and len(number) < 5:
                held.setdefault(int(number), set()).add(suffix)
    if set(held) != set(range(len(held))):
        raise TrainError("model", f"{blocks} are numbered {sorted(held)}: some are missing")
    whole = set().union(*held.values())
    for block, suffixes in held.items():
        if suffixes != whole and not uneven:
            lacking = f"{blocks}.{block}.{min(whole - suffixes)}"
            raise TrainError("model", f"{lacking} is missing: the file is not complete")
    return len(held)
