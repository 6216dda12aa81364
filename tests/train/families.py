"""A small random model of every family that can be trained on, as diffusers makes it and as ComfyUI stores it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from qrlora_core import CacheItem, EncodedPicture, EncodedText, save_cache

TEXT_WIDTH = 64


@dataclass(frozen=True)
class Small:
    """How to make one.

    Attributes:
        model_class, arguments: of diffusers.
        to_comfy: diffusers' state -> ComfyUI's; None where the names are the same.
        host: ComfyUI's supported_models class, and the unet_config it would detect.
        frames: whether ComfyUI's model takes a dimension for frames.
        layers: how many linear layers are adapted.
    """

    model_class: str
    arguments: dict[str, Any]
    host: tuple[str, dict[str, Any]]
    layers: int
    frames: bool = False
    to_comfy: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = field(default=dict)

    def model(self) -> Any:
        """Random weights, norms near 1, the last layer not zero."""
        generator = torch.Generator().manual_seed(0)
        model = getattr(diffusers, self.model_class)(**self.arguments)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
                    parameter.copy_(1 + 0.1 * noise)
                else:
                    parameter.copy_(noise * (0.02 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))
        return model.eval()


def z_image_to_comfy(state):
    moved, fused = {}, {}
    for name, value in state.items():
        name = name.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        name = name.replace("attention.norm_q", "attention.q_norm").replace("attention.norm_k", "attention.k_norm")
        name = name.replace("attention.to_out.0", "attention.out")
        head, found, tail = name.partition(".attention.to_")
        if found:
            fused.setdefault(f"{head}.attention.qkv{tail[1:]}", {})[tail[0]] = value
        else:
            moved[name] = value
    return moved | {key: torch.cat([parts[letter] for letter in "qkv"]) for key, parts in fused.items()}


FAMILIES = {
    "qwen_image": Small(
        "QwenImageTransformer2DModel",
        {"num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": TEXT_WIDTH},
        ("QwenImage", {"image_model": "qwen_image", "num_layers": 2, "num_attention_heads": 1,
                       "joint_attention_dim": TEXT_WIDTH, "in_channels": 64}),
        24,
        frames=True,
    ),
    "z_image": Small(
        "ZImageTransformer2DModel",
        {"dim": 128, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": TEXT_WIDTH,
         "axes_lens": [1536, 512, 512]},
        ("ZImage", {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 128,
                    "cap_feat_dim": TEXT_WIDTH, "n_layers": 2, "n_refiner_layers": 1, "qk_norm": True, "n_heads": 1,
                    "n_kv_heads": 1, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
                    "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
                    "pad_tokens_multiple": 32}),
        14,
        to_comfy=z_image_to_comfy,
    ),
}  # fmt: skip


def save_single_file(small: Small, path: Path, prefix: str = "") -> Path:
    """The model as ComfyUI stores it."""
    state = {key: value.detach() for key, value in small.model().state_dict().items()}
    save_file({f"{prefix}{key}": value.contiguous() for key, value in small.to_comfy(state).items()}, path)
    return path


def save_data(path: Path) -> Path:
    """Two pictures of other sizes and two captions of other lengths, and the empty one."""
    generator = torch.Generator().manual_seed(1)
    pictures = [EncodedPicture(torch.randn(16, *size, generator=generator)) for size in ((4, 4), (6, 4))]
    texts = [EncodedText(torch.randn(n, TEXT_WIDTH, generator=generator), None) for n in (3, 5, 7)]
    return save_cache(
        path, [CacheItem(f"{i}.png", i + 1, f"caption {i}") for i in range(2)], pictures, texts, empty_text=0
    )
