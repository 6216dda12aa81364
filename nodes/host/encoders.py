"""Encoding with the graph's own CLIP and VAE, and telling one encoder from another."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ...qrlora_core import EncodedText, ModelInputs, QRLoRAError
from .base_format import BaseFormat
from .protocols import Clip, Encoder, Vae
from .steps import PROMPT

log = logging.getLogger(__name__)

_PREVIEW_SIZE = 512
_SAMPLED = 1024  # values of each weight that tell one encoder from another

# Some models take CLIP's pooled output unprojected. Where a file lacks these the host leaves them as the memory happens
# to be, so that one file would look like another at each loading.
_UNUSED = ("text_projection.weight", "logit_scale")


class EncodeError(QRLoRAError):
    """The graph's CLIP or VAE does not give what the model takes."""


def conditioning_of(clip: Clip, text: str) -> list[Any]:
    """What CLIP Text Encode makes of a text, with the text as a mark: a merge that acts by the prompt reads it."""
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return [[embeds, {**details, PROMPT: text}] for embeds, details in conditioning]


def encode_text(clip: Clip, text: str, base: BaseFormat, taken: ModelInputs) -> EncodedText:
    """What the model sees of a prompt when it samples: (tokens, width), and (width,) where it takes a pooled output.

    Raises:
        EncodeError: more than one conditioning (hooks), or not what the model takes.
    """
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if len(conditioning) != 1:
        raise EncodeError(
            f"this CLIP gives {len(conditioning)} conditionings for one prompt (hooks); connect it plainly"
        )
    seen = base.text(conditioning[0])
    given = {name: part for name, part in seen._asdict().items() if part is not None}
    if {name: given[name].shape[-1] for name in taken.text if name in given} != dict(taken.text):
        raise EncodeError(
            f"the texts have widths {_widths(given)}; {taken.family} takes {_widths(taken.text)}. Load the text "
            "encoders of this very model, with its type in their loader (CLIPLoader, DualCLIPLoader)"
        )
    return EncodedText(seen.embeds, seen.pooled if "pooled" in taken.text else None)


def _widths(parts: Mapping[str, Any]) -> str:
    widths = {name: part.shape[-1] if isinstance(part, Tensor) else part for name, part in parts.items()}
    return " and ".join(f"{width} ({name})" for name, width in widths.items())


def encode_picture(vae: Vae, pixels: Tensor, base: BaseFormat, taken: ModelInputs) -> Tensor:
    """A picture in the transformer's own latent space, just as VAE Encode and the sampler would put it there.

    Args:
        vae: the graph's.
        pixels: (height, width, 3), 0 to 1.
        base, taken: of the model that is trained on.

    Returns:
        (channels, height, width) of latent pixels.

    Raises:
        EncodeError: the VAE is of another model.
    """
    latent = vae.encode(pixels[None])
    frames = (1,) if base.has_frames else ()
    if latent.shape[:-2] != (1, taken.channels, *frames):
        frames_text = " and a dimension for frames" if base.has_frames else ""
        raise EncodeError(
            f"this VAE gives latents of shape {tuple(latent.shape)}; {taken.family} takes {taken.channels} channels"
            f"{frames_text or ' without frames'}. Load the VAE of this very model"
        )
    return base.into_model(latent)[0].detach().float().cpu().clone()


def decode_latent(vae: Vae, latent: Tensor, base: BaseFormat) -> Tensor:
    """(n, channels, h, w) in model space as pictures, (n, height, width, 3), 0 to 1."""
    pixels = vae.decode(base.out_of_model(latent.float())).detach().float().cpu()
    return pixels.reshape(-1, *pixels.shape[-3:])  # those of a VAE for videos have a dimension for frames


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


def preview(latent: Tensor, base: BaseFormat | None) -> Image.Image:
    """The first of (n, channels, h, w) latents as a small picture, by ComfyUI's own colour factors; no VAE, no VRAM.

    Without factors it is grey: the mean of the channels.
    """
    colors = base.colors(latent) if base is not None else None
    if colors is None:
        colors = latent[0].float().mean(dim=0)[..., None].expand(-1, -1, 3)
    pixels = ((colors + 1) / 2).nan_to_num().clamp(0, 1).mul(255).to(torch.uint8)
    picture = Image.fromarray(pixels.contiguous().numpy())
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
