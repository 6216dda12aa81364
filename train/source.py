"""The base model's weights under diffusers' names, from a ComfyUI single file or a diffusers folder, read when used."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qrlora_core import FileFormatError, LayerTarget, TensorFile, layer_names, match_targets, model_fingerprint
from qrlora_core.storage import TensorSpec
from qrlora_core.targets import DOUBLE_TARGETS, SINGLE_TARGETS, network_order

from .errors import TrainError

_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.")
_PLAIN = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_SCALES = (".scale_weight", ".weight_scale")  # what ComfyUI's scaled fp8 files call a weight's factor


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
        keys = {key: index for index, file in enumerate(self._files) for key in file.specs}
        spec_of = {key: self._files[index].specs[key] for key, index in keys.items()}
        self._parts = _parts(spec_of, keys, self.path.name)
        self.specs = {name: TensorSpec(spec_of[part.key].dtype, part.shape) for name, part in self._parts.items()}
        self.config = _config(self.specs, self.path)

    @property
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
        if part.scale:
            tensor = tensor.float() * self._scale(part)
        return tensor

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
        for file in self._files:
            if part.scale in file.specs:
                return file.tensor(part.scale).float()
        raise TrainError("model", f"{self.path.name}: {part.scale} has vanished")


def diffusers_name(key: str, rows: int) -> list[tuple[str, int, int]]:
    """What diffusers calls a tensor of ComfyUI's layout: (name, first row, rows) for each part of it.

    Args:
        key: without a prefix, such as `double_blocks.0.img_attn.qkv.bias`.
        rows: length of its first dimension.

    Returns:
        Nothing for a key that is no parameter of FLUX.1.
    """
    module, _, kind = key.rpartition(".")
    if module in _PLAIN and kind in ("weight", "bias"):
        return [(f"{_PLAIN[module]}.{kind}", 0, rows)]
    block, _, rest = module.partition(".")
    number, _, suffix = rest.partition(".")
    if kind == "scale" and suffix in _NORMS and block in _BLOCKS:
        return [(f"{_BLOCKS[block]}.{number}.{_NORMS[suffix]}.weight", 0, rows)]
    names = layer_names(f"{module}.weight") if kind in ("weight", "bias") else ()
    if not names:
        return []
    # q, k, v are a third of a double block's rows, and a seventh of a single block's (its MLP has the other four)
    share = {1: rows, 3: rows // 3, 4: rows // 7}[len(names)]
    sizes = [share] * (len(names) - 1)
    sizes.append(rows - sum(sizes))
    return [(f"{name}.{kind}", sum(sizes[:index]), sizes[index]) for index, name in enumerate(names)]


def _parts(specs: Mapping[str, TensorSpec], files: Mapping[str, int], title: str) -> dict[str, Part]:
    """Diffusers' name -> Part, whichever of the two layouts a file has."""
    for prefix in _PREFIXES:
        if f"{prefix}transformer_blocks.0.attn.to_q.weight" in specs:
            return {
                key.removeprefix(prefix): Part(files[key], key, spec.shape)
                for key, spec in specs.items()
                if key.startswith(prefix)
            }
        if f"{prefix}double_blocks.0.img_attn.qkv.weight" in specs:
            found: dict[str, Part] = {}
            for key, spec in specs.items():
                if not key.startswith(prefix) or not spec.shape:
                    continue
                plain = key.removeprefix(prefix)
                scale = next((s for s in (key.removesuffix(".weight") + end for end in _SCALES) if s in specs), "")
                for name, start, rows in diffusers_name(plain, spec.shape[0]):
                    swap = name.startswith("norm_out.")
                    used = scale if plain.endswith(".weight") else ""
                    found[name] = Part(files[key], key, (rows, *spec.shape[1:]), start, swap, used)
            return found
    first = ", ".join(list(specs)[:3]) or "nothing"
    raise TrainError(
        "model",
        f"{title} is not a FLUX.1 transformer: it begins with {first}. Expected a ComfyUI file with "
        "double_blocks.0.img_attn.qkv.weight (a GGUF, NF4 or other packed file cannot be trained on; use fp8 or bf16), "
        "or a diffusers folder with transformer_blocks",
    )


def _config(specs: Mapping[str, TensorSpec], path: Path) -> dict[str, Any]:
    """FluxTransformer2DModel's arguments read off the shapes; a folder's config.json has its say."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in specs:
            raise TrainError("model", f"{path.name} is not a FLUX.1 transformer: it has no {name}")
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
        stated = json.loads(own.read_text(encoding="utf-8"))
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
            raise TrainError("model", f"{path.name}: only safetensors files can be trained on, not {path.suffix}")
        return path
    for folder in (path / "transformer", path):
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            return folder
    found = "holds no safetensors file" if path.is_dir() else "does not exist"
    raise TrainError("model", f"the base model {path.name!r} {found}; nothing is downloaded, so put it there first")


def _count(specs: Mapping[str, TensorSpec], blocks: str) -> int:
    numbers = {int(name.split(".")[1]) for name in specs if name.startswith(f"{blocks}.")}
    if numbers != set(range(len(numbers))):
        raise TrainError("model", f"{blocks} are numbered {sorted(numbers)}: some are missing")
    return len(numbers)


def _is_layer(name: str) -> bool:
    return name.endswith(".weight") and "transformer_blocks." in name and ".norm_" not in name


def _is_published(name: str) -> bool:
    suffix = name.split(".", 2)[2]
    return suffix in (SINGLE_TARGETS if name.startswith("single_") else DOUBLE_TARGETS)


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    out, width = shape
    return out, width
