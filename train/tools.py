"""The subcommands that neither train nor draw: basis, residual, merge, export. Each takes its parsed flags."""

import argparse
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qrlora_core import (
    Adapter,
    Basis,
    LayerTarget,
    MergeRecipe,
    PathError,
    base_r,
    merge,
    merge_report,
    merged_adapter,
    open_adapter,
    residual_weight,
    save_adapter,
    write_residual,
)
from qrlora_core.linalg import decompose

from .basis import cached_basis
from .errors import TrainError
from .source import BaseModel

log = logging.getLogger(__name__)


def basis(args: argparse.Namespace) -> None:
    """Decompose a base model into the folder that `fit --basis-cache` reads."""
    source = BaseModel(args.model)
    targets = source.targets(args.targets)
    with tqdm(total=len(targets), desc="decomposing") as bar:
        _, path = cached_basis(
            args.output,
            source,
            targets,
            args.rank,
            args.decomposition,
            chosen_device(args.device),
            lambda done, total: _advance(bar, done),
        )
    log.info("basis of %d layers: %s", len(targets), path)


def residual(args: argparse.Namespace) -> None:
    """Stream `W_res = W - scaling * Q R` of every layer into a file."""
    source, device = BaseModel(args.model), chosen_device(args.device)
    adapter = open_adapter(args.adapter) if args.adapter else None
    targets = source.targets(args.targets) if adapter is None else adapter.targets
    _require_free(args.output)
    _require_layers(source, targets)

    def residual_of(name: str) -> Tensor:
        weight = source.weight(name).to(device).float()
        if adapter is None:
            return residual_weight(weight, decompose(weight, args.rank, method=args.decomposition), 1.0).cpu()
        q = adapter.layer(name).up.to(device)
        return residual_weight(weight, Basis(q, base_r(weight, q)), adapter.layers[name].scaling).cpu()

    metadata = {"qrlora.format": "residual", "qrlora.base_fingerprint": source.fingerprint}
    metadata["qrlora.rank"] = str(adapter.rank if adapter else args.rank)
    with tqdm(total=len(targets), desc="writing") as bar:
        path = write_residual(
            args.output, targets, _counted(residual_of, bar), dtype=getattr(torch, args.dtype), metadata=metadata
        )
    log.info("residual of %d layers: %s", len(targets), path)


def merge_files(args: argparse.Namespace) -> None:
    """`alpha * style + beta * content` as one file."""
    style, content = (MergeRecipe.of(open_adapter(path)) for path in (args.style, args.content))
    recipe = merge(style, args.alpha, content, args.beta, args.on_basis_mismatch)
    done = merge_report(recipe)
    log.info(
        "%d layers: %d on one basis, %d stacked, %d aligned (%.2g %% lost), rank %d",
        done.layers, done.shared, done.stacked, done.aligned, 100 * done.lost_total, done.rank,
    )  # fmt: skip
    _write(merged_adapter(recipe), args)


def export(args: argparse.Namespace) -> None:
    """An adapter in the other format, or scaled; the portable format is a standard LoRA."""
    _write(merged_adapter(MergeRecipe.of(open_adapter(args.adapter), args.strength)), args)


def chosen_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        TrainError: no such device.
    """
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    try:
        return torch.zeros(1, device=torch.device(name)).device
    except (RuntimeError, AssertionError) as error:
        raise TrainError("settings", f"device {name!r} cannot be used: {error}") from error


def _write(adapter: Adapter, args: argparse.Namespace) -> None:
    source = BaseModel(args.model) if args.model is not None else None
    if source is not None:
        _require_layers(source, adapter.targets)

    def base(name: str) -> Tensor:
        assert source is not None
        return base_r(source.weight(name), adapter.layer(name).up)

    save_adapter(adapter, args.output, format=args.format, base_r=base if source is not None else None)
    log.info("%s adapter of %d layers, rank %d: %s", args.format, len(adapter.layers), adapter.rank, args.output)


def _require_free(path: Path) -> None:
    if path.exists():
        raise PathError(f"{path.name} exists already; choose another name")


def _require_layers(source: BaseModel, targets: Iterable[LayerTarget]) -> None:
    """Whether the base model has these layers in these shapes."""
    for target in targets:
        spec = source.specs.get(f"{target.name}.weight")
        if spec is None or spec.shape != target.shape:
            found = spec.shape if spec else "not there"
            raise TrainError("model", f"{target.name} is {found} in {source.path.name}, the adapter has {target.shape}")


def _advance(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def _counted(work: Callable[[str], Tensor], bar: Any) -> Callable[[str], Tensor]:
    def counted(name: str) -> Tensor:
        result = work(name)
        bar.update(1)
        return result

    return counted
