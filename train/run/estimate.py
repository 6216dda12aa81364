"""How much memory a run will take, before anything is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from qrlora_core import LayerTarget

from ..config import FitConfig
from ..errors import TrainError
from ..model.source import BaseModel
from ..model.transformer import BITS, DTYPES

# Activations that autograd keeps of one block, in multiples of tokens * hidden size, counted with saved-tensor hooks on
# a small FLUX (tests compare). A block that is recomputed keeps its input only.
SAVED_DOUBLE = 22.0
SAVED_SINGLE = 14.5
# Backward works on gradients and products of about this many tensors of a block's widest width besides.
_WORKING = 12.0
# What CUDA, its libraries and its allocator's gaps take.
_OVERHEAD = 1_000_000_000
# Bytes per trained number: itself, its gradient, the optimizer's state
_OPTIMIZER_BYTES = {"adamw": 4 + 4 + 8, "adamw8bit": 4 + 4 + 2.1, "prodigy": 4 + 4 + 16}


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


def estimate_memory(
    config: FitConfig, source: BaseModel, targets: Sequence[LayerTarget], shapes: Sequence[tuple[int, ...]]
) -> MemoryEstimate:
    """Add up what `fit` will hold.

    Args:
        config: settings.
        source: base model.
        targets: the adapted layers.
        shapes: per bucket: channels, height, width of the latents, tokens and width of the texts.
    """
    compute = DTYPES[config.precision].itemsize
    inside = sum(
        math.prod(s.shape) for n, s in source.specs.items() if "transformer_blocks." in n and ".norm_" not in n
    )
    outside = sum(math.prod(s.shape) for s in source.specs.values()) - inside
    blocks = int(inside * BITS[config.base_storage] / 8)
    offloaded = int(blocks * config.offload)
    # weights that are cast for use are kept as cast until the backward pass has used them
    casts = config.base_storage != config.precision and config.base_storage not in ("int8", "nf4")
    live = _largest_block(source) if config.gradient_checkpointing else inside
    columns = sum(t.shape[0] if config.method != "qr" else t.shape[0] + t.shape[1] for t in targets)
    trained = config.rank * sum(t.shape[1] if config.method != "qr" else sum(t.shape) for t in targets)
    return MemoryEstimate(
        weights=blocks - offloaded + outside * compute,
        offloaded=offloaded,
        trained=int(trained * _OPTIMIZER_BYTES[config.optimizer]),
        basis=config.rank * columns * (4 if config.method == "qr" else compute),
        activations=max(_activations(config, source, shape) for shape in shapes) + casts * live * compute,
        overhead=_OVERHEAD,
    )


def require_memory(estimate: MemoryEstimate, device: torch.device) -> None:
    """Refuse a run that will not fit.

    Raises:
        TrainError: reason "memory"; the message names what to switch on.
    """
    free_ram = psutil.virtual_memory().available
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        if estimate.vram > free:
            raise TrainError(
                "memory",
                f"training needs about {gigabytes(estimate.vram)} of GPU memory, {gigabytes(free)} of "
                f"{gigabytes(whole)} are free ({breakdown(estimate)}). {_ADVICE}",
            )
        needed = estimate.ram
    else:
        needed = estimate.vram + estimate.offloaded
    if needed > free_ram:
        raise TrainError(
            "memory",
            f"training needs about {gigabytes(needed)} of RAM, {gigabytes(free_ram)} are free ({breakdown(estimate)}). "
            f"{_ADVICE}",
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
    "In this order: close other programs that use the device; gradient_checkpointing true; base_storage fp8, then "
    "nf4; optimizer adamw8bit; offload 0.5 or more (not with int8 or nf4); batch_size 1; a lower resolution or rank. "
    "memory_check false tries anyway"
)


def out_of_memory(config: FitConfig) -> TrainError:
    """What to say when memory ran out although the estimate had fitted."""
    return TrainError("memory", f"memory ran out at rank {config.rank}, batch_size {config.batch_size}. {_ADVICE}")


def _largest_block(source: BaseModel) -> int:
    """Numbers in the largest block."""
    sizes: dict[str, int] = {}
    for name, spec in source.specs.items():
        if "transformer_blocks." in name:
            block = ".".join(name.split(".")[:2])
            sizes[block] = sizes.get(block, 0) + math.prod(spec.shape)
    return max(sizes.values())


def _activations(config: FitConfig, source: BaseModel, shape: tuple[int, ...]) -> int:
    _, height, width, text, _ = shape
    hidden = source.config["num_attention_heads"] * source.config["attention_head_dim"]
    double, single = source.blocks
    bytes_each = config.batch_size * (height * width // 4 + text) * hidden * DTYPES[config.precision].itemsize
    if config.gradient_checkpointing:
        kept = double + single + max(SAVED_DOUBLE, SAVED_SINGLE)
    else:
        kept = SAVED_DOUBLE * double + SAVED_SINGLE * single
    return int(bytes_each * (kept + _WORKING))
