"""What a step keeps of a forward pass until the backward pass has used it."""

import math
from collections.abc import Sequence

from qrlora_core import LayerTarget

from ..config import FitConfig
from ..model.source import BaseModel
from ..model.transformer import DTYPES

# Backward works on gradients and products of about this many tensors of a block's widest width besides.
_WORKING = 12.0


def activation_bytes(
    config: FitConfig, recompute: bool, source: BaseModel, targets: Sequence[LayerTarget], shape: tuple[int, ...]
) -> int:
    """Bytes that autograd keeps, and what the backward pass works on.

    Args:
        config, source, targets: see `estimate_memory`.
        recompute: whether blocks are computed again on the way back (gradient checkpointing).
        shape: channels, height, width of the latents, tokens and width of the texts.
    """
    block, working = block_bytes(config, source, shape)
    compute = config.batch_size * DTYPES[config.precision].itemsize
    if source.backbone.activations is not None:
        _, height, width, text, _ = shape
        whole, recomputed = source.backbone.activations(source.specs, height, width, text)
        return int((compute * sum(recomputed) + block if recompute else compute * sum(whole)) + working)
    # before the first layer that is adapted nothing is kept
    adapted = {source.backbone.block_of(target.name).rpartition(".")[0] for target in targets}
    lists = list(source.blocks)
    lists = lists[min((lists.index(name) for name in adapted if name in lists), default=0) :]
    counts = source.backbone.activation_counts
    if recompute:  # a block that is recomputed keeps its input only
        return int(sum(source.blocks[name] for name in lists) * _unit(config, source, shape) + block + working)
    kept = sum(counts[name] * source.blocks[name] for name in lists)
    return int(kept * _unit(config, source, shape) + working)


def block_bytes(config: FitConfig, source: BaseModel, shape: tuple[int, ...]) -> tuple[float, float]:
    """Bytes of what the largest block keeps while it is recomputed, and of what the backward pass works on."""
    unit = _unit(config, source, shape)
    if source.backbone.activations is not None:
        _, height, width, text, _ = shape
        whole, _ = source.backbone.activations(source.specs, height, width, text)
        return max(whole) * config.batch_size * DTYPES[config.precision].itemsize, _WORKING * unit
    return max(source.backbone.activation_counts.values()) * unit, _WORKING * unit


def largest_block(source: BaseModel) -> int:
    """Numbers in the largest block."""
    sizes: dict[str, int] = {}
    for name, spec in source.specs.items():
        if block := source.backbone.block_of(name):
            sizes[block] = sizes.get(block, 0) + math.prod(spec.shape)
    return max(sizes.values())


def _unit(config: FitConfig, source: BaseModel, shape: tuple[int, ...]) -> int:
    """Bytes of tokens * hidden size."""
    _, height, width, text, _ = shape
    tokens = config.batch_size * (source.backbone.tokens(height, width) + text)
    return tokens * source.facts.hidden * DTYPES[config.precision].itemsize
