"""What the model sees, what it should predict, the loss (Esser et al., arXiv 2403.03206, section 3)."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from qrlora_core import EncodedText

from ..config import FitConfig, LossWeighting
from ..data.batches import Batch
from ..model.backbones import Backbone


def denoising_loss(
    model: nn.Module,
    backbone: Backbone,
    batch: Batch,
    config: FitConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The mean loss of a batch.

    The model predicts what its family's process says, from noisy latents, sigma, text and guidance. The squared error
    is weighted by sigma (`loss_weighting`) and by the mask, whose mean is divided out.

    Args:
        model: diffusers' transformer.
        backbone: its family.
        batch: on the CPU.
        device, dtype: what the model computes on and in; the loss is float32.

    Returns:
        A scalar with a gradient.
    """
    latents, noise = batch.latents.to(device), batch.noise.to(device)
    tokens = backbone.tokens(*latents.shape[2:])
    factor = {"none": 1.0, "constant": config.shift_value, "resolution": backbone.shift(tokens)}[config.shift]
    sigmas = shifted(batch.sigmas, factor).to(device)
    mixed = backbone.process.mixed(latents, noise, sigmas)
    predicted = prediction(model, backbone, mixed, sigmas, batch.text, config.guidance, device, dtype)
    weights = loss_weights(config.loss_weighting, sigmas)[:, None, None, None]
    if batch.mask is not None:
        mask = batch.mask.to(device)[:, None]
        weights = weights * mask / mask.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    return weighted_mse(predicted, backbone.process.target(latents, noise, sigmas), weights)


def weighted_mse(predicted: Tensor, target: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Mean of `weights * (predicted - target)^2` over everything, in float32."""
    return (weights * (predicted.float() - target.float()).square()).mean()


def loss_weights(weighting: LossWeighting, sigmas: Tensor) -> Tensor:
    """(batch,) weights over sigmas (batch,): 1, sigma^-2, or Esser et al.'s cosine map."""
    if weighting == "sigma_sqrt":
        return sigmas**-2.0
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return torch.ones_like(sigmas)


def prediction(
    model: nn.Module,
    backbone: Backbone,
    latents: Tensor,
    sigmas: Tensor,
    text: EncodedText,
    guidance: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The model's prediction for latents (batch, channels, height, width) at sigmas (batch,), float32, same shape.

    Args:
        text: with a batch dimension.
    """
    moved = text.map(lambda tensor: tensor.to(device, dtype))
    given = backbone.inputs(model, latents.to(device, dtype), sigmas.to(device, torch.float32), moved, guidance)
    # Early stop would end a recomputed block inside its last layer, before the hooks that put its weight away again
    with set_checkpoint_early_stop(False):
        output: Any = model(**given, return_dict=False)
    return backbone.prediction(output, latents.shape).float()


def shifted(sigmas: Tensor, factor: float) -> Tensor:
    """Sigmas (0 to 1) moved towards noise: `s sigma / (1 + (s - 1) sigma)`."""
    return sigmas if factor == 1.0 else factor * sigmas / (1 + (factor - 1) * sigmas)


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    backbone: Backbone,
    noise: Tensor,
    text: EncodedText,
    steps: int,
    guidance: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """From noise (batch, channels, height, width) to latents, with the family's schedule and steps; float32, CPU."""
    tokens = backbone.tokens(*noise.shape[2:])
    sigmas = shifted(torch.linspace(1.0, 0.0, steps + 1), backbone.shift(tokens))
    latents = noise.to(device, torch.float32)
    for sigma, following in itertools.pairwise(sigmas):
        each, then = (level.to(device).expand(len(latents)) for level in (sigma, following))
        predicted = prediction(model, backbone, latents, each, text, guidance, device, dtype)
        latents = backbone.process.step(latents, predicted, each, then)
    return latents.cpu()
