"""The Q and R that a full-QR adapter began with, for files that hold only the trained ones.

They are those of the model's own weight. Finding them takes an exact decomposition of every layer (an hour on a CPU at
FLUX.1's size), so they are kept: in memory while the model is, and in the folder of bases that training uses, under the
name that training would look for.
"""

import logging
import weakref
from pathlib import Path

import torch

from ...qrlora_core import (
    Adapter,
    Basis,
    FileFormatError,
    MergeRecipe,
    PathError,
    QRLoRAError,
    TensorFile,
    WeightSlice,
    basis_name,
    initial_basis,
    model_fingerprint,
    open_basis,
    save_basis,
)
from ...qrlora_core.products import InitialOf
from ...qrlora_core.storage import TensorSpec
from . import folders
from .places import load_device, own_weight
from .protocols import ModelPatcher
from .session import with_progress

log = logging.getLogger(__name__)

_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
_computed: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[str, int], Basis]] = weakref.WeakKeyDictionary()


def initial_bases(model: ModelPatcher, recipe: MergeRecipe, places: dict[str, WeightSlice]) -> InitialOf | None:
    """A reader of the initial Q and R of every full-QR adapter of a recipe that lacks them; None when none does.

    Under the progress bar and stopped by Cancel where they have to be computed.

    Raises:
        WeightError: a weight cannot be read or decomposed.
    """
    lacking = [term.adapter for term in recipe.active if term.adapter.method == "qr" and not term.adapter.has_initial]
    if not lacking:
        return None
    for adapter in lacking:
        _fill(model, adapter, places)
    bases = _computed[model.model]
    return lambda adapter, name: bases[name, adapter.layers[name].rank]


def _fill(model: ModelPatcher, adapter: Adapter, places: dict[str, WeightSlice]) -> None:
    """Make every basis of an adapter known for this model."""
    bases = _computed.setdefault(model.model, {})
    missing = [name for name, info in adapter.layers.items() if (name, info.rank) not in bases]
    if not missing:
        return
    path = _file(model, adapter, places)
    if path is not None and _read(path, adapter, bases):
        return
    for name in with_progress(missing):
        weight, _ = own_weight(model, places[name])
        rank = adapter.layers[name].rank
        bases[name, rank] = initial_basis(weight.to(load_device(model)), rank)
    if path is not None:
        _write(path, adapter, bases)


def _file(model: ModelPatcher, adapter: Adapter, places: dict[str, WeightSlice]) -> Path | None:
    """Where these bases lie or will lie; None when the host does not say which file the model came from."""
    loader = getattr(model, "cached_patcher_init", None)
    source = Path(str(loader[1][0])) if loader and loader[1] and isinstance(loader[1][0], str) else None
    if source is None or not source.is_file() or len({info.rank for info in adapter.layers.values()}) > 1:
        return None
    try:
        stored = TensorFile(source, skip_other=True).specs
        first = places[next(iter(adapter.layers))]
        _, held = own_weight(model, first)
        in_file = next((stored[prefix + first.key].dtype for prefix in _PREFIXES if prefix + first.key in stored), None)
        # a loader may have rounded the weights: their basis is not that of the file
        method = "exact" if held == in_file else f"exact-{str(held).removeprefix('torch.')}"
        name = basis_name(model_fingerprint(source), adapter.targets, adapter.rank, method)
    except FileFormatError as error:
        log.debug("QR-LoRA: no fingerprint of %s: %s", source.name, error)
        return None
    return folders.bases_folder() / name


def _read(path: Path, adapter: Adapter, bases: dict[tuple[str, int], Basis]) -> bool:
    """Whether a file gave every basis of the adapter."""
    if not path.is_file():
        return False
    try:
        readers, _ = open_basis(path)
        if readers.keys() != adapter.layers.keys():
            return False
        in_file = {(name, info.rank): readers[name]() for name, info in adapter.layers.items()}
    except QRLoRAError as error:
        log.warning("QR-LoRA: %s is computed again: %s", path.name, error)
        return False
    bases.update(in_file)
    return True


def _write(path: Path, adapter: Adapter, bases: dict[tuple[str, int], Basis]) -> None:
    """Keep the bases for the next start; a disk that is full does not stop anybody from sampling."""
    specs = {target.name: TensorSpec(torch.float32, target.shape) for target in adapter.targets}
    try:
        save_basis(
            path, specs, lambda name: bases[name, adapter.rank], {"qrlora.rank": str(adapter.rank)}, overwrite=True
        )
    except PathError as error:
        log.warning("QR-LoRA: the basis is not kept for the next start: %s", error)
