"""The basis of a base model, rank and target list: computed once, kept in a file, found again by fingerprint."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch

from qrlora_core import (
    Adapter,
    Basis,
    FileFormatError,
    LayerTarget,
    WeightError,
    basis_name,
    decompose,
    initial_basis,
    open_basis,
    save_basis,
)
from qrlora_core.storage import TensorSpec
from qrlora_core.writing import verify_checksum

from ..errors import TrainError
from .source import BaseModel

log = logging.getLogger(__name__)

BasisOf = Callable[[str], Basis]


def basis_path(
    folder: Path, source: BaseModel, targets: Sequence[LayerTarget], rank: int, method: Literal["fast", "exact"]
) -> Path:
    """Where the basis of these weights lies, made or not: its name says all that it depends on."""
    return Path(folder) / basis_name(source.fingerprint, targets, rank, method)


def cached_basis(
    folder: Path,
    source: BaseModel,
    targets: Sequence[LayerTarget],
    rank: int,
    method: Literal["fast", "exact"] = "fast",
    device: torch.device | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[BasisOf, Path]:
    """A reader of every target's Q and R, decomposing the base model only where no file has it yet.

    The weights are decomposed as the base model's file holds them, whatever they are stored in for training, so that
    every run on one base model trains on one basis. One layer is in memory at a time.

    Args:
        folder: of the files.
        targets: which layers.
        rank, method: see `qrlora_core.decompose`.
        device: where the decomposition runs.
        on_progress: called with (layers done, layers in all); what it raises ends the work and leaves no file.

    Returns:
        Layer name -> Basis (float32, read when asked for), and the file.

    Raises:
        WeightError: the rank does not fit a layer, or a weight holds NaN or Inf.
        PathError: the file cannot be written.
    """
    narrow = [target for target in targets if rank > min(target.shape)]
    if narrow:
        raise WeightError(
            f"rank {rank} does not fit {narrow[0].name} {narrow[0].shape}: use {min(narrow[0].shape)} or less"
        )
    path = basis_path(folder, source, targets, rank, method)
    readers = _opened(path, targets)
    if readers is None:
        done = 0

        def compute(name: str) -> Basis:
            nonlocal done
            on_progress(done, len(targets))
            done += 1
            basis = decompose(source.weight(name).to(device or "cpu"), rank, method=method)
            return Basis(basis.q.cpu(), basis.r.cpu())

        specs = {target.name: TensorSpec(torch.float32, target.shape) for target in targets}
        metadata = {
            "qrlora.rank": str(rank),
            "qrlora.base_fingerprint": source.fingerprint,
            "qrlora.decomposition": method,
        }
        save_basis(path, specs, compute, metadata, overwrite=True)
        on_progress(len(targets), len(targets))
        readers = _opened(path, targets)
    assert readers is not None, "the basis was written and checked"
    return lambda name: readers[name](), path


def initial_basis_of(source: BaseModel, device: torch.device) -> Callable[[Adapter, str], Basis]:
    """The initial Q and R of a full-QR adapter that holds only the trained ones: those of the base model's weight."""

    return lambda adapter, name: initial_basis(source.weight(name).to(device), adapter.layers[name].rank)


def require_layers(source: BaseModel, targets: Iterable[LayerTarget]) -> None:
    """Whether the base model has these layers in these shapes.

    Raises:
        TrainError: reason "model".
    """
    for target in targets:
        spec = source.specs.get(f"{target.name}.weight")
        if spec is None or spec.shape != target.shape:
            held = spec.shape if spec else "not there"
            raise TrainError("model", f"{target.name} is {held} in {source.path.name}, the adapter has {target.shape}")


def _opened(path: Path, targets: Sequence[LayerTarget]) -> dict[str, Callable[[], Basis]] | None:
    """Readers of a basis file, None when there is none that can be used; it is then made anew.

    Its checksum is compared, and every layer looked at once: shapes, finite numbers, orthonormal columns, and an R that
    is not nothing. A basis that was damaged on disk would otherwise be trained on in silence.
    """
    if not path.is_file():
        return None
    try:
        verify_checksum(path)
        readers, _ = open_basis(path)
        if readers.keys() != {target.name for target in targets}:
            return None
        for target in targets:
            q, r = readers[target.name]()
            if (q.shape[0], r.shape[1]) != target.shape or not bool(r.any()):
                raise FileFormatError(f"{path.name}: {target.name} is {tuple(q.shape)} and {tuple(r.shape)}, or empty")
    except (FileFormatError, WeightError) as error:
        log.warning("the cached basis cannot be used and is computed again: %s", error)
        return None
    return readers
