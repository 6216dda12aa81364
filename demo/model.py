"""The toy FLUX: its sizes, its place on disk, and how pictures are sampled from it."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qrlora_core import Adapter
from train.imports import quiet_imports

from .toy.features import CHANNELS, SIZE, TEXT_WIDTH, text_features, to_pictures

WEIGHTS = Path(__file__).parent / "toy_flux.safetensors"
STEPS = 20  # Euler steps of a sample; ComfyUI's scheduler `simple` has the same steps, as 20 divides 1000
TOKENS = SIZE // 4  # image tokens in each direction: pixel unshuffle by 2, then FLUX's patches of 2 x 2
CONFIG = {
    "patch_size": 1,
    "in_channels": CHANNELS * 4,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 1,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}


def new_model(**changes: int) -> nn.Module:
    """An untrained toy, fp32. Modulations and the last layer start at zero, as in DiT (arXiv 2212.09748)."""
    with quiet_imports():
        from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**{**CONFIG, **changes})
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (".norm" in f".{name}" or name == "proj_out"):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def load_toy(path: Path = WEIGHTS) -> nn.Module:
    """A toy from ComfyUI's single file, fp32, frozen."""
    with quiet_imports():
        from train.model.source import BaseModel
        from train.model.transformer import load_transformer

    return load_transformer(BaseModel(path), storage="fp32", precision="fp32").eval()


def patched(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of `model` with an adapter's update in its weights."""
    result = copy.deepcopy(model)
    for name in adapter.layers:
        up, down, alpha = adapter.update(name)
        weight = result.get_parameter(f"{name}.weight")
        weight.data.addmm_(up.float(), down.float(), alpha=alpha / up.shape[1])
    return result


def pack(latents: Tensor) -> Tensor:
    """Latents (batch, 16, 16, 16) as FLUX's tokens, (batch, 64, 64)."""
    batch = latents.shape[0]
    patches = latents.view(batch, CHANNELS, TOKENS, 2, TOKENS, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, TOKENS * TOKENS, CHANNELS * 4)


def unpack(tokens: Tensor) -> Tensor:
    """The inverse of `pack`."""
    batch = tokens.shape[0]
    patches = tokens.view(batch, TOKENS, TOKENS, CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, CHANNELS, TOKENS * 2, TOKENS * 2)


def velocity(model: nn.Module, tokens: Tensor, sigma: Tensor, features: Tensor, pooled: Tensor) -> Tensor:
    """The model's prediction of `noise - latents`, (batch, 64, 64), for noisy tokens at `sigma` (batch,), 0 to 1."""
    places = torch.arange(TOKENS, device=tokens.device, dtype=torch.float32)
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    return model(
        hidden_states=tokens,
        encoder_hidden_states=features,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1),
        txt_ids=torch.zeros(features.shape[1], 3, device=tokens.device),
        return_dict=False,
    )[0]


@torch.no_grad()
def sample(model: nn.Module, prompts: Sequence[str], seeds: Sequence[int], steps: int = STEPS) -> Tensor:
    """One picture for each prompt and seed, (len(prompts), 3, 32, 32), 0 to 1, by Euler steps of equal length."""
    device = next(model.parameters()).device
    noise = [torch.randn(CHANNELS, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(s)) for s in seeds]
    features, pooled = (torch.cat(parts).to(device) for parts in zip(*(text_features(prompt) for prompt in prompts)))
    tokens = pack(torch.stack(noise)).to(device)
    for step in range(steps):
        sigma = torch.full((len(prompts),), 1 - step / steps, device=device)
        tokens = tokens - velocity(model, tokens, sigma, features, pooled) / steps
    return to_pictures(unpack(tokens).cpu())
