"""Qwen-Image and fine-tunes of it. ComfyUI's files have diffusers' names."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from qrlora_core import EncodedText

from ...errors import TrainError
from .backbone import Backbone, ModelFacts, Specs, count_blocks, packed, unpacked
from .pipeline import Draw, Pipeline

_ADVICE = "Use Qwen-Image or a fine-tune of it"
_LAYERS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)


def facts(specs: Specs, title: str) -> ModelFacts:
    """See `Backbone.facts`.

    Raises:
        TrainError: reason "model": a tensor is missing, or it is the layered variant.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in specs:
            raise TrainError("model", f"{title} is not a Qwen-Image transformer: it has no {name}. {_ADVICE}")
        return specs[name].shape

    if "time_text_embed.addition_t_embedding.weight" in specs:
        raise TrainError("model", f"{title} is Qwen-Image-Layered, which takes several pictures at once. {_ADVICE}")
    hidden, channels = shape("img_in.weight")
    head = shape("transformer_blocks.0.attn.norm_q.weight")[0]
    text = shape("txt_in.weight")[1]
    arguments = {
        "patch_size": 2,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0] // 4,
        "num_layers": count_blocks(specs, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": text,
        "axes_dims_rope": [16, 56, 56],
    }
    return ModelFacts(arguments, hidden, channels // 4, (text,))


def inputs(model: Any, latents: Tensor, sigmas: Tensor, text: EncodedText, guidance: float) -> dict[str, Any]:
    """Latents packed in 2x2 patches, their shape, sigma as time; rows of zeros are no text."""
    batch, _, height, width = latents.shape
    mask = text.embeds.any(dim=-1)
    given: dict[str, Any] = {
        "hidden_states": packed(latents),
        "encoder_hidden_states": text.embeds,
        "encoder_hidden_states_mask": None if bool(mask.all()) else mask,
        "timestep": sigmas,
        "img_shapes": [[(1, height // 2, width // 2)]] * batch,
    }
    if "txt_seq_lens" in inspect.signature(type(model).forward).parameters:  # diffusers 0.35 and 0.36
        given |= {"txt_seq_lens": [text.embeds.shape[1]] * batch, "encoder_hidden_states_mask": mask}
    return given


def shift(tokens: int) -> float:
    """exp(mu), mu linear from 0.5 at 256 tokens to 0.9 at 8192."""
    return math.exp(0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256))


def encode_text(pipeline: Any, text: str, max_tokens: int, device: torch.device) -> EncodedText:
    """The text encoder's last layer without the template before the caption; what is masked becomes zeros."""
    embeds, mask = pipeline.encode_prompt(text, device=device, max_sequence_length=max_tokens)
    return EncodedText(embeds[0] if mask is None else embeds[0] * mask[0, :, None].to(embeds), None)


def encode_picture(vae: Any, pixels: Tensor, draw: Draw) -> Tensor:
    """The VAE is one for videos, and a picture a video of one frame."""
    drawn = draw(vae.encode(pixels.unsqueeze(2)).latent_dist).float().squeeze(2)
    mean, std = (
        torch.tensor(values, device=drawn.device).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (drawn - mean) / std


PIPELINE = Pipeline(
    classes={"QwenImagePipeline": "QwenImagePipeline"},
    vae_class="AutoencoderKLQwenImage",
    encoders={"tokenizer": "text_encoder"},
    encode_text=encode_text,
    encode_picture=encode_picture,
    # guided by the difference from an empty prompt, which its own examples write as a space
    guidance=lambda guidance: (
        {"true_cfg_scale": guidance, "negative_prompt": " "} if guidance > 1 else {"true_cfg_scale": 1.0}
    ),
)

QWEN_IMAGE = Backbone(
    family="qwen_image",
    title="Qwen-Image",
    advice=_ADVICE,
    model_class="QwenImageTransformer2DModel",
    since="0.35",
    file_mark="",
    folder_mark="transformer_blocks.0.img_mlp.net.0.proj.weight",
    block_lists=("transformer_blocks",),
    activation_counts={"transformer_blocks": 18.0},
    default_layers={"transformer_blocks": _LAYERS},
    stored_rows=lambda key, rows: [],
    facts=facts,
    stated=("axes_dims_rope",),
    inputs=inputs,
    prediction=lambda output, size: unpacked(output[0], size),
    shift=shift,
    pipeline=PIPELINE,
)
