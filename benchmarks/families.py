"""A model of every family that can be trained, of any width, with random weights, as diffusers' folder; its data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from qrlora_core import CacheItem, EncodedPicture, EncodedText, save_cache

TEXT = 1024  # width of the encoded texts
POOLED = 512


@dataclass(frozen=True)
class Model:
    """One family.

    Attributes:
        model_class: of diffusers.
        arguments: heads of 128 -> arguments of that class, with few blocks.
        channels: of its latents, `pixels` of a picture for each of theirs.
        tokens: of a text.
        pooled: whether it takes a pooled text.
        text: width of its text's tokens.
        network: what a diffusers folder calls it.
    """

    model_class: str
    arguments: Callable[[int], dict[str, Any]]
    channels: int = 16
    pixels: int = 8
    tokens: int = 128
    pooled: bool = False
    text: int = TEXT
    network: str = "transformer"

    def write(self, folder: Path, heads: int, dtype: torch.dtype = torch.float32) -> Path:
        """The model's folder; weights as diffusers draws them, but for those that it makes zero."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.model_class)(**self.arguments(heads))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and not parameter.any():
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
        model.to(dtype).save_pretrained(folder / self.network)
        return folder

    def write_data(self, path: Path, pixels: int) -> Path:
        """A cache of one picture and its caption."""
        torch.manual_seed(0)
        side = pixels // self.pixels
        text = EncodedText(torch.randn(self.tokens, self.text), torch.randn(POOLED) if self.pooled else None)
        picture = EncodedPicture(torch.randn(self.channels, side, side))
        return save_cache(path, [CacheItem("picture.png", 0, "a caption")], [picture], [text])


FAMILIES = {
    "flux": Model(
        "FluxTransformer2DModel",
        lambda heads: {
            "num_layers": 2, "num_single_layers": 4, "num_attention_heads": heads, "joint_attention_dim": TEXT,
            "pooled_projection_dim": POOLED, "guidance_embeds": True,
        },
        pooled=True,
    ),
    "flux2": Model(
        "Flux2Transformer2DModel",
        lambda heads: {
            "num_layers": 2, "num_single_layers": 4, "num_attention_heads": heads, "joint_attention_dim": TEXT,
            "guidance_embeds": False,
        },
        channels=128,
        pixels=16,
    ),
    "qwen_image": Model(
        "QwenImageTransformer2DModel",
        lambda heads: {"num_layers": 4, "num_attention_heads": heads, "joint_attention_dim": TEXT},
    ),
    "z_image": Model(
        "ZImageTransformer2DModel",
        lambda heads: {
            "dim": 128 * heads, "n_layers": 6, "n_refiner_layers": 1, "n_heads": heads, "n_kv_heads": heads,
            "cap_feat_dim": TEXT, "axes_lens": [1536, 512, 512],
        },
    ),
    "krea2": Model(
        "Krea2Transformer2DModel",
        lambda heads: {
            "num_layers": 4, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
            "intermediate_size": 341 * heads, "text_hidden_dim": TEXT // 2, "num_text_layers": 2,
            "text_num_attention_heads": 4, "text_num_key_value_heads": 4, "text_intermediate_size": TEXT,
        },
    ),
    "sd3": Model(
        "SD3Transformer2DModel",
        lambda heads: {
            "sample_size": 64, "num_layers": 6, "num_attention_heads": 2 * heads, "joint_attention_dim": TEXT,
            "caption_projection_dim": 128 * heads, "pooled_projection_dim": POOLED, "pos_embed_max_size": 64,
            "dual_attention_layers": (0, 1, 2), "qk_norm": "rms_norm",
        },
        pooled=True,
    ),
    "sdxl": Model(
        "UNet2DConditionModel",
        lambda heads: {
            "sample_size": 64, "block_out_channels": (16 * heads, 32 * heads, 64 * heads), "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": TEXT,
            "attention_head_dim": (heads // 4 or 1, heads // 2, heads), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": POOLED + 6 * 256,
        },
        channels=4,
        tokens=77,
        pooled=True,
        network="unet",
    ),
}  # fmt: skip
