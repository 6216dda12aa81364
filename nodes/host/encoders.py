"""Encoding with the graph's own CLIP and VAE, and telling one encoder from another."""

import hashlib
import logging
from typing import Any

import comfy.latent_formats
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ...qrlora_core import EncodedText, QRLoRAError
from .protocols import Clip, Encoder, Vae

log = logging.getLogger(__name__)

CHANNELS = 16  # of FLUX's latents
_PREVIEW_SIZE = 512
_SAMPLED = 1024  # values of each weight that tell one encoder from another

# FLUX takes CLIP's pooled output unprojected. Where a file lacks these the host leaves them as the memory happens to
# be, so that one file would look like another at each loading.
_UNUSED = ("text_projection.weight", "logit_scale")


class EncodeError(QRLoRAError):
    """The graph's CLIP or VAE does not give what FLUX takes."""


def encode_text(clip: Clip, text: str) -> EncodedText:
    """The conditioning of a prompt, just as the CLIP Text Encode node makes it: (tokens, width) and (width,).

    Raises:
        EncodeError: more than one conditioning (hooks), or no pooled output.
    """
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if len(conditioning) != 1:
        raise EncodeError(
            f"this CLIP gives {len(conditioning)} conditionings for one prompt (hooks); connect it plainly"
        )
    embeds, details = conditioning[0]
    pooled = details.get("pooled_output")
    if pooled is None or embeds.dim() != 3:
        raise EncodeError(
            "this CLIP gives no pooled output; for FLUX use DualCLIPLoader with type flux (CLIP-L and T5)"
        )
    return EncodedText(embeds[0].detach().cpu().clone(), pooled.detach().reshape(-1).cpu().clone())


def encode_picture(vae: Vae, pixels: Tensor) -> Tensor:
    """A picture in the transformer's own latent space, just as VAE Encode and the sampler would put it there.

    Args:
        vae: the graph's.
        pixels: (height, width, 3), 0 to 1.

    Returns:
        (16, height / 8, width / 8).

    Raises:
        EncodeError: the VAE is not FLUX's.
    """
    latent = vae.encode(pixels[None])
    if latent.dim() != 4 or latent.shape[1] != CHANNELS:
        raise EncodeError(
            f"this VAE gives latents of shape {tuple(latent.shape)}, FLUX takes {CHANNELS} channels; load FLUX's VAE "
            "(ae.safetensors)"
        )
    in_model_space: Tensor = comfy.latent_formats.Flux().process_in(latent)
    return in_model_space[0].detach().float().cpu().clone()


def decode_latent(vae: Vae, latent: Tensor) -> Tensor:
    """(n, 16, h, w) in model space as pictures, (n, height, width, 3), 0 to 1."""
    pixels: Tensor = vae.decode(comfy.latent_formats.Flux().process_out(latent.float()))
    return pixels.detach().float().cpu()


def resized(pixels: Tensor, width: int, height: int) -> Tensor:
    """(h, w, channels) cropped from the middle to the aspect and resized, just as the Upscale Image node does it."""
    if pixels.shape[:2] == (height, width):
        return pixels
    moved = pixels.movedim(-1, 0)[None]
    color = comfy.utils.common_upscale(moved[:, :3], width, height, "lanczos", "center")
    if moved.shape[1] > 3:
        alpha = comfy.utils.common_upscale(moved[:, 3:4], width, height, "bilinear", "center")
        color = torch.cat([color.to(alpha), alpha], dim=1)
    resized_picture: Tensor = color[0].movedim(0, -1).clamp(0, 1)
    return resized_picture


def preview(latent: Tensor) -> Image.Image:
    """The first of (n, 16, h, w) latents as a small picture, by ComfyUI's own colour factors; no VAE, no VRAM."""
    flux = comfy.latent_formats.Flux()
    factors = torch.tensor(flux.latent_rgb_factors)
    bias = torch.tensor(getattr(flux, "latent_rgb_factors_bias", None) or [0.0, 0.0, 0.0])
    colors = latent[0].float().movedim(0, -1) @ factors + bias
    pixels = ((colors + 1) / 2).nan_to_num().clamp(0, 1).mul(255).to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    factor = _PREVIEW_SIZE / max(picture.size)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def weights_identity(holder: Encoder) -> str:
    """Sixteen hex digits that tell one CLIP or VAE from another, LoRAs on it and its layer setting included.

    Raises:
        EncodeError: a weight is not in memory, so that nothing can be said about it.
    """
    patcher = holder.patcher
    digest = hashlib.sha256(str(getattr(holder, "layer_idx", None)).encode())
    digest.update(repr(sorted(getattr(holder, "tokenizer_options", {}).items())).encode())
    for key, weight in sorted(_weights(patcher.model).items()):
        if key.endswith(_UNUSED):
            continue
        backup = patcher.backup.get(key)  # while it is loaded, a patched weight's own values lie here
        _add(digest, key, backup.weight if backup is not None else weight)
    for key, queue in sorted(patcher.patches.items(), key=lambda item: str(item[0])):
        _add(digest, str(key), queue)
    return digest.hexdigest()[:16]


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict, with the parameters themselves where it holds only their shapes.

    Packed formats (GGUF) keep their bytes out of the state dict and put a placeholder on the device "meta" there, some
    of them for tensors that do not exist.
    """
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights: dict[str, Tensor] = {}
    for key, weight in model.state_dict().items():
        if not weight.is_meta:
            weights[key] = weight
        elif key in held:
            weights[key] = held[key]
    for key, weight in weights.items():
        if weight.is_meta:
            raise EncodeError(
                f"the weight {key} of this CLIP or VAE is not in memory; load it with another loader node"
            )
    return weights


def _add(digest: Any, key: str, value: Any) -> None:
    """Into a digest: names, numbers, and the first values of every tensor in nested lists."""
    digest.update(key.encode())
    if isinstance(value, Tensor):
        plain = getattr(value, "_qdata", value).detach().as_subclass(Tensor)  # packed formats have shapes of their own
        digest.update(f"{plain.dtype}{tuple(value.shape)}".encode())
        head = plain.reshape(-1)[:_SAMPLED].cpu().contiguous()
        digest.update(head.view(torch.uint8).numpy().tobytes() if head.numel() else b"")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _add(digest, str(index), item)
    elif hasattr(value, "weights"):  # a weight adapter
        _add(digest, type(value).__name__, value.weights)
    else:
        digest.update(str(value).encode() if not callable(value) else b"")
