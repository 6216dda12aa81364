"""A small random model of every family that can be trained on, as diffusers makes it and as ComfyUI stores it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from qrlora_core import CacheItem, EncodedPicture, EncodedText, save_cache
from train.model.backbones.flux import _PLAIN as FLUX_PLAIN
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
        file_size: what has to be larger for ComfyUI to tell the model by its file: arguments of diffusers' class.
        steps: how many time counts from a picture to noise, as ComfyUI's model takes it.
        guided: whether it is told a guidance.
        layers: how many linear layers are adapted.
        pooled: width of the pooled text, where it takes one.
        text_width: of its text's tokens.
        network: what a diffusers folder calls it.
    """

    model_class: str
    arguments: dict[str, Any]
    host: tuple[str, dict[str, Any]]
    layers: int
    frames: bool = False
    channels: int = 16
    pooled: int = 0
    text_width: int = TEXT_WIDTH
    network: str = "transformer"
    host_size: dict[str, int] = field(default_factory=dict)
    file_size: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    guided: bool = False
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
                    parameter.copy_(noise * (0.02 if parameter.dim() == 1 else parameter[0].numel() ** -0.5))
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
        number, _, suffix = module.partition(".")[2].partition(".")
        if module == "norm_out.linear" or (suffix == "norm1_context.linear" and int(number) == last):
            value = torch.cat(value.chunk(2)[::-1])
        if module in plain:
            moved[f"{plain[module]}.{kind}"] = value
        elif suffix in inside:
            moved[f"joint_blocks.{number}.{inside[suffix]}.{kind}"] = value
        elif suffix in fused:
            parts.setdefault(f"joint_blocks.{number}.{fused[suffix][0]}.{kind}", {})[fused[suffix][1]] = value
    return moved | {key: torch.cat([found[letter] for letter in "qkv"]) for key, found in parts.items()}


def sdxl_to_comfy(state):
    """Written out, too: blocks by their numbers, then what is inside of a residual block."""
    places = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
    for level in range(3):
        for index in range(2):
            places[f"down_blocks.{level}.resnets.{index}"] = f"input_blocks.{3 * level + index + 1}.0"
            places[f"down_blocks.{level}.attentions.{index}"] = f"input_blocks.{3 * level + index + 1}.1"
        for index in range(3):
            places[f"up_blocks.{level}.resnets.{index}"] = f"output_blocks.{3 * level + index}.0"
            places[f"up_blocks.{level}.attentions.{index}"] = f"output_blocks.{3 * level + index}.1"
        places[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{3 * level + 3}.0"
        places[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{3 * level + 2}.2"
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    plain = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
    moved = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        block = next((block for block in places if module.startswith(f"{block}.")), None)
        if block is None:
            moved[f"{plain[module]}.{kind}"] = value
            continue
        suffix = module.removeprefix(f"{block}.")
        if "resnets" in block:
            suffix = inside[suffix]
        elif "downsamplers" in block:
            suffix = "op"
        moved[f"{places[block]}.{suffix}.{kind}"] = value
    return moved


def krea2_to_comfy(state):
    names = (
        ("text_fusion.", "txtfusion."), ("transformer_blocks.", "blocks."), ("norm1.weight", "prenorm.scale"),
        ("norm2.weight", "postnorm.scale"), ("norm_q.weight", "qknorm.qnorm.scale"),
        ("norm_k.weight", "qknorm.knorm.scale"), ("attn.to_q", "attn.wq"), ("attn.to_k", "attn.wk"),
        ("attn.to_v", "attn.wv"), ("attn.to_gate", "attn.gate"), ("attn.to_out.0", "attn.wo"), ("ff.", "mlp."),
        ("img_in", "first"), ("time_embed.linear_1", "tmlp.0"), ("time_embed.linear_2", "tmlp.2"),
        ("time_mod_proj", "tproj.1"), ("txt_in.norm.weight", "txtmlp.0.scale"), ("txt_in.linear_1", "txtmlp.1"),
        ("txt_in.linear_2", "txtmlp.3"), ("final_layer.norm.weight", "last.norm.scale"),
        ("final_layer.linear", "last.linear"), ("final_layer.scale_shift_table", "last.modulation.lin"),
        ("scale_shift_table", "mod.lin"),
    )  # fmt: skip
    moved = {}
    for name, value in state.items():
        flat = name.startswith("transformer_blocks.") and name.endswith("scale_shift_table")
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        moved[name] = value.flatten() if flat else value
    return moved


def flux_to_comfy(state):
    outside = {theirs: ours for ours, theirs in FLUX_PLAIN.items()}
    double = {
        **{f"attn.to_{letter}": ("img_attn.qkv", letter) for letter in "qkv"},
        **{f"attn.add_{letter}_proj": ("txt_attn.qkv", letter) for letter in "qkv"},
        "attn.to_out.0": ("img_attn.proj", ""), "attn.to_add_out": ("txt_attn.proj", ""),
        "attn.norm_q": ("img_attn.norm.query_norm", ""), "attn.norm_k": ("img_attn.norm.key_norm", ""),
        "attn.norm_added_q": ("txt_attn.norm.query_norm", ""), "attn.norm_added_k": ("txt_attn.norm.key_norm", ""),
        "ff.net.0.proj": ("img_mlp.0", ""), "ff.net.2": ("img_mlp.2", ""), "ff_context.net.0.proj": ("txt_mlp.0", ""),
        "ff_context.net.2": ("txt_mlp.2", ""), "norm1.linear": ("img_mod.lin", ""),
        "norm1_context.linear": ("txt_mod.lin", ""),
    }  # fmt: skip
    single = {
        **{f"attn.to_{letter}": ("linear1", letter) for letter in "qkv"}, "proj_mlp": ("linear1", "w"),
        "proj_out": ("linear2", ""), "norm.linear": ("modulation.lin", ""), "attn.norm_q": ("norm.query_norm", ""),
        "attn.norm_k": ("norm.key_norm", ""),
    }  # fmt: skip
    fused = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if module in outside:
            value = torch.cat(value.chunk(2)[::-1]) if module == "norm_out.linear" else value
            fused[f"{outside[module]}.{kind}"] = {"": value}
            continue
        block, number, suffix = module.split(".", 2)
        native, names = ("double_blocks", double) if block == "transformer_blocks" else ("single_blocks", single)
        ours, part = names[suffix]
        kind = "scale" if ours.endswith("_norm") else kind
        fused.setdefault(f"{native}.{number}.{ours}.{kind}", {})[part] = value
    return {key: torch.cat([parts[part] for part in sorted(parts, key="qkvw".find)]) for key, parts in fused.items()}


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
    "flux": Small(  # Fill; FLUX.1-dev is the golden model
        "FluxTransformer2DModel",
        {"in_channels": 384, "out_channels": 64, "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 1,
         "joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": TEXT_WIDTH, "guidance_embeds": True},
        ("Flux", {"image_model": "flux", "in_channels": 96, "out_channels": 16, "patch_size": 2, "hidden_size": 128,
                  "num_heads": 1, "depth": 2, "depth_single_blocks": 2, "context_in_dim": TEXT_WIDTH,
                  "vec_in_dim": TEXT_WIDTH, "mlp_ratio": 4.0, "axes_dim": [16, 56, 56], "theta": 10000,
                  "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []}),
        30,
        pooled=TEXT_WIDTH,
        guided=True,
        to_comfy=flux_to_comfy,
    ),
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
        {"sample_size": 16, "num_layers": 3, "num_attention_heads": 3, "joint_attention_dim": TEXT_WIDTH,
         "caption_projection_dim": 192, "pooled_projection_dim": TEXT_WIDTH, "pos_embed_max_size": 16,
         "dual_attention_layers": [0], "qk_norm": "rms_norm"},
        ("SD3", {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 3, "input_size": None,
                 "adm_in_channels": TEXT_WIDTH, "qk_norm": "rms", "pos_embed_scaling_factor": None,
                 "pos_embed_max_size": 16,
                 "num_patches": 256, "x_block_self_attn_layers": [0],
                 "context_embedder_config": {"target": "torch.nn.Linear",
                                             "params": {"in_features": TEXT_WIDTH, "out_features": 192}}}),
        37,
        pooled=TEXT_WIDTH,
        steps=1000,
        to_comfy=sd3_to_comfy,
    ),
    "sdxl": Small(
        "UNet2DConditionModel",
        {"sample_size": 16, "block_out_channels": (64, 64, 128), "layers_per_block": 2,
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
         "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": TEXT_WIDTH, "attention_head_dim": (1, 1, 2),
         "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
         "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 256},
        ("SDXL", {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64,
                  "num_res_blocks": [2, 2, 2], "channel_mult": [1, 1, 2], "transformer_depth": [0, 0, 1, 1, 2, 2],
                  "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
                  "context_dim": TEXT_WIDTH, "num_head_channels": 64, "use_spatial_transformer": True,
                  "use_linear_in_transformer": True, "num_classes": "sequential",
                  "adm_in_channels": TEXT_WIDTH + 6 * 256, "legacy": False, "use_temporal_attention": False}),
        170,
        channels=4,
        pooled=TEXT_WIDTH,
        network="unet",
        steps=1000,
        file_size={"block_out_channels": (320, 320, 320), "attention_head_dim": (5, 5, 5), "cross_attention_dim": 2048,
                   "projection_class_embeddings_input_dim": 2816},
        to_comfy=sdxl_to_comfy,
    ),
    "krea2": Small(
        "Krea2Transformer2DModel",
        # ComfyUI takes heads of 128, and 20 heads in the network that reads the text
        {"num_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 384,
         "text_hidden_dim": 320, "num_text_layers": 2, "text_num_attention_heads": 20,
         "text_num_key_value_heads": 20, "text_intermediate_size": 896},
        ("Krea2", {"image_model": "krea2", "features": 128, "channels": 16, "patch": 2, "layers": 2, "heads": 1,
                   "kvheads": 1, "txtlayers": 2, "txtdim": 320}),
        16,
        text_width=640,
        to_comfy=krea2_to_comfy,
    ),
}  # fmt: skip


def save_single_file(small: Small, path: Path, prefix: str = "") -> Path:
    """The model as ComfyUI stores it."""
    state = {key: value.detach() for key, value in small.model().state_dict().items()}
    save_file({f"{prefix}{key}": value.contiguous() for key, value in small.to_comfy(state).items()}, path)
    return path


def save_data(path: Path, channels: int = 16, pooled: int = 0, text_width: int = TEXT_WIDTH) -> Path:
    """Two pictures of other sizes and two captions of other lengths, and the empty one."""
    generator = torch.Generator().manual_seed(1)
    pictures = [EncodedPicture(torch.randn(channels, *size, generator=generator)) for size in ((4, 4), (6, 4))]
    texts = [
        EncodedText(
            torch.randn(n, text_width, generator=generator),
            torch.randn(pooled, generator=generator) if pooled else None,
        )
        for n in (3, 5, 7)
    ]
    return save_cache(
        path, [CacheItem(f"{i}.png", i + 1, f"caption {i}") for i in range(2)], pictures, texts, empty_text=0
    )
