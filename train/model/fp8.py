"""Products with a frozen weight that is held in fp8: cast for each use, or multiplied in fp8."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainError

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_MULTIPLE = 16  # of both sizes of a weight, for the matrix products in fp8
_OLDEST_CARD = (8, 9)  # Ada; its and later cards' cores multiply fp8


def cast_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A linear layer whose parameters are cast to `dtype` for this use."""
    return nn.functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A linear layer that multiplies in fp8 forward: inputs are rounded, with one scale for all of them.

    The backward pass is that of the unrounded product, in `dtype`: gradients are too spread for fp8.

    Args:
        x: (..., in).
        weight: (out, in), float8_e4m3fn. One whose sizes are no multiples of 16 is cast instead.
        bias: (out,).
        dtype: of the result.
    """
    if weight.dtype != FP8 or weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
        return cast_linear(x, weight, bias, dtype)
    product: Any = _Fp8Product.apply
    y: Tensor = product(x.reshape(-1, x.shape[-1]).to(dtype), weight)
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(dtype)


class _Fp8Product(torch.autograd.Function):
    """`x W^T` for a frozen W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        scale = x.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
        # rounding must not lead beyond the largest number, which would be NaN
        rounded = (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(FP8)
        return torch._scaled_mm(rounded, weight.t(), scale, torch.ones_like(scale), out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = gradients
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None, None


class Fp8Linear(nn.Module):
    """A frozen linear layer that multiplies its fp8 weight without a cast.

    Args:
        layer: whose parameters it takes.
        dtype: of its results.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.bias, self._dtype)


def multiply_in_fp8(block: nn.Module, dtype: torch.dtype) -> int:
    """Let every linear layer of a block that is held in fp8 multiply so; how many there are."""
    layers = [
        (name, layer)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.dtype == FP8
    ]
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        block.get_submodule(parent).register_module(child, Fp8Linear(layer, dtype))
    return len(layers)


def require_fp8_products(device: torch.device) -> None:
    """Raise TrainError (reason "settings") where products in fp8 cannot be had. A processor has them, slowly."""
    if device.type == "cpu":
        return
    # AMD's cards are called cuda, too, and number themselves otherwise
    nvidia = device.type == "cuda" and torch.version.hip is None
    if not nvidia or torch.cuda.get_device_capability(device) < _OLDEST_CARD:
        raise TrainError(
            "settings",
            "fp8_products needs an NVIDIA card of the 40 series or newer (Ada, Hopper, Blackwell): switch it off",
        )
