"""FLUX models with random weights, of any size, as the trainer's own loader takes them."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch import Tensor

from qrlora_core import LayerTarget, flux_targets
from qrlora_core.storage import TensorSpec
from qrlora_core.writing import header_bytes
from train.model.backbones import FLUX


class RandomSource:
    """What `train.source.BaseModel` offers, with weights that are drawn when they are asked for.

    Args:
        double, single: numbers of blocks (FLUX.1: 19, 38).
        hidden: hidden size, a multiple of 128 (FLUX.1: 3072).
        text, pooled: widths of T5's and CLIP's outputs.
        dtype: what the weights are drawn in.
    """

    path = Path("random")
    backbone = FLUX

    def __init__(
        self, double: int, single: int, hidden: int, text: int = 4096, pooled: int = 768, dtype: Any = torch.bfloat16
    ) -> None:
        self.config = {
            "patch_size": 1,
            "in_channels": 64,
            "out_channels": 64,
            "num_layers": double,
            "num_single_layers": single,
            "attention_head_dim": 128,
            "num_attention_heads": hidden // 128,
            "joint_attention_dim": text,
            "pooled_projection_dim": pooled,
            "guidance_embeds": True,
            "axes_dims_rope": [16, 56, 56],
        }
        self.blocks, self._hidden = {"transformer_blocks": double, "single_transformer_blocks": single}, hidden
        with init_empty_weights():
            model = FluxTransformer2DModel(**self.config)
        self.specs = {name: TensorSpec(dtype, tuple(value.shape)) for name, value in model.state_dict().items()}

    def tensor(self, name: str) -> Tensor:
        """A draw that is the same every time: 0.02 N(0, 1) for matrices, ones for norms, zeros for biases."""
        dtype, shape = self.specs[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype) if ".norm_" in name else torch.zeros(shape, dtype=dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(hash_of(name))
        return (torch.randn(shape, generator=generator, device=device) / math.sqrt(shape[1])).to(dtype)

    def weight(self, layer: str) -> Tensor:
        return self.tensor(f"{layer}.weight")

    def targets(self, wanted: Iterable[str] = ()) -> tuple[LayerTarget, ...]:
        return flux_targets(*self.blocks.values(), self._hidden)

    def in_layer(self, name: str) -> bool:
        """Whether a parameter is the weight or bias of a linear layer of a block."""
        weight = f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
        shape = self.specs[weight].shape if weight in self.specs else ()
        return len(shape) == 2 and bool(self.backbone.block_of(name))

    def write(self, path: Path) -> Path:
        """The model as a diffusers-layout safetensors file, one tensor in memory at a time."""
        with path.open("wb") as file:
            file.write(header_bytes(self.specs, {}))
            for name in self.specs:
                file.write(self.tensor(name).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return path


def hash_of(name: str) -> int:
    """A seed from a name, equal on every machine."""
    value = 0
    for char in name.encode():
        value = (value * 131 + char) % (2**31)
    return value
