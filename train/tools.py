"""The subcommands that neither train nor draw: basis, residual, merge, export. Each takes its parsed flags."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qrlora_core import (
    Adapter,
    Basis,
    MergeRecipe,
    PathError,
    decompose,
    merge,
    merge_report,
    merged_adapter,
    open_adapter,
    own_basis,
    residual_weight,
    save_adapter,
    storage_tolerance,
    write_residual,
)

from .errors import TrainError
from .model.basis import cached_basis, initial_basis_of, require_layers
from .model.device import chosen_device
from .model.source import BaseModel

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
    _require_free(args.output)
    source, device = BaseModel(args.model), chosen_device(args.device)
    adapter = open_adapter(args.adapter) if args.adapter else None
    targets = source.targets(args.targets) if adapter is None else adapter.targets
    require_layers(source, targets)

    def residual_of(name: str) -> Tensor:
        weight = source.weight(name).to(device).float()
        if adapter is None:
            return residual_weight(weight, decompose(weight, args.rank, method=args.decomposition), 1.0).cpu()
        basis = _own_basis(adapter, name, weight, source)
        return residual_weight(weight, basis, adapter.layers[name].scaling).cpu()

    metadata = {"qrlora.format": "residual", "qrlora.base_fingerprint": source.fingerprint}
    metadata["qrlora.rank"] = str(adapter.rank if adapter else args.rank)
    if adapter is not None and adapter.basis_fingerprint:
        metadata["qrlora.basis_fingerprint"] = adapter.basis_fingerprint
    with tqdm(total=len(targets), desc="writing") as bar:
        path = write_residual(
            args.output, targets, _counted(residual_of, bar), dtype=getattr(torch, args.dtype), metadata=metadata
        )
    log.info("residual of %d layers: %s", len(targets), path)


def merge_files(args: argparse.Namespace) -> None:
    """`alpha * style + beta * content` as one file."""
    _require_free(args.output)
    style, content = (MergeRecipe.of(open_adapter(path)) for path in (args.style, args.content))
    recipe = merge(style, args.alpha, content, args.beta, args.on_basis_mismatch)
    done = merge_report(recipe)
    log.info(
        "%d layers: %d on one basis, %d on a joint basis, %d aligned (%.2g %% lost), rank %d",
        done.layers, done.shared, done.joint, done.aligned, 100 * done.lost_total, done.rank,
    )  # fmt: skip
    _write(recipe, args)


def export(args: argparse.Namespace) -> None:
    """An adapter in the other format, or scaled; the portable format is a standard LoRA."""
    _require_free(args.output)
    _write(MergeRecipe.of(open_adapter(args.adapter), args.strength), args)


def _write(recipe: MergeRecipe, args: argparse.Namespace) -> None:
    source = BaseModel(args.model) if args.model is not None else None
    lacking_initial = [member for member in recipe.adapters if member.method == "qr" and not member.has_initial]
    # the published format keeps a lone full-QR adapter as it is; everything else needs to know what it changes
    alone = len(recipe.terms) == 1 and recipe.terms[0].strength == 1 and args.format == "published"
    if lacking_initial and not alone and source is None:
        raise TrainError(
            "settings",
            f"{lacking_initial[0].name} holds only the trained Q' and R'. What they change is known together with the "
            "base model that it was trained on: name that with --model",
        )
    if source is not None:
        for member in recipe.adapters:
            require_layers(source, member.targets)
    decomposed = source is not None and not alone
    initial = initial_basis_of(source, chosen_device("auto")) if source is not None and decomposed else None
    adapter = merged_adapter(recipe, initial_of=initial)

    def base(name: str) -> Tensor:
        assert source is not None
        return _own_basis(adapter, name, source.weight(name).float(), source).r

    save_adapter(adapter, args.output, format=args.format, base_r=base if source is not None else None)
    log.info("%s adapter of %d layers, rank %d: %s", args.format, len(adapter.layers), adapter.rank, args.output)


def _own_basis(adapter: Adapter, name: str, weight: Tensor, source: BaseModel) -> Basis:
    """Q and R of an adapter's layer, on the weight's device, once it is sure that they are this weight's."""
    stored = storage_tolerance(source.stored_dtype(f"{name}.weight"), adapter.layers[name].dtype)
    return own_basis(adapter, name, weight, stored)


def _require_free(path: Path) -> None:
    if path.exists():
        raise PathError(f"{path.name} exists already; choose another name")


def _advance(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def _counted(work: Callable[[str], Tensor], bar: Any) -> Callable[[str], Tensor]:
    def counted(name: str) -> Tensor:
        result = work(name)
        bar.update(1)
        return result

    return counted
