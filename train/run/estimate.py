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
from .activations import activation_bytes, block_bytes, largest_block

# What CUDA, its libraries and its allocator's gaps take. Without it Python and the libraries count as they are.
_OVERHEAD = 1_000_000_000
# On a CPU: code and buffers of libraries that are first touched by a step, and what the allocator keeps of the tensors
# that came and went, as a share of those of one block. Measured.
_LIBRARIES = 150_000_000
_GAPS = 0.8
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
        estimate = estimate_memory(config, plan, source, targets, shapes, available)
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
    available: Available,
) -> MemoryEstimate:
    """Add up what `fit` will hold.

    Args:
        config: settings.
        plan: how memory is spent.
        source: base model.
        targets: the adapted layers.
        shapes: per bucket: channels, height, width of the latents, tokens and width of the texts.
        available: says whether the model lies on a graphics card.
    """
    compute = DTYPES[config.precision].itemsize
    on_cpu = available.vram is None
    inside = sum(math.prod(spec.shape) for name, spec in source.specs.items() if source.in_layer(name))
    outside = sum(math.prod(s.shape) for s in source.specs.values()) - inside
    blocks = int(inside * BITS[plan.base_storage] / 8)
    offloaded = int(blocks * plan.offload)
    largest = largest_block(source)
    # weights that are cast for use are kept as cast until the backward pass has used them, those that come for it as
    # they are; two blocks of these are there besides
    casts = plan.base_storage != config.precision and plan.base_storage not in ("int8", "nf4")
    recompute = plan.gradient_checkpointing
    live = largest if recompute else inside
    cast = live * compute if casts else 0
    moved = 0
    if plan.offload:
        moved = int(2 * largest * BITS[plan.base_storage] / 8)
        if not recompute and not casts:
            moved += offloaded
    columns = sum(t.shape[0] if config.method != "qr" else t.shape[0] + t.shape[1] for t in targets)
    beside = Path(config.training_adapter) if config.training_adapter else None
    trained = config.rank * sum(t.shape[1] if config.method != "qr" else sum(t.shape) for t in targets)
    return MemoryEstimate(
        weights=blocks - offloaded + outside * compute,
        offloaded=0 if on_cpu else offloaded,
        trained=int(trained * _OPTIMIZER_BYTES[config.optimizer]),
        basis=config.rank * columns * (4 if config.method == "qr" else compute)
        + (beside.stat().st_size if beside is not None and beside.is_file() else 0),
        activations=max(activation_bytes(config, recompute, source, targets, shape) for shape in shapes) + cast + moved,
        overhead=_overhead_of_cpu(config, plan, source, shapes) if on_cpu else _OVERHEAD,
    )


def free_memory(device: torch.device) -> Available:
    """What is free now; on a CPU that is what this process holds already, too."""
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        return Available(free, torch.cuda.mem_get_info(device)[0])
    return Available(free + _own_memory(), None)


def _overhead_of_cpu(config: FitConfig, plan: MemoryPlan, source: BaseModel, shapes: Sequence[tuple[int, ...]]) -> int:
    """What a process takes beside all that is counted."""
    passing = 0.0
    if not plan.offload:  # with it the allocator keeps nothing, see prepare
        passing = _GAPS * max(sum(block_bytes(config, source, shape)) for shape in shapes)
    return _own_memory() + _LIBRARIES + int(passing)


def _own_memory() -> int:
    """What Python and the libraries take, and nothing else yet."""
    held: int = psutil.Process().memory_info().rss
    return held


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
    needed = estimate.ram if available.vram is not None else estimate.vram
    return ("RAM", needed, available.ram) if needed > available.ram else None


def _plans(config: FitConfig, source: BaseModel, available: Available, storage: Storage | None) -> Iterator[MemoryPlan]:
    """From exact and fast to frugal and slow."""
    storages: Sequence[Storage] = (storage,) if storage else _storages(config, source)
    switches = (False, True) if config.gradient_checkpointing == "auto" else (config.gradient_checkpointing,)
    first = 0.0 if config.offload == "auto" else config.offload
    for held in storages:
        yield from (MemoryPlan(held, switch, first) for switch in switches)
    last = storages[-1]
    if config.offload == "auto" and last not in NEEDS:
        yield from (MemoryPlan(last, switches[-1], step / _OFFLOAD_STEPS) for step in range(1, _OFFLOAD_STEPS + 1))


def _storages(config: FitConfig, source: BaseModel) -> Sequence[Storage]:
    """In which dtypes the base may be held, the most exact first. A plain fp8 file loses nothing in fp8."""
    if config.base_storage != "auto":
        return (config.base_storage,)
    return ("fp8",) if "float8_e4m3fn" in source.formats else (config.precision, "fp8")


def memory_text(estimate: MemoryEstimate, available: Available) -> str:
    """What a run takes of what is free, in words."""
    if available.vram is None:
        return f"{gigabytes(estimate.vram)} of {gigabytes(available.ram)} free RAM"
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
