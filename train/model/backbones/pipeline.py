"""What `encode` and `sample` have to know of a family's diffusers pipeline: which parts it has, how they are called.

Texts and latents are those that the family's transformer takes, as its own pipeline makes them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qrlora_core import EncodedText

# The mean of a distribution, or a draw from it
Draw = Callable[[Any], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """How one family's pipeline folders are used.

    Attributes:
        classes: what `model_index.json` may name -> diffusers' class that is loaded for it.
        vae_class: diffusers' class of the VAE.
        network: what the folder calls the model that draws.
        encoders: tokenizer -> text encoder, by the names of their folders.
        encode_text: (pipeline, text, number of tokens at most, device) -> what the transformer takes of it.
        encode_picture: (vae, pixels (1, 3, height, width) from -1 to 1, draw) -> latents in the transformer's own
            space, (1, channels, height, width) of latent pixels, float32.
        undrawable: of `classes`, those that `sample` cannot draw with -> why.
        guidance: guidance -> arguments of the pipeline's call.
    """

    classes: Mapping[str, str]
    vae_class: str
    encoders: Mapping[str, str]
    encode_text: Callable[[Any, str, int, torch.device], EncodedText]
    encode_picture: Callable[[Any, Tensor, Draw], Tensor]
    network: str = "transformer"
    undrawable: Mapping[str, str] = field(default_factory=dict)
    guidance: Callable[[float], dict[str, Any]] = lambda guidance: {"guidance_scale": guidance}


def shifted_and_scaled(vae: Any, pixels: Tensor, draw: Draw) -> Tensor:
    """Latents of an AutoencoderKL with one shift and one scale, see `Pipeline.encode_picture`."""
    drawn = draw(vae.encode(pixels).latent_dist).float()
    return (drawn - (vae.config.shift_factor or 0.0)) * float(vae.config.scaling_factor)
