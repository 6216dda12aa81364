"""The toy's CLIP and VAE, as objects that ComfyUI's own nodes and Train take like any other."""

from typing import Any

import comfy.latent_formats
import comfy.model_patcher
import torch
from comfy_api.latest import ComfyExtension, io
from torch import Tensor, nn
from torch.nn import functional

from .features import SIZE, text_features, to_latents, to_pictures

ENLARGED = 4  # times; with pixel unshuffle by 2, latents are an eighth of a picture, as those of FLUX are


class ToyCLIP:
    """Prompts -> fixed random vectors for words, see `features`."""

    def __init__(self) -> None:
        self.patcher = _nothing_to_load()

    def tokenize(self, text: str, **_: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_: Any) -> list[Any]:
        features, pooled = text_features(tokens)
        return [[features, {"pooled_output": pooled}]]


class ToyVAE:
    """Pictures of 128 x 128 pixels (each of the toy's 32 x 32 four times as large) <-> latents by pixel unshuffle."""

    latent_channels = 16

    def __init__(self) -> None:
        self.patcher = _nothing_to_load()
        self.format = comfy.latent_formats.Flux()

    def spacial_compression_encode(self) -> int:
        return 2 * ENLARGED

    def spacial_compression_decode(self) -> int:
        return 2 * ENLARGED

    def encode(self, pixels: Tensor) -> Tensor:
        """(batch, height, width, 3), 0 to 1, of any size -> (batch, 16, 16, 16)."""
        pictures = functional.interpolate(pixels[..., :3].movedim(-1, 1).float().cpu(), size=(SIZE, SIZE), mode="area")
        return self.format.process_out(to_latents(pictures))

    def decode(self, samples: Tensor) -> Tensor:
        """(batch, 16, 16, 16) -> (batch, 128, 128, 3), 0 to 1."""
        pictures = to_pictures(self.format.process_in(samples.float().cpu()))
        return functional.interpolate(pictures, scale_factor=ENLARGED).movedim(1, -1)


def _nothing_to_load() -> comfy.model_patcher.ModelPatcher:
    """A patcher without weights: hosts and nodes ask CLIP and VAE for one."""
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(nn.Module(), load_device=cpu, offload_device=cpu)


class TextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QRLoRAToyTextEncoder",
            display_name="Toy FLUX Text Encoder",
            category="QR-LoRA/toy",
            description="Knows every word as a fixed random vector. Say: a circle in red striped style.",
            inputs=[],
            outputs=[io.Clip.Output(tooltip="For CLIP Text Encode and Train \u0394R.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(ToyCLIP())


class VAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QRLoRAToyVAE",
            display_name="Toy FLUX VAE",
            category="QR-LoRA/toy",
            description="Turns latents of the toy FLUX into pictures of 128 x 128 pixels and back, without a network.",
            inputs=[],
            outputs=[io.Vae.Output(tooltip="For VAE Decode, VAE Encode and Train \u0394R.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(ToyVAE())


class ToyExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TextEncoder, VAE]
