"""The toy FLUX of the demo as the objects that ComfyUI's own nodes, Apply and Train take like any others."""

from typing import Any

import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...demo.toy.features import CHANNELS, SIZE, text_features, to_latents, to_pictures
from ...demo.toy.files import BASE, CONTENT, STYLE
from ...qrlora_core import Adapter, QRLoRAError, SettingError, open_adapter
from .base_format import base_format

ADAPTERS = {"style": STYLE, "content": CONTENT}
ENLARGED = 4  # times; with pixel unshuffle by 2, latents are an eighth of a picture, as those of FLUX are


class ToyCLIP:
    """Prompts -> fixed random vectors for words, see `features`."""

    def __init__(self) -> None:
        self.patcher = _nothing_to_load()

    def tokenize(self, text: str, **_: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_: Any) -> list[Any]:
        try:
            features, pooled = text_features(tokens)
        except ValueError as error:
            raise SettingError(f"{error!s:.300}") from error
        return [[features, {"pooled_output": pooled}]]


class ToyVAE:
    """Pictures of 128 x 128 pixels (each of the toy's 32 x 32 four times as large) <-> latents by pixel unshuffle."""

    latent_channels = CHANNELS

    def __init__(self) -> None:
        self.patcher = _nothing_to_load()
        self.format = base_format(BASE)

    def spacial_compression_encode(self) -> int:
        return 2 * ENLARGED

    def spacial_compression_decode(self) -> int:
        return 2 * ENLARGED

    def encode(self, pixels: Tensor) -> Tensor:
        """(batch, height, width, 3), 0 to 1, of any size -> (batch, 16, 16, 16)."""
        pictures = functional.interpolate(pixels[..., :3].movedim(-1, 1).float().cpu(), size=(SIZE, SIZE), mode="area")
        latents: Tensor = self.format.out_of_model(to_latents(pictures))
        return latents

    def decode(self, samples: Tensor) -> Tensor:
        """(batch, 16, 16, 16) -> (batch, 128, 128, 3), 0 to 1."""
        pictures = to_pictures(self.format.into_model(samples.float().cpu()))
        return functional.interpolate(pictures, scale_factor=ENLARGED).movedim(1, -1)


def load_model() -> Any:
    """The toy as ComfyUI's loader makes it of any FLUX file.

    Raises:
        QRLoRAError: a ComfyUI that takes every FLUX for one of 12 billion weights.
    """
    try:
        return comfy.sd.load_diffusion_model(str(BASE))
    except RuntimeError as error:  # tensors of other sizes than it has made room for
        raise QRLoRAError("the toy FLUX needs a newer ComfyUI, which reads the size of a FLUX from its file") from error


def load_adapter(name: str) -> Adapter:
    """The adapter that the demo trained on one picture: "style" or "content"."""
    return open_adapter(ADAPTERS[name])


def _nothing_to_load() -> comfy.model_patcher.ModelPatcher:
    """A patcher without weights: hosts and nodes ask CLIP and VAE for one."""
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(nn.Module(), load_device=cpu, offload_device=cpu)
