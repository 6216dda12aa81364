"""Writing adapters and bases, in the published format and in the portable one that any LoRA loader applies."""

import datetime
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import __version__
from .adapter import Adapter, AdapterLayer, Progress
from .errors import BasisMismatchError, FileFormatError
from .families import family_of_targets, layer_kind
from .formats import (
    FULL_QR,
    PORTABLE,
    PORTABLE_ALPHA,
    PUBLISHED,
    PUBLISHED_BASE_R,
    open_adapter,
    portable_key,
)
from .linalg import require_finite
from .paths import numbered_names
from .storage import TensorFile, TensorSpec
from .writing import CONTENT, content_hash, write_tensors

AdapterFormat = Literal["portable", "published"]
ADAPTER_FORMATS: tuple[str, ...] = ("portable", "published")

# What two files of one content may differ in
_PASSING = ("modelspec.title", "modelspec.date", "qrlora.pack_version", CONTENT)

Entry = tuple[str, TensorSpec, Callable[[AdapterLayer], Tensor]]


def save_adapter(
    adapter: Adapter,
    path: Path,
    *,
    format: AdapterFormat = "portable",
    base_r: Callable[[str], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write an adapter; what was written is opened and checked before it takes its name.

    Args:
        adapter: what to write; layers are read one by one.
        path: must not exist unless `overwrite`.
        format: "portable" holds `lora_B` = Q, `lora_A` = dR and alpha; method qr becomes the rank-2r difference
            `[Q' Q] [R'; -R]`. "published" holds q, delta_r and base_r, or up and down for method qr. It has no
            alpha and means scaling 1, so another scaling goes into R and dR.
        base_r: layer name -> R of the base weight, (rank, in), for "published" where the adapter has none.
        dtype: how Q and dR are stored; None: as the adapter holds them. bfloat16 halves the file and costs the update
            about 0.2 %.
        metadata: fields besides, or instead of, the standard ones.
        progress: wraps the names of the layers that are gone through; it may stop the work by raising.

    Raises:
        BasisMismatchError: the format needs tensors that the adapter does not hold.
        PathError: the file exists or cannot be written.
        WeightError: a tensor holds NaN or Inf.
        FileFormatError: what was written does not read back.
    """
    written = _Written(adapter, format, base_r, dtype, progress)
    fields = standard_metadata(adapter) | {"qrlora.format": format} | dict(metadata or {})

    def check(temporary: Path) -> None:
        problem = ""
        try:
            count = len(open_adapter(temporary).layers)
            if count != len(adapter.layers):
                problem = f"it would have {count} layers instead of {len(adapter.layers)}"
        except FileFormatError as error:
            problem = str(error).replace(temporary.name, path.name)
        if problem:  # outside of `except`: a traceback would keep the map open, and Windows could not delete the file
            raise FileFormatError(f"{adapter.name} cannot be saved as {format}: {problem}")

    return write_tensors(path, written.specs, written.stream(), fields, overwrite=overwrite, check=check, content=True)


class Saved(NamedTuple):
    """Where an adapter lies: the file, whether it was written now, and how many files have the name by now."""

    path: Path
    is_new: bool
    files: int


def save_once(
    adapter: Adapter,
    folder: Path,
    name: str,
    *,
    format: AdapterFormat = "portable",
    base_r: Callable[[str], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Saved:
    """`save_adapter` under a free name, unless a file of that name, with or without a number, holds the same already.

    The same are files with the same tensors, bit for bit, and the same metadata but for title, date and versions.

    Args:
        folder, name: see `free_name`.
        adapter, format, base_r, dtype, progress: see `save_adapter`.

    Raises:
        as `save_adapter`; and PathError when the name is refused.
    """
    *taken, free = numbered_names(folder, name)
    written = _Written(adapter, format, base_r, dtype, progress)
    fields = standard_metadata(adapter) | {"qrlora.format": format}
    alike = [path for path in taken if _is_alike(path, written.specs, fields)]
    if alike:
        content = content_hash(written.specs, written.stream())
        for path in alike:
            if TensorFile(path).metadata[CONTENT] == content:
                return Saved(path, False, len(taken))
    save_adapter(adapter, free, format=format, base_r=base_r, dtype=dtype, progress=progress)
    return Saved(free, True, len(taken) + 1)


def standard_metadata(adapter: Adapter) -> dict[str, str]:
    """Header fields of an adapter: modelspec's, and ours under `qrlora.`; what the source file said is kept."""
    family = family_of_targets(adapter.targets)
    kept = {key: value for key, value in adapter.metadata.items() if key.startswith(("qrlora.", "modelspec."))}
    kept.pop(CONTENT, None)  # of the file that it was read from
    fields = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.architecture if family else 'unknown'}/lora",
        "modelspec.implementation": "qr-lora",
        "modelspec.title": adapter.name,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **kept,
        "qrlora.method": adapter.method,
        "qrlora.rank": str(adapter.rank),
        "qrlora.alpha": f"{adapter.alpha:.9g}",
        "qrlora.targets": " ".join(sorted({layer_kind(name, family).layer for name in adapter.layers})),
        "qrlora.pack_version": __version__,
    }
    if adapter.basis_fingerprint:
        fields["qrlora.basis_fingerprint"] = adapter.basis_fingerprint
    return fields


class _Written:
    """The tensors of a file to be: their specs, and a stream that computes them layer by layer.

    Raises:
        FileFormatError: there is no such format.
        BasisMismatchError: it needs tensors that the adapter does not hold.
    """

    def __init__(
        self,
        adapter: Adapter,
        format: AdapterFormat,
        base_r: Callable[[str], Tensor] | None,
        dtype: torch.dtype | None,
        progress: Progress | None,
    ) -> None:
        if format not in ADAPTER_FORMATS:
            raise FileFormatError(f"format is {format!r}, expected one of {', '.join(ADAPTER_FORMATS)}")
        entries = _portable_entries if format == "portable" else _published_entries
        self._adapter, self._progress = adapter, progress
        self._plan = {
            name: [_stored(entry, dtype) for entry in entries(adapter, name, base_r)] for name in adapter.layers
        }
        self.specs = {key: spec for layer in self._plan.values() for key, spec, _ in layer}

    def stream(self) -> Iterable[tuple[str, Tensor]]:
        names = list(self._plan)
        for name in names if self._progress is None else self._progress(names):
            tensors = self._adapter.layer(name)
            for key, spec, pick in self._plan[name]:
                tensor = pick(tensors).to(spec.dtype)
                require_finite(tensor, f"{key} as {spec.dtype}")
                yield key, tensor


def _is_alike(path: Path, specs: Mapping[str, TensorSpec], fields: Mapping[str, str]) -> bool:
    """Whether a file has these names, shapes, dtypes and fields; then its content is worth a look."""
    try:
        file = TensorFile(path)
    except FileFormatError:  # another file of that name, or none that can be read
        return False
    theirs, ours = (
        {key: value for key, value in each.items() if key not in _PASSING} for each in (file.metadata, fields)
    )
    return CONTENT in file.metadata and file.specs == specs and theirs == ours


def _stored(entry: Entry, dtype: torch.dtype | None) -> Entry:
    """An entry in another dtype; alpha, a single number, stays float32."""
    key, spec, pick = entry
    return (key, TensorSpec(dtype, spec.shape), pick) if dtype is not None and spec.shape else entry


def _portable_entries(adapter: Adapter, name: str, _: object) -> Iterable[Entry]:
    (out, width), rank, scaling, dtype = adapter.layers[name]
    if adapter.method == "qr":
        if not adapter.has_initial:
            raise BasisMismatchError(
                f"{adapter.name} holds only the trained Q' and R'. A LoRA with those two would count the weight's core "
                "twice; the portable format needs the initial Q and R too. Save it as 'published'"
            )
        rank *= 2
    up, down = TensorSpec(dtype, (out, rank)), TensorSpec(dtype, (rank, width))
    key = portable_key(name)
    yield PORTABLE["up"].format(key), up, lambda _: adapter.update(name)[0]
    yield PORTABLE["down"].format(key), down, lambda _: adapter.update(name)[1]
    yield PORTABLE_ALPHA.format(key), TensorSpec(torch.float32, ()), lambda _: torch.tensor(scaling * rank)


def _published_entries(adapter: Adapter, name: str, base_r: Callable[[str], Tensor] | None) -> Iterable[Entry]:
    (out, width), rank, scaling, dtype = adapter.layers[name]
    up, down = TensorSpec(dtype, (out, rank)), TensorSpec(dtype, (rank, width))
    if adapter.method == "qr":
        yield FULL_QR["up"].format(name), up, lambda layer: layer.up
        yield FULL_QR["down"].format(name), down, lambda layer: _times(layer.down, scaling)
        return
    if base_r is None and not adapter.has_initial:
        raise BasisMismatchError(
            f"the published format stores the base R of every layer, and {adapter.name} has none: connect the model "
            "that it was trained on, or save it as 'portable'"
        )
    yield PUBLISHED["q"].format(name), up, lambda layer: layer.up
    yield PUBLISHED["delta_r"].format(name), down, lambda layer: _times(layer.down, scaling)

    def base(layer: AdapterLayer) -> Tensor:
        if layer.initial is not None:
            return _times(layer.initial.r, scaling)
        assert base_r is not None
        return _times(base_r(name), scaling)

    yield PUBLISHED_BASE_R.format(name), down, base


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor.float() * factor
