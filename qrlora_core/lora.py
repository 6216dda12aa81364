"""Ordinary LoRA files as adapters: a LoRA's change `scaling * B A` is `Q (scaling * T A)` with `Q, T = qr(B)`, exactly.

Which layer a tensor belongs to is decided by the families' tables, without a model at hand: kohya's and BFL's fused
modules are cut by rows of B, and what diffusers, PEFT, ai-toolkit, SimpleTuner, OneTrainer and XLabs call a layer
becomes its diffusers name. A layer that no family knows keeps its own name, by which ComfyUI may know it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .adapter import Adapter, AdapterLayer, LayerInfo, Progress
from .errors import FileFormatError, SettingError
from .families import FAMILIES, Family, cut, find, likely_families
from .formats import NATIVE, file_kind, first_few, open_adapter
from .linalg import decompose
from .lora_layers import LoraLayers
from .lora_modules import low_rank_factors, module_shape, whole_change
from .storage import TensorFile

OtherParts = Literal["refuse", "leave out"]
OTHER_PARTS: tuple[str, ...] = get_args(OtherParts)

# How a key ends -> what the tensor is to its module
_ENDINGS = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    "_lora.up.weight": "up",
    "_lora.down.weight": "down",
    ".lora_B": "up",
    ".lora_A": "down",
    ".up.weight": "up",
    ".down.weight": "down",
    ".alpha": "alpha",
    ".dora_scale": "dora",
    ".lora_magnitude_vector": "dora",
    ".lora_magnitude_vector.weight": "dora",
    ".diff": "diff",
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
# Parts that no matrix of low rank can hold, and what to call them
_OTHER = {
    ".diff_b": "biases",
    ".lora_B.bias": "biases",
    ".b_norm": "biases",
    ".w_norm": "norms",
    ".set_weight": "norms",
    "_norm.scale": "norms",
    ".reshape_weight": "changes of a weight's size",
}
_ORDERED = sorted([*_ENDINGS, *_OTHER], key=len, reverse=True)
_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
_NATIVE_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_TEXT_ENCODERS = (
    *("lora_te", "lora_prior_te", "text_encoder", "te.", "te1.", "te2.", "te3.", "clip_l", "clip_g", "t5xxl"),
    *("text_model.", "conditioner.", "cond_stage_model.", "lycoris_text_model", "hydit_clip"),
)


class OpenedLora(NamedTuple):
    """A LoRA file as an adapter, and what of the file is not in it.

    Attributes:
        adapter: of method delta_r, float32, scaling 1.
        family: which family its layers are of; the first of several that they could be of.
        text_encoder: modules of text encoders, which are left to the stock loader.
        left_out: what was left out as `other_parts` allows -> how many tensors.
        lost: layer -> share of its energy that a truncated SVD lost, for layers that are not low-rank in the file.
        like: other families whose layers these could be as well, when the file does not say.
    """

    adapter: Adapter
    family: Family | None
    text_encoder: int = 0
    left_out: Mapping[str, int] = {}
    lost: Mapping[str, float] = {}
    like: tuple[Family, ...] = ()


def open_lora(
    path: Path,
    *,
    rank: int = 0,
    other_parts: OtherParts = "refuse",
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> OpenedLora:
    """Read a LoRA file of any common dialect. A QR-LoRA adapter is opened as what it is.

    Args:
        path: a safetensors file.
        rank: for modules that are not low-rank (LoHa, LoKr, whole differences): columns of a truncated SVD; 0 refuses.
        other_parts: "refuse" files that change biases, norms or sizes too, or "leave out" those parts.
        device: where factors are made orthonormal, when a layer is first asked for; the result is on the CPU.
        progress: wraps the list of module names that is gone through, as `tqdm` does.

    Raises:
        FileFormatError: not a LoRA, DoRA (which needs the model), a tensor whose meaning is not known, or shapes that
            do not fit.
        SettingError: rank or other_parts is out of range.
        WeightError: a tensor holds NaN or Inf.
    """
    if rank < 0 or other_parts not in OTHER_PARTS:
        choices = " or ".join(OTHER_PARTS)
        raise SettingError(f"rank is {rank}, expected 0 or more; other_parts is {other_parts!r}, expected {choices}")
    file = TensorFile(path)
    if file_kind(file) in ("delta_r_published", "portable", "qr_published"):
        adapter = open_adapter(path)
        family, like = _families(file, {target.name: target.shape for target in adapter.targets})
        return OpenedLora(adapter, family, like=like)
    modules, text_encoder, others = _modules(file)
    _require_readable(file, modules, others, rank, other_parts)
    family, like = _families(file, {_plain(base): module_shape(file, keys) for base, keys in modules.items()})
    layers, infos = LoraLayers(device), dict[str, LayerInfo]()
    dense: dict[str, Tensor] = {}
    for base in list(modules) if progress is None else progress(list(modules)):
        keys = modules[base]
        if "up" in keys:
            factors = low_rank_factors(file, base, keys)
            for name, rows in _layers(file, family, base, (factors.up.shape[0], factors.down.shape[1])):
                _require_once(file, infos, dense, name)
                infos[name] = layers.add(name, base, factors, rows)
        else:
            change = whole_change(file, base, keys)
            for name, rows in _layers(file, family, base, (change.shape[0], change.shape[1])):
                _require_once(file, infos, dense, name)
                dense[name] = change[rows]
    lost = {}
    for name in list(dense) if progress is None or not dense else progress(list(dense)):
        layer, lost[name] = _truncated(dense.pop(name), rank, device)
        infos[name] = layers.put(name, layer)
    metadata = {key: value for key, value in file.metadata.items() if key.startswith("modelspec.")}
    title = file.path.name.removesuffix(".safetensors")
    adapter = Adapter(title, "delta_r", infos, layers.layer, has_initial=False, metadata=metadata)
    return OpenedLora(adapter, family, text_encoder, dict(Counter(others.values())), lost, like)


def _families(file: TensorFile, shapes: Mapping[str, Sequence[int]]) -> tuple[Family | None, tuple[Family, ...]]:
    """The family of some layers, and others that it could be; what the file says of its model settles it."""
    likely = likely_families(shapes)
    architecture = file.metadata.get("modelspec.architecture", "").lower()
    for family in likely:
        if architecture.startswith(family.architecture):
            return family, ()
    return (likely[0], likely[1:]) if likely else (None, ())


def _modules(file: TensorFile) -> tuple[dict[str, dict[str, str]], int, dict[str, str]]:
    """Module -> {role: key}; how many modules are of text encoders; key -> what it is, for all other tensors."""
    modules: dict[str, dict[str, str]] = {}
    text: set[str] = set()
    others: dict[str, str] = {}
    for key in file.specs:
        ending = next((suffix for suffix in _ORDERED if key.endswith(suffix)), "")
        base = key[: len(key) - len(ending)]
        if key.startswith(_TEXT_ENCODERS):
            text.add(base)
        elif ending in _ENDINGS:
            modules.setdefault(base, {})[_ENDINGS[ending]] = key
        else:
            others[key] = _OTHER.get(ending, "tensors of an unknown kind")
    for base, keys in list(modules.items()):
        if "diff" in keys and len(file.specs[keys["diff"]].shape) < 2:
            others[modules.pop(base)["diff"]] = "norms"
        elif keys.keys() == {"alpha"}:
            others[modules.pop(base)["alpha"]] = "tensors of an unknown kind"
    for key, what in list(others.items()):  # a module of another size than the model's is changed as a whole
        if what == _OTHER[".reshape_weight"]:
            for part_key in modules.pop(key.removesuffix(".reshape_weight"), {}).values():
                others[part_key] = what
    for family in FAMILIES:
        for module, marks in family.widened:
            if file.specs.keys() >= set(marks):
                others |= dict.fromkeys(modules.pop(module, {}).values(), _OTHER[".reshape_weight"])
    return modules, len(text), others


def _require_readable(
    file: TensorFile, modules: Mapping[str, Mapping[str, str]], others: Mapping[str, str], rank: int, choice: str
) -> None:
    title = file.path.name
    if not modules:
        first_keys = first_few(file.specs) or "nothing"
        raise FileFormatError(
            f"{title} holds no LoRA of a diffusion model that can be read; it begins with {first_keys}"
        )
    dora = [base for base, keys in modules.items() if "dora" in keys]
    if dora:
        raise FileFormatError(
            f"{title} is a DoRA ({len(dora)} modules), whose change depends on the model's own weights: load it with "
            "ComfyUI's own Load LoRA, before or after Apply QR-LoRA"
        )
    whole = [base for base, keys in modules.items() if "up" not in keys]
    if whole and not rank:
        raise FileFormatError(
            f"{title}: {len(whole)} of {len(modules)} modules are not low-rank (LoHa, LoKr or whole differences): "
            f"{first_few(whole)}. Set 'rank' for the best approximation of so many columns, with what it loses "
            "reported, or use ComfyUI's own Load LoRA"
        )
    if others and choice == "refuse":
        counts = ", ".join(f"{count} {what}" for what, count in Counter(others.values()).items())
        raise FileFormatError(
            f"{title} also holds {counts}, which no \u0394R can hold: {first_few(others)}. Set 'other_parts' to 'leave "
            "out' to go without them, or use ComfyUI's own Load LoRA"
        )


def _plain(base: str) -> str:
    """A module's name without what trainers put in front of it."""
    plain, before = base, ""
    while plain != before:
        before = plain
        plain = next((plain.removeprefix(prefix) for prefix in _PREFIXES if plain.startswith(prefix)), plain)
    return plain.replace(".processor.to_", ".to_")


def _layers(
    file: TensorFile, family: Family | None, base: str, shape: tuple[int, int]
) -> Iterable[tuple[str, slice | Tensor]]:
    """The layers of a module, and the rows of its change that each of them has."""
    plain = _plain(base)
    entry = find(family, plain) if family is not None else None
    if entry is not None:
        places = cut(entry, shape) if len(entry.layers) > 1 else {entry.name(entry.layers[0]): (0, shape[0])}
        if places is None:
            names = ", ".join(entry.name(layer) for layer in entry.layers)
            raise FileFormatError(f"{file.path.name}: {base} with shape {shape} cannot be cut into {names}")
        return [(name, slice(start, start + rows)) for name, (start, rows) in places.items()]
    for theirs, native in family.swapped if family is not None else ():
        if plain.replace(".", "_") == theirs.replace(".", "_"):  # scale before shift there, shift before scale here
            return [(NATIVE + native, torch.arange(shape[0]).roll(shape[0] // 2))]
    if base.startswith(_NATIVE_PREFIXES):
        return [(NATIVE + plain, slice(None))]
    return [(plain if "." in plain else base, slice(None))]


def _require_once(file: TensorFile, infos: Mapping[str, LayerInfo], dense: Mapping[str, Tensor], name: str) -> None:
    if name in infos or name in dense:
        raise FileFormatError(f"{file.path.name} changes {name} twice, under two names")


def _truncated(change: Tensor, rank: int, device: torch.device | None) -> tuple[AdapterLayer, float]:
    """The best pair of so many columns, and the share of the energy that it loses."""
    q, delta_r = decompose(change.to(device), min(rank, *change.shape), method="fast")
    energy = float(change.double().square().sum())
    lost = 1 - float(delta_r.double().square().sum()) / energy if energy else 0.0
    return AdapterLayer(q.cpu(), delta_r.cpu()), lost


def lora_text(opened: OpenedLora) -> Sequence[str]:
    """What a person has to know of a file that was opened, line by line."""
    names = [family.name for family in (opened.family, *opened.like) if family is not None]
    lines = [" or ".join(names) or "of no family that is known here: no kinds of blocks"]
    if opened.text_encoder:
        lines.append(f"{opened.text_encoder} text encoder modules: left to ComfyUI's own Load LoRA (CLIP)")
    lines += [f"left out: {count} {what}" for what, count in opened.left_out.items()]
    if opened.lost:
        worst = max(opened.lost, key=lambda name: opened.lost[name])
        lines.append(
            f"{len(opened.lost)} layers approximated: up to {100 * opened.lost[worst]:.2g} % of a layer's energy lost "
            f"(most at {worst})"
        )
    return lines
