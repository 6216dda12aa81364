"""The base model's weights under diffusers' names, from a ComfyUI single file or a diffusers folder, read when used."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qrlora_core import FileFormatError, LayerTarget, TensorFile, match_targets, model_fingerprint
from qrlora_core.storage import TensorSpec
from qrlora_core.targets import DOUBLE_TARGETS, SINGLE_TARGETS, network_order

from ..errors import TrainError
from .backbones.flux import diffusers_name
from .quantized import (
    Quantization,
    dequantized,
    is_beside_a_weight,
    is_config,
    logical_shape,
    quantization_configs,
    quantization_of,
)

_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.")
# keys that tell a model of another family which is often taken for FLUX.1
_OTHERS = {
    "double_stream_modulation_img.lin.weight": "FLUX.2",
    "double_stream_modulation_img.linear.weight": "FLUX.2",
    "distilled_guidance_layer.in_proj.weight": "Chroma",
    "input_blocks.0.0.weight": "a Stable Diffusion 1, 2 or XL model",
    "joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": "a LoRA",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA or an adapter",
}


class Part(NamedTuple):
    """Where one parameter lies: a key, rows of it, whether its halves change places, and how it is quantised."""

    key: str
    shape: tuple[int, ...]
    start: int = 0
    swap: bool = False
    quantization: Quantization | None = None


class BaseModel:
    """A FLUX transformer on disk, read tensor by tensor.

    Attributes:
        path: the file or folder.
        config: arguments of diffusers' FluxTransformer2DModel, read off the weights (or the folder's config.json).
        specs: diffusers' parameter name -> shape, and the dtype that `tensor` gives.

    Raises:
        TrainError: reason "model": missing, unreadable, not FLUX.1, or stored in a way that cannot be read as numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = _located(Path(path))
        try:
            files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
            opened = [TensorFile(file, skip_other=True) for file in files]
        except FileFormatError as error:
            raise TrainError("model", str(error)) from error
        _require_all_files(self.path)
        self._file_of = _files_by_key(opened, self.path.name)
        stored = {key: _spec(file, key) for key, file in self._file_of.items()}
        configs: dict[str, Any] = {}
        for file in opened:
            tensors = {key: file.tensor(key).numpy().tobytes() for key in file.other if is_config(key)}
            configs |= quantization_configs(file.metadata, tensors, file.path.name)
        self._parts = _parts(stored, configs, self.path.name)
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
        self.config = _config(self.specs, self.path, _other(self._file_of))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the weights, see `qrlora_core.model_fingerprint`."""
        return model_fingerprint(self.path)

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of double and single blocks."""
        return self.config["num_layers"], self.config["num_single_layers"]

    def tensor(self, name: str) -> Tensor:
        """One parameter: in the file's dtype, or in float32 where it is stored quantised."""
        part = self._parts[name]
        file, rows = self._file_of[part.key], part.shape[0]
        tensor = file.rows(part.key, part.start, rows)
        if part.quantization is not None:
            scales = tuple(self._file_of[key].tensor(key) for key in part.quantization.scales)
            tensor = dequantized(part.quantization, tensor, scales, part.start, self._rows[part.key])
        if part.swap:  # ComfyUI has shift before scale, diffusers scale before shift
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The floating dtype that a parameter is stored in, None for 4- and 8-bit formats with scales."""
        part = self._parts[name]
        return None if part.quantization is not None else self.specs[name].dtype

    def targets(self, wanted: Iterable[str] = ()) -> tuple[LayerTarget, ...]:
        """The layers to adapt: `wanted` names or dotted suffixes, by default the published ones.

        Raises:
            TargetError: a target matches nothing; the message names the nearest candidates.
        """
        layers = sorted((name.removesuffix(".weight") for name in self.specs if _is_layer(name)), key=network_order)
        chosen = match_targets(wanted, layers) if wanted else tuple(name for name in layers if _is_published(name))
        return tuple(LayerTarget(name, _pair(self.specs[f"{name}.weight"].shape)) for name in chosen)

    def weight(self, layer: str) -> Tensor:
        """(out, in) of a layer, as `tensor` gives it."""
        return self.tensor(f"{layer}.weight")


def _files_by_key(files: Sequence[TensorFile], title: str) -> dict[str, TensorFile]:
    """Which file holds which tensor.

    Raises:
        TrainError: two files hold the same one: they are two models.
    """
    file_of: dict[str, TensorFile] = {}
    for file in files:
        keys = [*file.specs, *file.other]
        twice = next((key for key in keys if key in file_of), None)
        if twice is not None:
            names = f"{file_of[twice].path.name} and {file.path.name}"
            raise TrainError(
                "model",
                f"{names} in {title} both hold {twice}: they are two models. Name one file, or leave one model in the "
                "folder",
            )
        file_of |= dict.fromkeys(keys, file)
    return file_of


def _spec(file: TensorFile, key: str) -> TensorSpec:
    return file.specs[key] if key in file.specs else file.other[key]


def _parts(stored: Mapping[str, TensorSpec], configs: Mapping[str, Any], title: str) -> dict[str, Part]:
    """Diffusers' name -> Part, whichever of the two layouts a file has."""
    for prefix in _PREFIXES:
        own = {key.removeprefix(prefix): key for key in stored if key.startswith(prefix)}
        native = "transformer_blocks.0.attn.to_q.weight" in own
        if not native and "double_blocks.0.img_attn.qkv.weight" not in own:
            continue
        siblings = _siblings(own.values(), stored)
        parts: dict[str, Part] = {}
        for plain, key in own.items():
            shape, quantization = stored[key].shape, None
            if not shape or is_beside_a_weight(plain):
                continue
            if plain.endswith(".weight"):
                layer = key.removesuffix(".weight")
                config = configs.get(layer, configs.get(plain.removesuffix(".weight")))
                names = [(plain, 0, shape[0])] if native else diffusers_name(plain, shape[0])
                quantization = quantization_of(layer, siblings[layer], config, title) if names else None
                shape = logical_shape(quantization, shape)
            for name, start, rows in [(plain, 0, shape[0])] if native else diffusers_name(plain, shape[0]):
                swap = not native and name.startswith("norm_out.")
                parts[name] = Part(key, (rows, *shape[1:]), start, swap, quantization)
        return parts
    first = ", ".join(list(stored)[:3]) or "nothing"
    raise TrainError(
        "model",
        f"{title} is not a FLUX.1 transformer{_other(stored)}: it begins with {first}. Expected a ComfyUI file with "
        "double_blocks.0.img_attn.qkv.weight, or a diffusers folder with transformer_blocks",
    )


def _siblings(keys: Iterable[str], stored: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """Layer (a key without `.weight`) -> everything that lies under its name."""
    keys = list(keys)
    siblings: dict[str, dict[str, TensorSpec]] = {
        key.removesuffix(".weight"): {} for key in keys if key.endswith(".weight")
    }
    for key in keys:
        layer = key
        while "." in layer:
            layer = layer.rpartition(".")[0]
            if layer in siblings:
                siblings[layer][key.removeprefix(f"{layer}.")] = stored[key]
                break
    return siblings


def _other(keys: Iterable[str]) -> str:
    """` but FLUX.2`, when the keys are known to be those of another family."""
    known = set(keys)
    for mark, family in _OTHERS.items():
        if any(f"{prefix}{mark}" in known for prefix in _PREFIXES):
            return f" but {family}"
    return " but one packed by SVDQuant (Nunchaku) or AWQ" if any(key.endswith(".qweight") for key in known) else ""


def _config(specs: Mapping[str, TensorSpec], path: Path, other: str = "") -> dict[str, Any]:
    """FluxTransformer2DModel's arguments read off the shapes; a folder's config.json has its say."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in specs:
            raise TrainError(
                "model",
                f"{path.name} is not a FLUX.1 transformer{other}: it has no {name}. Use FLUX.1-dev, -schnell or a "
                "fine-tune of them",
            )
        return specs[name].shape

    hidden, channels = shape("x_embedder.weight")
    head = shape("transformer_blocks.0.attn.norm_q.weight")[0]
    config: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0],
        "num_layers": _count(specs, "transformer_blocks"),
        "num_single_layers": _count(specs, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shape("context_embedder.weight")[1],
        "pooled_projection_dim": shape("time_text_embed.text_embedder.linear_1.weight")[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in specs,
        "axes_dims_rope": [16, 56, 56],
    }
    if config["in_channels"] != config["out_channels"]:
        raise TrainError(
            "model",
            f"{path.name} takes {channels} channels and gives {config['out_channels']}: a Fill, Depth or Canny "
            "variant with extra inputs. Train on FLUX.1-dev, -schnell or a fine-tune of them",
        )
    own = path / "config.json"
    if path.is_dir() and own.is_file():
        stated = _json(own)
        if stated.get("_class_name", "FluxTransformer2DModel") != "FluxTransformer2DModel":
            raise TrainError("model", f"{path.name} holds a {stated['_class_name']}, expected FluxTransformer2DModel")
        config["axes_dims_rope"] = stated.get("axes_dims_rope", config["axes_dims_rope"])
    if sum(config["axes_dims_rope"]) != head or hidden % head:
        raise TrainError("model", f"{path.name} has heads of {head} in {hidden}; FLUX.1 has heads of 128")
    return config


def _located(path: Path) -> Path:
    """The file, or the folder that holds the transformer's own files."""
    if path.is_file():
        if path.suffix.lower() not in (".safetensors", ".sft"):
            raise TrainError(
                "model",
                f"{path.name}: only safetensors files can be trained on, not {path.suffix or 'a file without ending'}. "
                "Use the bf16 or fp8 safetensors file of this model, or its diffusers folder",
            )
        return path
    for folder in (path / "transformer", path):
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            return folder
    found = "holds no safetensors file" if path.is_dir() else "does not exist"
    raise TrainError("model", f"the base model {str(path)!r} {found}; nothing is downloaded, so put it there first")


def _require_all_files(folder: Path) -> None:
    """A folder's index names files that must all be there; a download that broke off leaves some out."""
    for index in folder.glob("*.safetensors.index.json") if folder.is_dir() else ():
        listed = _json(index).get("weight_map")
        names = set(listed.values()) if isinstance(listed, dict) else set()
        missing = sorted(str(name) for name in names if not (folder / str(name)).is_file())
        if missing:
            raise TrainError(
                "model", f"{folder.name} lacks {missing[0]}, which {index.name} names: the download is not complete"
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError("model", f"{path.name} of the base model cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TrainError("model", f"{path.name} of the base model is no table")
    return value


def _count(specs: Mapping[str, TensorSpec], blocks: str) -> int:
    """Number of blocks, once it is sure that none is missing and that each has all of its tensors."""
    held: dict[int, set[str]] = {}
    for name in specs:
        kind, _, rest = name.partition(".")
        number, _, suffix = rest.partition(".")
        if kind == blocks and number.isdecimal() and len(number) < 5:
            held.setdefault(int(number), set()).add(suffix)
    if set(held) != set(range(len(held))):
        raise TrainError("model", f"{blocks} are numbered {sorted(held)}: some are missing")
    whole = set().union(*held.values())
    for block, suffixes in held.items():
        if suffixes != whole:
            lacking = f"{blocks}.{block}.{min(whole - suffixes)}"
            raise TrainError("model", f"{lacking} is missing: the file is not complete")
    return len(held)


def _is_layer(name: str) -> bool:
    return name.endswith(".weight") and "transformer_blocks." in name and ".norm_" not in name


def _is_published(name: str) -> bool:
    suffix = name.split(".", 2)[2]
    return suffix in (SINGLE_TARGETS if name.startswith("single_") else DOUBLE_TARGETS)


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    out, width = shape
    return out, width
