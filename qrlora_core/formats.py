"""The file formats of QR-LoRA: telling them apart and opening them (docs/files.md). `save.py` writes them."""

import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, cast

import torch

from .adapter import METHODS, Adapter, AdapterLayer, AdapterMethod, LayerInfo
from .blocks import shortened
from .errors import FileFormatError
from .families import FAMILIES, find
from .linalg import ORTHONORMAL, Basis, orthonormality_error, trapezoid_error
from .storage import TensorFile

FileKind = Literal["delta_r_published", "portable", "qr_published", "residual", "basis", "lora", "unknown"]

# Which tensors one layer has in each format: role -> key, {} standing for the layer's diffusers name.
PUBLISHED = {"q": "transformer.{}.lora.q.weight", "delta_r": "transformer.{}.lora.delta_r.weight"}
PUBLISHED_BASE_R = "transformer.{}.lora.base_r.weight"
FULL_QR = {"up": "transformer.{}.lora.up.weight", "down": "transformer.{}.lora.down.weight"}
RESIDUAL = "{}.residual.weight"
BASIS = {"q": "{}.q.weight", "r": "{}.r.weight"}

# Of the portable format, {} is whatever LoRA loaders call the layer: see `portable_key`.
PORTABLE = {"up": "{}.lora_B.weight", "down": "{}.lora_A.weight"}
PORTABLE_ALPHA = "{}.alpha"
_TRANSFORMER = "transformer."
NATIVE = "diffusion_model."  # begins the name of a layer that no family's table has
KOHYA = "lora_unet_"
_OWN = (NATIVE, KOHYA, "lora_transformer_", "lycoris_")  # begin names that are keys themselves

# Training moves Q' and R' of a full-QR file away from their orthonormal and trapezoidal start, but not all the way;
# a LoRA that began with zeros and noise has neither structure. On both scales 0 is perfect, 1 is none.
_DRIFT = 0.5

_opened: weakref.WeakValueDictionary[tuple[str, int, int], Adapter] = weakref.WeakValueDictionary()

_LONGEST_NAME = 160  # characters of a layer's name in a message
_ADAPTER_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def file_kind(file: TensorFile) -> FileKind:
    """Which format a file has: by its keys, and where those are ambiguous by metadata and by what the tensors hold."""
    keys = list(file.specs)
    if any(key.endswith((".lora.delta_r.weight", ".lora.q.weight")) for key in keys):
        return "delta_r_published"
    if is_residual(keys):
        return "residual"
    if keys and all(layer_of(key, BASIS["q"]) or layer_of(key, BASIS["r"]) for key in keys):
        return "basis"
    if any(layer_of(key, FULL_QR["up"]) for key in keys):
        return "qr_published" if _is_full_qr(file) else "lora"
    if any(layer_of(key, PORTABLE["up"]) for key in keys):
        return "portable" if _is_delta_r(file) else "lora"
    return "lora" if any("lora" in key.lower() for key in keys) else "unknown"


def is_residual(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is a residual; the header tells, no tensor is read."""
    return any(layer_of(key, RESIDUAL) for key in keys)


def open_adapter(path: Path) -> Adapter:
    """Open a published, portable or full-QR adapter. The header and the 0-D alphas are read, the rest when used.

    A file that is open already, and was not changed since, is the same adapter: its tensors are in memory once.

    Raises:
        FileFormatError: it is something else (a plain LoRA, a residual, ...), or keys or shapes do not fit.
    """
    file = TensorFile(path)
    opened = _opened.get(file.identity())
    if opened is not None:
        return opened
    kind = file_kind(file)
    if kind in _OPENERS:
        _opened[file.identity()] = adapter = _OPENERS[kind](file)
        return adapter
    reason = {
        "lora": "is a plain LoRA (its `up` is not a basis): load it with Load LoRA as \u0394R, from models/loras",
        "residual": "is a residual: load it with Load FLUX Residual",
        "basis": "is a basis (Q and R), which holds no trained change",
    }.get(kind, f"is not an adapter; it begins with {first_few(file.specs) or 'nothing'}")
    raise FileFormatError(f"{file.path.name} {reason}. Expected keys like {PUBLISHED['delta_r'].format('<layer>')}")


def portable_key(name: str) -> str:
    """What any LoRA loader calls a layer: the key of its tensors in a portable file, without the ending."""
    if name.startswith(_OWN):
        return name
    prefix = next((family.portable for family in FAMILIES if find(family, name) is not None), _TRANSFORMER)
    return prefix + (name.replace(".", "_") if prefix.endswith("_") else name)


def portable_layer(key: str) -> str | None:
    """The layer that `portable_key` gave this key; None for any other key."""
    if key.startswith(_TRANSFORMER):
        return key.removeprefix(_TRANSFORMER)
    if key.startswith(KOHYA):
        for family in FAMILIES:
            entry = find(family, key.removeprefix(KOHYA)) if family.portable == KOHYA else None
            if entry is not None and not entry.native:
                return entry.name(entry.layers[0])
    return key if key.startswith(_OWN) else None


def layer_of(key: str, pattern: str) -> str | None:
    """The layer name that makes `pattern` into `key`, or None."""
    before, after = pattern.split("{}")
    if key.startswith(before) and key.endswith(after) and len(key) > len(before) + len(after):
        return key[len(before) : len(key) - len(after)]
    return None


def group_layers(
    file: TensorFile, patterns: Mapping[str, str], optional: Mapping[str, str] | None = None
) -> dict[str, dict[str, str]]:
    """Layer name -> {role: key}, with every key of the file accounted for.

    Args:
        file: an open file.
        patterns: role -> pattern; every layer must have all of them.
        optional: role -> pattern that all layers have or none.

    Raises:
        FileFormatError: a layer lacks a tensor, or a key belongs to no layer.
    """
    name = file.path.name
    layers: dict[str, dict[str, str]] = {}
    foreign = []
    every = {**patterns, **(optional or {})}
    for key in file.specs:
        owner = next(((role, layer) for role, pattern in every.items() if (layer := layer_of(key, pattern))), None)
        if owner is None:
            foreign.append(key)
        else:
            layers.setdefault(owner[1], {})[owner[0]] = key
    if foreign:
        raise FileFormatError(f"{name} holds {len(foreign)} tensors that do not belong there: {first_few(foreign)}")
    expected = {role for keys in layers.values() for role in keys} | patterns.keys()
    missing = [every[role].format(layer) for layer, keys in layers.items() for role in expected - keys.keys()]
    if missing or not layers:
        raise FileFormatError(f"{name} is incomplete, it lacks {len(missing)} tensors: {first_few(sorted(missing))}")
    return layers


def first_few(items: Iterable[str], count: int = 3) -> str:
    """The first few of many names, for a message."""
    items = list(items)
    return ", ".join(shortened(item, _LONGEST_NAME) for item in items[:count]) + (
        f" and {len(items) - count} more" if len(items) > count else ""
    )


def _open_published(file: TensorFile) -> Adapter:
    layers = group_layers(file, PUBLISHED, {"base_r": PUBLISHED_BASE_R})
    has_base = "base_r" in next(iter(layers.values()))
    infos = {name: _info(file, name, keys["q"], keys["delta_r"]) for name, keys in layers.items()}
    for keys in layers.values() if has_base else ():
        _same_shape(file, keys["base_r"], keys["delta_r"])

    def read(name: str) -> AdapterLayer:
        keys = layers[name]
        q = file.tensor(keys["q"])
        initial = Basis(q, file.tensor(keys["base_r"])) if has_base else None
        return AdapterLayer(q, file.tensor(keys["delta_r"]), initial)

    method = _stated_method(file, default="delta_r")
    if method == "qr":  # would be read as Q' and R' and take the core away
        raise FileFormatError(f"{file.path.name} holds Q and \u0394R, but its metadata say method qr; it is damaged")
    return Adapter(_title(file), method, infos, read, has_initial=has_base, metadata=file.metadata, hold=True)


def _open_portable(file: TensorFile) -> Adapter:
    layers = {}
    for key, keys in group_layers(file, PORTABLE, {"alpha": PORTABLE_ALPHA}).items():
        name = portable_layer(key)
        if name is None:
            raise FileFormatError(f"{file.path.name} holds tensors that do not belong there: {keys['up']}")
        layers[name] = keys
    method = _stated_method(file, default="delta_r")
    infos = {}
    for name, keys in layers.items():
        info = _info(file, name, keys["up"], keys["down"])
        scaling = _alpha(file, keys["alpha"]) / info.rank if "alpha" in keys else 1.0
        if method == "qr" and info.rank % 2:
            raise FileFormatError(
                f"{file.path.name}: method qr needs an even number of columns, {name} has {info.rank}"
            )
        infos[name] = info._replace(scaling=scaling, rank=info.rank // 2 if method == "qr" else info.rank)

    def read(name: str) -> AdapterLayer:
        up, down = file.tensor(layers[name]["up"]), file.tensor(layers[name]["down"])
        if method != "qr":
            return AdapterLayer(up, down)
        rank = infos[name].rank  # [Q' Q] and [R'; -R]: the rank-2r difference that any LoRA loader adds correctly
        return AdapterLayer(up[:, :rank], down[:rank], Basis(up[:, rank:], -down[rank:]))

    return Adapter(_title(file), method, infos, read, has_initial=method == "qr", metadata=file.metadata, hold=True)


def _open_full_qr(file: TensorFile) -> Adapter:
    layers = group_layers(file, FULL_QR)
    infos = {name: _info(file, name, keys["up"], keys["down"]) for name, keys in layers.items()}

    def read(name: str) -> AdapterLayer:
        return AdapterLayer(file.tensor(layers[name]["up"]), file.tensor(layers[name]["down"]))

    return Adapter(_title(file), "qr", infos, read, has_initial=False, metadata=file.metadata, hold=True)


_OPENERS: dict[FileKind, Callable[[TensorFile], Adapter]] = {
    "delta_r_published": _open_published,
    "portable": _open_portable,
    "qr_published": _open_full_qr,
}


def _info(file: TensorFile, name: str, up_key: str, down_key: str) -> LayerInfo:
    """Shapes and dtypes of a pair, checked against each other."""
    up, down = file.specs[up_key], file.specs[down_key]
    if len(up.shape) != 2 or len(down.shape) != 2 or up.shape[1] != down.shape[0]:
        raise FileFormatError(
            f"{file.path.name}: {name} pairs {up.shape} with {down.shape}, expected (out, r) and (r, in)"
        )
    for key, spec in ((up_key, up), (down_key, down)):
        if spec.dtype not in _ADAPTER_DTYPES:
            raise FileFormatError(f"{file.path.name}: {key} is stored as {spec.dtype}, expected 16 bits or more")
    out, rank = up.shape
    if min(out, rank, down.shape[1]) < 1:
        raise FileFormatError(f"{file.path.name}: {name} is empty, it pairs {up.shape} with {down.shape}")
    # stacked merges (portable) may have more columns than the weight has; one decomposition cannot
    if rank > min(out, down.shape[1]) and layer_of(up_key, PORTABLE["up"]) is None:
        raise FileFormatError(
            f"{file.path.name}: {name} has rank {rank}, above what a {(out, down.shape[1])} weight has"
        )
    return LayerInfo((out, down.shape[1]), rank, 1.0, torch.promote_types(up.dtype, down.dtype))


def _same_shape(file: TensorFile, key: str, other: str) -> None:
    if file.specs[key].shape != file.specs[other].shape:
        raise FileFormatError(
            f"{file.path.name}: {key} has shape {file.specs[key].shape}, but {other} {file.specs[other].shape}"
        )


def _alpha(file: TensorFile, key: str) -> float:
    if torch.Size(file.specs[key].shape).numel() != 1:
        raise FileFormatError(f"{file.path.name}: {key} has shape {file.specs[key].shape}, expected one number")
    alpha = float(file.tensor(key).reshape(()))
    if not 0 < abs(alpha) < 1e6:  # also false for NaN
        raise FileFormatError(f"{file.path.name}: {key} is {alpha}, expected a finite number other than 0")
    return alpha


def _stated_method(file: TensorFile, default: AdapterMethod) -> AdapterMethod:
    method = file.metadata.get("qrlora.method", default)
    if method not in METHODS:
        raise FileFormatError(f"{file.path.name}: its metadata say method {method!r}, expected {', '.join(METHODS)}")
    return cast(AdapterMethod, method)


def _is_full_qr(file: TensorFile) -> bool:
    if file.metadata.get("qrlora.method") == "qr":
        return True
    return _every_pair(file, FULL_QR, lambda up, down: max(orthonormality_error(up), trapezoid_error(down)) <= _DRIFT)


def _is_delta_r(file: TensorFile) -> bool:
    if file.metadata.get("qrlora.method") in METHODS:
        return True
    return _every_pair(file, PORTABLE, lambda up, down: orthonormality_error(up) <= ORTHONORMAL)


def _every_pair(
    file: TensorFile, patterns: Mapping[str, str], test: Callable[[torch.Tensor, torch.Tensor], bool]
) -> bool:
    names = [name for key in file.specs if (name := layer_of(key, patterns["up"]))]
    for name in names:
        up, down = patterns["up"].format(name), patterns["down"].format(name)
        if down not in file.specs or len(file.specs[up].shape) != 2 or len(file.specs[down].shape) != 2:
            return False
        if not test(file.tensor(up), file.tensor(down)):
            return False
    return bool(names)


def _title(file: TensorFile) -> str:
    return re.sub(r"\.safetensors$", "", file.path.name)
