"""How much memory a run will take, before anything is loaded, and what to choose where that is left to the trainer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from qrlora_core import LayerTarget

from ..config import FitConfig, Storage
from ..errors import TrainError
from ..model.source import BaseModel
from ..model.transformer import BITS, DTYPES, NEEDS

# Backward works on gradients and products of about this many tensors of a block's widest width besides.
_WORKING = 12.0
# What CUDA, its libraries and its allocator's gaps take.
_OVERHEAD = 1_000_000_000
_OFFLOAD_STEPS = 20
# Bytes per trained number: itself, its gradient, the optimizer's state
_OPTIMIZER_BYTES = {"adamw": 4 + 4 + 8, "adamw8bit": 4 + 4 + 2.1, "prodigy": 4 + 4 + 16}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What decides how much memory a run takes and how fast it is, with nothing left to "auto"."""

    base_storage: Storage
    gradient_checkpointing: bool
    offload: float

    def __str__(self) -> str:
        switch = "on" if self.gradient_checkpointing else "off"
        return f"base_storage {self.base_storage}, gradient_checkpointing {switch}, offload {self.offload:g}"


class Available(NamedTuple):
    """Bytes that are free. `vram` is None where the model lies in RAM."""

    ram: int
    vram: int | None


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes, by what they are for. `vram` is what the training device holds, `ram` what else the process holds."""

    weights: int
    offloaded: int
    trained: int
    basis: int
    activations: int
    overhead: int

    @property
    def vram(self) -> int:
        return self.weights + self.trained + self.basis + self.activations + self.overhead

    @property
    def ram(self) -> int:
        return self.offloaded + 2_000_000_000


def choose_memory(
    config: FitConfig,
    source: BaseModel,
    targets: Sequence[LayerTarget],
    shapes: Sequence[tuple[int, ...]],
    available: Available,
    storage: Storage | None = None,
) -> tuple[MemoryPlan, MemoryEstimate]:
    """The first plan that fits into what is free, from exact and fast to frugal and slow; the last one if none does.

    Settings that are not "auto" are kept as they are.

    Args:
        config, source, targets, shapes: see `estimate_memory`.
        available: what is free.
        storage: how the base was held when the run began: that decides its trajectory, and is kept.
    """
    plan, estimate = None, None
    for plan in _plans(config, source, available, storage):
        estimate = estimate_memory(config, plan, source, targets, shapes)
        if not _lacking(estimate, available):
            break
    assert plan is not None and estimate is not None, "there is at least one plan"
    return plan, estimate


def estimate_memory(
    config: FitConfig,
    plan: MemoryPlan,
    source: BaseModel,
    targets: Sequence[LayerTarget],
    shapes: Sequence[tuple[int, ...]],
) -> MemoryEstimate:
    """Add up what `fit` will hold.

    Args:
        config: settings.
        plan: how memory is spent.
        source: base model.
        targets: the adapted layers.
        shapes: per bucket: channels, height, width of the latents, tokens and width of the texts.
    """
    compute = DTYPES[config.precision].itemsize
    inside = sum(math.prod(spec.shape) for name, spec in source.specs.items() if source.in_layer(name))
    outside = sum(math.prod(s.shape) for s in source.specs.values()) - inside
    blocks = int(inside * BITS[plan.base_storage] / 8)
    offloaded = int(blocks * plan.offload)
    # weights that are cast for use are kept as cast until the backward pass has used them
    casts = plan.base_storage != config.precision and plan.base_storage not in ("int8", "nf4")
    live = _largest_block(source) if plan.gradient_checkpointing else inside
    columns = sum(t.shape[0] if config.method != "qr" else t.shape[0] + t.shape[1] for t in targets)
    beside = Path(config.training_adapter) if config.training_adapter else None
    trained = config.rank * sum(t.shape[1] if config.method != "qr" else sum(t.shape) for t in targets)
    return MemoryEstimate(
        weights=blocks - offloaded + outside * compute,
        offloaded=offloaded,
        trained=int(trained * _OPTIMIZER_BYTES[config.optimizer]),
        basis=config.rank * columns * (4 if config.method == "qr" else compute)
        + (beside.stat().st_size if beside is not None and beside.is_file() else 0),
        activations=max(_activations(config, plan, source, shape) for shape in shapes) + casts * live * compute,
        overhead=_OVERHEAD,
    )


def free_memory(device: torch.device) -> Available:
    """What is free now."""
    vram = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Available(psutil.virtual_memory().available, vram)


def require_memory(estimate: MemoryEstimate, available: Available) -> None:
    """Refuse a run that will not fit.

    Raises:
        TrainError: reason "memory"; the message names what to switch on.
    """
    lacking = _lacking(estimate, available)
    if lacking:
        kind, needed, free = lacking
        raise TrainError(
            "memory",
            f"training needs about {gigabytes(needed)} of {kind}, {gigabytes(free)} are free ({breakdown(estimate)}). "
            f"{_ADVICE}",
        )


def _lacking(estimate: MemoryEstimate, available: Available) -> tuple[str, int, int] | None:
    """Which memory is too small: its name, what is needed, what is free."""
    if available.vram is not None and estimate.vram > available.vram:
        return "GPU memory", estimate.vram, available.vram
    needed = estimate.ram if available.vram is not None else estimate.vram + estimate.offloaded
    return ("RAM", needed, available.ram) if needed > available.ram else None


def _plans(config: FitConfig, source: BaseModel, available: Available, storage: Storage | None) -> Iterator[MemoryPlan]:
    """From exact and fast to frugal and slow."""
    storages: Sequence[Storage] = (storage,) if storage else _storages(config, source)
    switches = (False, True) if config.gradient_checkpointing == "auto" else (config.gradient_checkpointing,)
    first = 0.0 if config.offload == "auto" else config.offload
    for held in storages:
        yield from (MemoryPlan(held, switch, first) for switch in switches)
    last = storages[-1]
    if config.offload == "auto" and available.vram is not None and last not in NEEDS:
        yield from (MemoryPlan(last, switches[-1], step / _OFFLOAD_STEPS) for step in range(1, _OFFLOAD_STEPS + 1))


def _storages(config: FitConfig, source: BaseModel) -> Sequence[Storage]:
    """In which dtypes the base may be held, the most exact first. A plain fp8 file loses nothing in fp8."""
    if config.base_storage != "auto":
        return (config.base_storage,)
    return ("fp8",) if "float8_e4m3fn" in source.formats else (config.precision, "fp8")


def memory_text(estimate: MemoryEstimate, available: Available) -> str:
    """What a run takes of what is free, in words."""
    if available.vram is None:
        return f"{gigabytes(estimate.vram + estimate.offloaded)} of {gigabytes(available.ram)} free RAM"
    return (
        f"{gigabytes(estimate.vram)} of {gigabytes(available.vram)} free GPU memory and {gigabytes(estimate.ram)} of "
        f"{gigabytes(available.ram)} free RAM"
    )


def breakdown(estimate: MemoryEstimate) -> str:
    """The parts in words."""
    parts = {
        "base": estimate.weights,
        "trained tensors and optimizer": estimate.trained,
        "basis": estimate.basis,
        "activations": estimate.activations,
        "waiting in RAM": estimate.offloaded,
    }
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


_ADVICE = (
    "In this order: close other programs that use the device; base_storage, gradient_checkpointing and offload auto; "
    "optimizer adamw8bit; batch_size 1; a lower resolution or rank; base_storage nf4, which needs bitsandbytes. "
    "memory_check false tries anyway"
)


def out_of_memory(config: FitConfig) -> TrainError:
    """What to say when memory ran out although the estimate had fitted."""
    return TrainError("memory", f"memory ran out at rank {config.rank}, batch_size {config.batch_size}. {_ADVICE}")


def _largest_block(source: BaseModel) -> int:
    """Numbers in the largest block."""
    sizes: dict[str, int] = {}
    for name, spec in source.specs.items():
        if block := source.backbone.block_of(name):
            sizes[block] = sizes.get(block, 0) + math.prod(spec.shape)
    return max(sizes.values())


def _activations(config: FitConfig, plan: MemoryPlan, source: BaseModel, shape: tuple[int, ...]) -> int:
    _, height, width, text, _ = shape
    tokens = config.batch_size * (source.backbone.tokens(height, width) + text)
    bytes_each = tokens * source.facts.hidden * DTYPES[config.precision].itemsize
    counts, blocks = source.backbone.activation_counts, source.blocks
    if source.backbone.activations is not None:
        numbers = source.backbone.activations(source.specs, height, width, text, plan.gradient_checkpointing)
        return int(config.batch_size * numbers * DTYPES[config.precision].itemsize + bytes_each * _WORKING)
    if plan.gradient_checkpointing:  # a block that is recomputed keeps its input only
        kept = sum(blocks.values()) + max(counts.values())
    else:
        kept = sum(counts[name] * count for name, count in blocks.items())
    return int(bytes_each * (kept + _WORKING))
