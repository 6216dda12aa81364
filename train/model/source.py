"""The base model's weights under diffusers' names, from a ComfyUI single file or a diffusers folder, read when used."""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qrlora_core import FileFormatError, LayerTarget, TensorFile, match_targets, model_fingerprint
from qrlora_core.storage import TensorSpec
from qrlora_core.targets import DOUBLE_TARGETS, SINGLE_TARGETS, network_order

from ..errors import TrainError
from .backbones.flux import diffusers_name

_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.")
_SCALES = (".scale_weight", ".weight_scale")  # what ComfyUI's scaled fp8 files call a weight's factor
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
    """Where one tensor lies: a key of a file, rows of it, whether its halves change places, and its factor's key."""

    file: int
    key: str
    shape: tuple[int, ...]
    start: int = 0
    swap: bool = False
    scale: str = ""


class BaseModel:
    """A FLUX transformer on disk, memory-mapped.

    Attributes:
        path: the file or folder.
        config: arguments of diffusers' FluxTransformer2DModel, read off the weights (or the folder's config.json).
        specs: diffusers' parameter name -> dtype and shape.

    Raises:
        TrainError: reason "model": missing, unreadable, not FLUX.1, or stored in a way that cannot be read as numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = _located(Path(path))
        try:
            files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
            self._files = [TensorFile(file, skip_other=True) for file in files]
        except FileFormatError as error:
            raise TrainError("model", str(error)) from error
        _require_all_files(self.path)
        keys: dict[str, int] = {}
        for index, file in enumerate(self._files):
            twice = next((key for key in file.specs if key in keys), None)
            if twice is not None:
                names = f"{files[keys[twice]].name} and {files[index].name}"
                raise TrainError(
                    "model",
                    f"{names} in {self.path.name} both hold {twice}: they are two models. Name one file, or leave one "
                    "model in the folder",
                )
            keys |= dict.fromkeys(file.specs, index)
        spec_of = {key: self._files[index].specs[key] for key, index in keys.items()}
        self._parts = _parts(spec_of, keys, self.path.name)
        self.specs = {name: TensorSpec(spec_of[part.key].dtype, part.shape) for name, part in self._parts.items()}
        self.config = _config(self.specs, self.path, _other(keys))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the weights, see `qrlora_core.model_fingerprint`."""
        return model_fingerprint(self.path)

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of double and single blocks."""
        return self.config["num_layers"], self.config["num_single_layers"]

    def tensor(self, name: str) -> Tensor:
        """One parameter: in the file's dtype, or in float32 where the file scales its fp8 weights."""
        part = self._parts[name]
        tensor = self._files[part.file].tensor(part.key)
        if tuple(tensor.shape) != part.shape:
            tensor = tensor.narrow(0, part.start, part.shape[0])
        if part.swap:  # ComfyUI has shift before scale, diffusers scale before shift
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor.float() * self._scale(part) if part.scale else tensor

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

    def _scale(self, part: Part) -> Tensor:
        """A weight's factor: one number, or one for each of its rows, as a column."""
        file = next(file for file in self._files if part.scale in file.specs)
        scale = file.tensor(part.scale).float()
        if scale.numel() == 1:
            return scale.reshape(())
        rows = self._files[part.file].specs[part.key].shape[0]
        if scale.numel() != rows:
            raise TrainError(
                "model",
                f"{self.path.name}: {part.scale} has {scale.numel()} numbers for {rows} rows; this packing cannot be "
                "read. Use the bf16 or plain fp8 file of this model",
            )
        return scale.reshape(-1, 1).narrow(0, part.start, part.shape[0])


def _parts(specs: Mapping[str, TensorSpec], files: Mapping[str, int], title: str) -> dict[str, Part]:
    """Diffusers' name -> Part, whichever of the two layouts a file has."""
    for prefix in _PREFIXES:
        own = {key.removeprefix(prefix): key for key in specs if key.startswith(prefix)}
        native = "transformer_blocks.0.attn.to_q.weight" in own
        if not native and "double_blocks.0.img_attn.qkv.weight" not in own:
            continue
        found: dict[str, Part] = {}
        for plain, key in own.items():
            shape = specs[key].shape
            if not shape or plain.endswith(_SCALES):
                continue
            scale = ""
            if plain.endswith(".weight"):
                scale = next((s for s in (key.removesuffix(".weight") + end for end in _SCALES) if s in specs), "")
            for name, start, rows in [(plain, 0, shape[0])] if native else diffusers_name(plain, shape[0]):
                swap = not native and name.startswith("norm_out.")
                found[name] = Part(files[key], key, (rows, *shape[1:]), start, swap, scale)
        return found
    first = ", ".join(list(specs)[:3]) or "nothing that is stored as plain floating point"
    raise TrainError(
        "model",
        f"{title} is not a FLUX.1 transformer{_other(specs)}: it begins with {first}. Expected a ComfyUI file with "
        "double_blocks.0.img_attn.qkv.weight (a GGUF, NF4 or other packed file cannot be trained on; use fp8 or bf16), "
        "or a diffusers folder with transformer_blocks",
    )


def _other(keys: Iterable[str]) -> str:
    """` but FLUX.2`, when the keys are known to be those of another family."""
    known = set(keys)
    for mark, family in _OTHERS.items():
        if any(f"{prefix}{mark}" in known for prefix in _PREFIXES):
            return f" but {family}"
    return ""


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
        if kind == blocks and number.isdecimal():
            held.setdefault(int(number), set()).add(suffix)
    if set(held) != set(range(len(held))):
        raise TrainError("model", f"{blocks} are numbered {sorted(held)}: some are missing")
    whole = set().union(*held.values())
    for block, suffixes in held.items():
        if suffixes != whole:
            lacking = f"{blocks}.{block}.{min(whole - suffixes)}"
            raise TrainError(
                "model", f"{lacking} is missing, or packed in a way that cannot be read (NF4, NVFP4); use fp8 or bf16"
            )
    return len(held)


def _is_layer(name: str) -> bool:
    return name.endswith(".weight") and "transformer_blocks." in name and ".norm_" not in name


def _is_published(name: str) -> bool:
    suffix = name.split(".", 2)[2]
    return suffix in (SINGLE_TARGETS if name.startswith("single_") else DOUBLE_TARGETS)


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    out, width = shape
    return out, width
