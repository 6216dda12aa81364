"""What a base model takes of pictures and texts, as the host itself says: the host's own model without its weights."""

import functools
import logging
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_detection
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...qrlora_core import EncodedText, QRLoRAError, TensorFile

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_SIZE_WIDTH = 256  # of each of the six numbers of a picture's size
_NOISE_SIDE = 8  # latent pixels; what the host makes of a text does not depend on it


class BaseModelError(QRLoRAError):
    """The host does not know the model in a file, or what it takes."""


class BaseFormat:
    """Latents and texts of one base model.

    Attributes:
        name: the host's names of the model and of its latents, one text.
        channels: of its latents, None where the host does not say.
        has_frames: whether its latents have a dimension for frames, as those of models made for videos have.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._latents = model, model.latent_format
        self.name = f"{type(model.model_config).__name__}/{type(self._latents).__name__}"
        # SDXL's pooled text is followed by the size of a picture, which the trainer says itself
        self._added = 6 * _SIZE_WIDTH if isinstance(model, comfy.model_base.SDXL) else 0
        self.channels: int | None = getattr(self._latents, "latent_channels", None)
        self.has_frames: bool = getattr(self._latents, "latent_dimensions", 2) == 3

    def into_model(self, latents: Tensor) -> Tensor:
        """A VAE's latents, (n, channels, [1,] height, width) -> (n, channels, height, width) in the model's space."""
        inside: Tensor = self._model.process_latent_in(latents)
        return inside.squeeze(2) if self.has_frames else inside

    def out_of_model(self, latents: Tensor) -> Tensor:
        """The opposite of `into_model`: what the VAE decodes."""
        outside: Tensor = self._model.process_latent_out(latents.unsqueeze(2) if self.has_frames else latents)
        return outside

    def text(self, conditioning: Any) -> EncodedText:
        """What the model sees of one conditioning when it samples; tokens that are masked become zeros.

        Args:
            conditioning: as CLIP Text Encode makes it, with a batch of one.

        Raises:
            BaseModelError: the host makes no tokens of it, or it lacks the pooled output that the model takes.
        """
        if self._added and conditioning[1].get("pooled_output") is None:
            raise BaseModelError(
                "these text encoders give no pooled output, which this model takes. Load the text encoders of this "
                "very model, with its type in their loader"
            )
        noise = torch.zeros(1, self.channels or 1, *([1] if self.has_frames else []), _NOISE_SIDE, _NOISE_SIDE)
        conditions = comfy.sampler_helpers.convert_cond([conditioning])
        (seen,) = comfy.samplers.encode_model_conds(self._model.extra_conds, conditions, noise, _CPU, "positive")
        parts = {name: part.cond for name, part in seen["model_conds"].items() if isinstance(part.cond, Tensor)}
        embeds, mask, pooled = (parts.get(name) for name in ("c_crossattn", "attention_mask", "y"))
        if embeds is None or embeds.dim() != 3:
            raise BaseModelError(f"ComfyUI gives this model no tokens of a text, but {', '.join(parts) or 'nothing'}")
        if mask is not None and mask.shape[:2] == embeds.shape[:2]:
            embeds = embeds * (mask != 0)[..., None].to(embeds)
        if pooled is not None:
            pooled = pooled.reshape(-1)[: pooled.numel() - self._added]
        plain = EncodedText(embeds[0], pooled)
        return plain.map(lambda tensor: tensor.detach().cpu().clone())

    def colors(self, latents: Tensor) -> Tensor | None:
        """The first of (n, channels, h, w) latents as (h, w, 3), about -1 to 1; None where the host has no factors."""
        factors = getattr(self._latents, "latent_rgb_factors", None)
        bias = getattr(self._latents, "latent_rgb_factors_bias", None)
        rearranged = getattr(self._latents, "latent_rgb_factors_reshape", None)
        latent = (rearranged(latents[:1]) if rearranged is not None else latents[:1])[0].float().cpu()
        if factors is None or len(factors) != len(latent):
            return None
        return latent.movedim(0, -1) @ torch.tensor(factors) + torch.tensor(bias or [0.0, 0.0, 0.0])


def base_format(path: Path) -> BaseFormat:
    """That of the model in a file, by names and shapes of its weights.

    Raises:
        FileFormatError: the file cannot be read.
        BaseModelError: the host does not know the model.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise BaseModelError(f"{path.name} cannot be read: {error.strerror or error}") from error
    return _base_format(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _base_format(path: Path, size: int, time_ns: int) -> BaseFormat:
    """Remembered by the version of the file: a header of thousands of names is read for every picture otherwise."""
    file = TensorFile(path, skip_other=True)
    try:
        config, state = _detected(file)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        # names that look like those of a model, and shapes that none has
        raise BaseModelError(f"ComfyUI cannot tell what model {path.name} is ({error!r:.200})") from error
    if config is None:
        raise BaseModelError(f"ComfyUI does not know what model {path.name} is; a newer one may")
    config.unet_config["disable_unet_model_creation"] = True
    return BaseFormat(config.get_model(state, ""))


def _detected(file: TensorFile) -> tuple[Any, dict[str, Tensor]]:
    """The host's configuration of the model in a file, None when it knows none, and the tensors without their values.

    Found just as comfy.sd.load_diffusion_model_state_dict does it.
    """
    specs = {**file.specs, **file.other}
    state = {key: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for key, spec in specs.items()}
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    state = comfy.utils.state_dict_prefix_replace(dict(state), {prefix: ""}, filter_keys=True) or state
    config = comfy.model_detection.model_config_from_unet(state, "", metadata=file.metadata)
    if config is None and (converted := comfy.model_detection.convert_diffusers_mmdit(state, "")) is not None:
        state = converted
        config = comfy.model_detection.model_config_from_unet(state, "")
    return config, state
