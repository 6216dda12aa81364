"""A base model's weights under diffusers' names, from a ComfyUI single file or a diffusers folder, read when used."""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrlora_core import FileFormatError, LayerTarget, TensorFile, match_targets, model_fingerprint
from qrlora_core.families import network_order
from qrlora_core.storage import TensorSpec

from ..errors import TrainError
from .backbones import BACKBONES, Backbone, ModelFacts, count_blocks, foreign, recognised
from .files import files_by_key, located, read_table, require_all_files
from .parts import parts_of
from .quantized import dequantized, is_config, quantization_configs

_LARGEST_SETTING = 1 << 20  # of a number in config.json


class BaseModel:
    """A transformer on disk, read tensor by tensor.

    Attributes:
        path: the file or folder.
        backbone: its family, with this model's own `process`.
        specs: diffusers' parameter name -> shape, and the dtype that `tensor` gives.
        formats: in which its weights are stored.
        facts: what the shapes tell.
        config: arguments of diffusers' model class, read off the weights (or the folder's config.json).
        blocks: list of blocks -> how many it has.

    Raises:
        TrainError: reason "model": missing, unreadable, of no family that is known, or stored in a way that cannot be
            read as numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = located(Path(path))
        try:
            files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
            opened = [TensorFile(file, skip_other=True) for file in files]
        except FileFormatError as error:
            raise TrainError("model", str(error)) from error
        require_all_files(self.path)
        self._file_of = files_by_key(opened, self.path.name)
        stored = {key: _spec(file, key) for key, file in self._file_of.items()}
        configs: dict[str, Any] = {}
        for file in opened:
            tensors = {key: file.tensor(key).numpy().tobytes() for key in file.other if is_config(key)}
            configs |= quantization_configs(file.metadata, tensors, file.path.name)
        self.backbone, prefix, native = _recognised(stored, self.path.name)
        if self.backbone.process_of is not None:
            keys = {key.removeprefix(prefix) for key in stored}
            self.backbone = replace(self.backbone, process=self.backbone.process_of(keys, self.path))
        self._parts = parts_of(self.backbone, prefix, native, stored, configs, self.path.name)
        self._rows = {part.key: stored[part.key].shape[0] for part in self._parts.values()}
        self.specs = {
            name: TensorSpec(torch.float32 if part.quantization else stored[part.key].dtype, part.shape)
            for name, part in self._parts.items()
        }
        self.formats = sorted(
            {
                part.quantization.format if part.quantization else str(stored[part.key].dtype).removeprefix("torch.")
                for part in self._parts.values()
            }
        )
        self.facts = _facts(self.backbone, self.specs, self.path.name)
        uneven = self.backbone.uneven
        counts = {name: count_blocks(self.specs, name, uneven) for name in self.backbone.block_lists}
        self.blocks = {name: count for name, count in counts.items() if count}
        self.config = _config(self)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the weights, see `qrlora_core.model_fingerprint`."""
        return model_fingerprint(self.path)

    def tensor(self, name: str) -> Tensor:
        """One parameter: in the file's dtype, or in float32 where it is stored quantised."""
        part = self._parts[name]
        file = self._file_of[part.key]
        rows = math.prod(part.shape) if part.folded else part.shape[0]
        tensor = file.rows(part.key, part.start, rows)
        if part.quantization is not None:
            scales = tuple(self._file_of[key].tensor(key) for key in part.quantization.scales)
            tensor = dequantized(part.quantization, tensor, scales, part.start, self._rows[part.key])
        if part.swap:  # ComfyUI has shift before scale, diffusers scale before shift
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor.reshape(part.shape) if part.folded else tensor

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The floating dtype that a parameter is stored in, None for 4- and 8-bit formats with scales."""
        part = self._parts[name]
        return None if part.quantization is not None else self.specs[name].dtype

    def targets(self, wanted: Iterable[str] = ()) -> tuple[LayerTarget, ...]:
        """The layers to adapt: `wanted` names or dotted suffixes, by default the published ones.

        Raises:
            TargetError: a target matches nothing; the message names the nearest candidates.
        """
        layers = sorted((name.removesuffix(".weight") for name in self.specs if self.is_layer(name)), key=network_order)
        chosen = match_targets(wanted, layers) if wanted else tuple(filter(self.backbone.is_default, layers))
        return tuple(LayerTarget(name, _pair(self.specs[f"{name}.weight"].shape)) for name in chosen)

    def is_layer(self, name: str) -> bool:
        """Whether a parameter is the weight of a linear layer of a block."""
        spec = self.specs.get(name)
        return (
            spec is not None
            and len(spec.shape) == 2
            and name.endswith(".weight")
            and bool(self.backbone.block_of(name))
        )

    def in_layer(self, name: str) -> bool:
        """Whether a parameter is the weight or bias of such a layer: what may be held in few bits."""
        return self.is_layer(f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name)

    def weight(self, layer: str) -> Tensor:
        """(out, in) of a layer, as `tensor` gives it."""
        return self.tensor(f"{layer}.weight")


def _spec(file: TensorFile, key: str) -> TensorSpec:
    return file.specs[key] if key in file.specs else file.other[key]


def _recognised(stored: Mapping[str, TensorSpec], title: str) -> tuple[Backbone, str, bool]:
    """Family, prefix of the keys, and whether they are diffusers'.

    Raises:
        TrainError: none of the families; the message says what it looks like.
    """
    family = recognised(stored)
    if family is not None:
        return family
    kind = foreign(stored)
    *titles, last = (backbone.title for backbone in BACKBONES)
    titles_text = f"{', '.join(titles)} or {last}" if titles else last
    marks = ", ".join(backbone.file_mark or backbone.folder_mark for backbone in BACKBONES)
    raise TrainError(
        "model",
        f"{title} is not a {titles_text} transformer{f' but {kind}' if kind else ''}: it begins with "
        f"{', '.join(list(stored)[:3]) or 'nothing'}. Expected a ComfyUI file with {marks}, or a diffusers folder. "
        f"{BACKBONES[0].advice}",
    )


def _facts(backbone: Backbone, specs: Mapping[str, TensorSpec], title: str) -> ModelFacts:
    """What the shapes tell; families read them as those of their own model, and a damaged file has others."""
    try:
        return backbone.facts(specs, title)
    except (ValueError, IndexError, ArithmeticError) as error:
        raise TrainError(
            "model", f"{title} is damaged: its tensors have shapes that {backbone.model_class} cannot have ({error})"
        ) from error


def _config(model: BaseModel) -> dict[str, Any]:
    """Arguments of diffusers' class; a folder's config.json has its say where shapes tell nothing."""
    backbone, path = model.backbone, model.path
    arguments = dict(model.facts.arguments)
    own = path / "config.json"
    if path.is_dir() and own.is_file():
        stated = read_table(own)
        if stated.get("_class_name", backbone.model_class) != backbone.model_class:
            raise TrainError("model", f"{path.name} holds a {stated['_class_name']}, expected {backbone.model_class}")
        for key in backbone.stated:
            if key in stated:
                _require_like(stated[key], arguments.get(key), f"{own.name} of {path.name}: {key}")
                arguments[key] = stated[key]
    head, axes = arguments.get("attention_head_dim"), arguments.get("axes_dims_rope")
    if axes is not None and sum(axes) != head:
        raise TrainError("model", f"{path.name} has heads of {head}, its positions take {sum(axes)}")
    return arguments


def _require_like(value: Any, usual: Any, where: str) -> None:
    """Raise TrainError when a setting of a folder's config.json is of another type than it usually is, or no size."""
    sizes = value if isinstance(value, list) else [value]
    numbers = all(type(size) in (int, float, bool) and 0 <= size < _LARGEST_SETTING for size in sizes)
    if not numbers or (usual is not None and isinstance(value, list) != isinstance(usual, list | tuple)):
        raise TrainError("model", f"{where} is {value!r:.80}, expected something like {usual!r}")


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    out, width = shape
    return out, width
