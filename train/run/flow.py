"""Flow matching on FLUX: what the model sees, what it should predict, the loss (Liu et al., arXiv 2209.03003;
Esser et al., arXiv 2403.03206, section 3)."""

import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from ..config import FitConfig, Shift
from ..data.batches import Batch


def flow_loss(model: nn.Module, batch: Batch, config: FitConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The mean loss of a batch.

    `x = (1 - sigma) latents + sigma noise`; the model predicts the velocity `noise - latents` from x, sigma, text and
    guidance. The squared error is weighted by sigma (`loss_weighting`) and by the mask, whose mean is divided out.

    Args:
        model: FluxTransformer2DModel.
        batch: on the CPU.
        device, dtype: what the model computes on and in; the loss is float32.

    Returns:
        A scalar with a gradient.
    """
    latents, noise = batch.latents.to(device), batch.noise.to(device)
    tokens = latents.shape[2] * latents.shape[3] // 4
    sigmas = shifted(batch.sigmas, config.shift, config.shift_value, tokens).to(device)
    mixed = torch.lerp(latents, noise, sigmas[:, None, None, None])
    predicted = velocity(model, mixed, sigmas, batch.embeds, batch.pooled, config.guidance, device, dtype)
    weights = compute_loss_weighting_for_sd3(config.loss_weighting, sigmas)[:, None, None, None]
    if batch.mask is not None:
        mask = batch.mask.to(device)[:, None]
        weights = weights * mask / mask.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    return weighted_mse(predicted, noise - latents, weights)


def weighted_mse(predicted: Tensor, target: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Mean of `weights * (predicted - target)^2` over everything, in float32."""
    return (weights * (predicted.float() - target.float()).square()).mean()


def velocity(
    model: nn.Module,
    latents: Tensor,
    sigmas: Tensor,
    embeds: Tensor,
    pooled: Tensor,
    guidance: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The model's prediction for latents (batch, channels, height, width) at sigmas (batch,), float32, same shape."""
    inputs = model_inputs(latents, sigmas, embeds, pooled, guidance, device, dtype)
    config: Any = model.config
    if not config.guidance_embeds:  # schnell and fine-tunes of it
        inputs["guidance"] = None
    # Early stop would end a recomputed block inside its last layer, before the hooks that put its weight away again
    with set_checkpoint_early_stop(False):
        packed = model(**inputs, return_dict=False)[0]
    height, width = latents.shape[2:]
    unpacked: Tensor = FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)
    return unpacked.float()


def model_inputs(
    latents: Tensor,
    sigmas: Tensor,
    embeds: Tensor,
    pooled: Tensor,
    guidance: float,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """FluxTransformer2DModel's arguments: latents packed in 2x2 patches, positions, sigma as time."""
    batch, channels, height, width = latents.shape
    return {
        "hidden_states": FluxPipeline._pack_latents(latents, batch, channels, height, width).to(device, dtype),
        "img_ids": FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, torch.float32),
        "encoder_hidden_states": embeds.to(device, dtype),
        "txt_ids": torch.zeros(embeds.shape[1], 3, device=device),
        "pooled_projections": pooled.to(device, dtype),
        "timestep": sigmas.to(device, torch.float32),
        "guidance": torch.full((batch,), guidance, device=device),
    }


def shifted(sigmas: Tensor, shift: Shift, value: float, tokens: int) -> Tensor:
    """Sigmas moved towards noise: `s sigma / (1 + (s - 1) sigma)`.

    Args:
        sigmas: (batch,), 0 to 1.
        shift: "none", "constant" (s = value), or "resolution": s = exp(mu), FLUX's own mu, linear in `tokens`.
        tokens: picture tokens, height * width / 4 of the latents.
    """
    if shift == "none":
        return sigmas
    factor = value if shift == "constant" else math.exp(calculate_shift(tokens))
    return factor * sigmas / (1 + (factor - 1) * sigmas)


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    noise: Tensor,
    embeds: Tensor,
    pooled: Tensor,
    steps: int,
    guidance: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Euler steps from noise (batch, channels, height, width) to latents, with FLUX's own schedule; float32, CPU."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tokens = noise.shape[2] * noise.shape[3] // 4
    sigmas = [1 - i / steps for i in range(steps)]
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens), device=device)
    latents = noise.to(device, torch.float32)
    for time, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        each = sigma.to(device, torch.float32).expand(len(latents))
        predicted = velocity(model, latents, each, embeds, pooled, guidance, device, dtype)
        latents = scheduler.step(predicted, time, latents, return_dict=False)[0]
    return latents.cpu()
