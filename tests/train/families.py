"""A small random model of every family that can be trained on, as diffusers makes it and as ComfyUI stores it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from qrlora_core import CacheItem, EncodedPicture, EncodedText, save_cache
from train.model.backbones.flux2 import _IN_BLOCKS as IN_BLOCKS
from train.model.backbones.flux2 import _PLAIN as PLAIN

TEXT_WIDTH = 64


@dataclass(frozen=True)
class Small:
    """How to make one.

    Attributes:
        model_class, arguments: of diffusers.
        to_comfy: diffusers' state -> ComfyUI's; None where the names are the same.
        host: ComfyUI's supported_models class, and the unet_config it would detect.
        frames: whether ComfyUI's model takes a dimension for frames.
        host_size: what has to be larger for ComfyUI, which knows some sizes only: arguments of both.
        layers: how many linear layers are adapted.
        pooled: width of the pooled text, where it takes one.
    """

    model_class: str
    arguments: dict[str, Any]
    host: tuple[str, dict[str, Any]]
    layers: int
    frames: bool = False
    channels: int = 16
    pooled: int = 0
    host_size: dict[str, int] = field(default_factory=dict)
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


def sd3_to_comfy(state):
    """Written out, so that the trainer's own table is not compared with itself."""
    plain = {
        "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
    }  # fmt: skip
    inside = {
        "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
        "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj", "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
        "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    }  # fmt: skip
    fused = {
        **{f"attn.to_{letter}": ("x_block.attn.qkv", letter) for letter in "qkv"},
        **{f"attn2.to_{letter}": ("x_block.attn2.qkv", letter) for letter in "qkv"},
        **{f"attn.add_{letter}_proj": ("context_block.attn.qkv", letter) for letter in "qkv"},
    }
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    moved, parts = {"pos_embed": state["pos_embed.pos_embed"]}, {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        block, _, tail = module.partition(".")
        number, _, suffix = tail.partition(".")
        if module == "norm_out.linear" or (suffix == "norm1_context.linear" and int(number) == last):
            value = torch.cat(value.chunk(2)[::-1])
        if module in plain:
            moved[f"{plain[module]}.{kind}"] = value
        elif suffix in inside:
            moved[f"joint_blocks.{number}.{inside[suffix]}.{kind}"] = value
        elif suffix in fused:
            parts.setdefault(f"joint_blocks.{number}.{fused[suffix][0]}.{kind}", {})[fused[suffix][1]] = value
    return moved | {key: torch.cat([found[letter] for letter in "qkv"]) for key, found in parts.items()}


def flux2_to_comfy(state):
    names = {theirs: ours for ours, theirs in PLAIN.items()}
    moved, fused = {}, {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        block, _, tail = module.partition(".")
        number, _, suffix = tail.partition(".")
        if module in names:
            value = torch.cat(value.chunk(2)[::-1]) if module == "norm_out.linear" else value
            moved[f"{names[module]}.{kind}"] = value
            continue
        native = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}[block]
        for ours, layers in IN_BLOCKS.items():
            if suffix in layers and (native == "single_blocks") == (
                ours in ("linear1", "linear2") or ours[:5] == "norm."
            ):
                fused.setdefault(f"{native}.{number}.{ours}.{kind}", {})[layers.index(suffix)] = value
    return moved | {key: torch.cat([parts[i] for i in sorted(parts)]) for key, parts in fused.items()}


FAMILIES = {
    "flux2": Small(
        "Flux2Transformer2DModel",
        {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": TEXT_WIDTH,
         "guidance_embeds": False},
        ("Flux2", {"image_model": "flux2", "axes_dim": [32, 32, 32, 32], "num_heads": 1, "mlp_ratio": 3.0,
                   "theta": 2000, "out_channels": 128, "global_modulation": True, "mlp_silu_act": True,
                   "qkv_bias": False, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
                   "txt_ids_dims": [3], "patch_size": 1, "in_channels": 128, "hidden_size": 128,
                   "context_in_dim": TEXT_WIDTH, "vec_in_dim": None, "depth": 2, "depth_single_blocks": 2,
                   "guidance_embed": False}),
        28,
        channels=128,
        to_comfy=flux2_to_comfy,
    ),
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
        host_size={"dim": 1152, "n_heads": 9, "n_kv_heads": 9, "n_layers": 1},
        to_comfy=z_image_to_comfy,
    ),
    "sd3": Small(
        "SD3Transformer2DModel",
        {"sample_size": 16, "num_layers": 3, "num_attention_heads": 2, "joint_attention_dim": TEXT_WIDTH,
         "caption_projection_dim": 128, "pooled_projection_dim": 32, "pos_embed_max_size": 12,
         "dual_attention_layers": [0], "qk_norm": "rms_norm"},
        ("SD3", {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None,
                 "adm_in_channels": 32, "qk_norm": "rms", "pos_embed_scaling_factor": None, "pos_embed_max_size": 12,
                 "num_patches": 144, "x_block_self_attn_layers": [0],
                 "context_embedder_config": {"target": "torch.nn.Linear",
                                             "params": {"in_features": TEXT_WIDTH, "out_features": 128}}}),
        37,
        pooled=32,
        to_comfy=sd3_to_comfy,
    ),
}  # fmt: skip


def save_single_file(small: Small, path: Path, prefix: str = "") -> Path:
    """The model as ComfyUI stores it."""
    state = {key: value.detach() for key, value in small.model().state_dict().items()}
    save_file({f"{prefix}{key}": value.contiguous() for key, value in small.to_comfy(state).items()}, path)
    return path


def save_data(path: Path, channels: int = 16, pooled: int = 0) -> Path:
    """Two pictures of other sizes and two captions of other lengths, and the empty one."""
    generator = torch.Generator().manual_seed(1)
    pictures = [EncodedPicture(torch.randn(channels, *size, generator=generator)) for size in ((4, 4), (6, 4))]
    texts = [
        EncodedText(
            torch.randn(n, TEXT_WIDTH, generator=generator),
            torch.randn(pooled, generator=generator) if pooled else None,
        )
        for n in (3, 5, 7)
    ]
    return save_cache(
        path, [CacheItem(f"{i}.png", i + 1, f"caption {i}") for i in range(2)], pictures, texts, empty_text=0
    )
