"""Writing adapters and bases, in the published format and in the portable one that any LoRA loader applies."""

import datetime
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

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
from .storage import TensorSpec
from .writing import write_tensors

AdapterFormat = Literal["portable", "published"]
ADAPTER_FORMATS: tuple[str, ...] = ("portable", "published")

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
            about 0.2 % (fact 7 of the design is about sums, not about storage).
        metadata: fields besides, or instead of, the standard ones.
        progress: wraps the names of the layers that are gone through; it may stop the work by raising.

    Raises:
        BasisMismatchError: the format needs tensors that the adapter does not hold.
        PathError: the file exists or cannot be written.
        WeightError: a tensor holds NaN or Inf.
        FileFormatError: what was written does not read back.
    """
    if format not in ADAPTER_FORMATS:
        raise FileFormatError(f"format is {format!r}, expected one of {', '.join(ADAPTER_FORMATS)}")
    entries = _portable_entries if format == "portable" else _published_entries
    plan = {name: [_stored(entry, dtype) for entry in entries(adapter, name, base_r)] for name in adapter.layers}
    specs = {key: spec for layer in plan.values() for key, spec, _ in layer}

    def stream() -> Iterable[tuple[str, Tensor]]:
        names = list(plan)
        for name in names if progress is None else progress(names):
            tensors = adapter.layer(name)
            for key, spec, pick in plan[name]:
                tensor = pick(tensors).to(spec.dtype)
                require_finite(tensor, f"{key} as {spec.dtype}")
                yield key, tensor

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

    return write_tensors(path, specs, stream(), fields, overwrite=overwrite, check=check)


def standard_metadata(adapter: Adapter) -> dict[str, str]:
    """Header fields of an adapter: modelspec's, and ours under `qrlora.`; what the source file said is kept."""
    family = family_of_targets(adapter.targets)
    kept = {key: value for key, value in adapter.metadata.items() if key.startswith(("qrlora.", "modelspec."))}
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
