"""A small model of every family with random weights, in ComfyUI's own classes; imported inside of its interpreter."""

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

FLUX_SIZES = {"hidden_size": 128, "num_heads": 1, "depth": 2, "depth_single_blocks": 2, "context_in_dim": 64}
MODELS = {
    "FLUX.1": ("Flux", {
        "image_model": "flux", **FLUX_SIZES, "in_channels": 16, "out_channels": 16, "vec_in_dim": 64,
        "mlp_ratio": 4.0, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
        "guidance_embed": True, "txt_ids_dims": [],
    }),
    "FLUX.2": ("Flux2", {
        "image_model": "flux2", **FLUX_SIZES, "in_channels": 128, "out_channels": 128, "vec_in_dim": None,
        "mlp_ratio": 3.0, "axes_dim": [32, 32, 32, 32], "theta": 2000, "patch_size": 1, "qkv_bias": False,
        "ops_bias": False, "guidance_embed": True, "txt_ids_dims": [3], "global_modulation": True,
        "mlp_silu_act": True, "default_ref_method": "index", "ref_index_scale": 10.0,
    }),
    "Chroma": ("Chroma", {
        "image_model": "chroma", **FLUX_SIZES, "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 128,
        "hidden_dim": 64, "n_layers": 2, "vec_in_dim": None, "mlp_ratio": 4.0, "axes_dim": [16, 56, 56],
        "theta": 10000, "patch_size": 2, "qkv_bias": True, "txt_ids_dims": [],
    }),
    "Z-Image": ("ZImage", {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": 64, "n_layers": 2,
        "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [64, 64, 64],
        "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
    }),
    "Qwen-Image": ("QwenImage", {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 128,
        "num_attention_heads": 1, "joint_attention_dim": 64,
    }),
    "Krea 2": ("Krea2", {
        "image_model": "krea2", "features": 128, "channels": 16, "patch": 2, "layers": 2, "heads": 2, "kvheads": 1,
        "txtlayers": 3, "txtdim": 64, "txtheads": 1, "txtkvheads": 1,
    }),
    "SD3.5": ("SD3", {
        "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None,
        "adm_in_channels": 64, "qk_norm": "rms", "pos_embed_scaling_factor": None, "pos_embed_max_size": 8,
        "num_patches": 64, "x_block_self_attn_layers": [0],
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
    }),
    "SDXL": ("SDXL", {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "context_dim": 64, "num_head_channels": 32,
        "use_spatial_transformer": True, "use_linear_in_transformer": True, "num_classes": "sequential",
        "adm_in_channels": 64, "legacy": False, "use_temporal_attention": False,
    }),
    # not of a family that this pack knows: only by ComfyUI's own map of LoRA names
    "AuraFlow": ("AuraFlow", {
        "in_channels": 4, "out_channels": 4, "dim": 256, "n_layers": 2, "n_double_layers": 1, "n_heads": 1,
        "global_conddim": 256, "cond_seq_dim": 64, "max_seq": 16,
    }),
}  # fmt: skip


def model(name, **changes):
    """A patcher of the family's model; `changes` are of its configuration."""
    kind, config = MODELS[name]
    settings = getattr(comfy.supported_models, kind)({**config, **changes})
    settings.set_inference_dtype(torch.float32, None)
    torch.manual_seed(1)
    made = settings.get_model({}, "", device="cpu")
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape))
        if name == "SD3.5":  # a buffer that would keep what was in memory
            made.diffusion_model.pos_embed.copy_(torch.randn(made.diffusion_model.pos_embed.shape))
    return comfy.model_patcher.ModelPatcher(made, torch.device("cpu"), torch.device("cpu"))


LATENTS = {"AuraFlow": (4, 4, 4), "FLUX.2": (128, 4, 4), "Qwen-Image": (16, 1, 4, 4), "SDXL": (4, 8, 8)}
TEXT = {"Krea 2": 3 * 64}
GUIDED = ("FLUX.1", "FLUX.2", "Chroma")
POOLED = ("FLUX.1", "SD3.5", "SDXL")


@torch.no_grad()
def forward(patcher, name, hooks=None):
    """What the sampler would get of the model, loaded as the sampler has it, on inputs that are always the same.

    With hooks also as the sampler has them: registered with the model that is loaded, and applied.
    """
    torch.manual_seed(5)
    inputs = {"c_crossattn": torch.randn(1, 7, TEXT.get(name, 64))}
    if name in GUIDED:
        inputs["guidance"] = torch.tensor([3.5])
    if name in POOLED:
        inputs["y"] = torch.randn(1, 64)
    if name == "Z-Image":
        inputs["num_tokens"] = 7
    latents = torch.randn(1, *LATENTS.get(name, (16, 4, 4)))
    models = [patcher, *patcher.get_nested_additional_models()]
    comfy.model_management.load_models_gpu(models, force_full_load=True)
    options = {"wrappers": patcher.wrappers, **patcher.model_options.get("transformer_options", {})}
    patcher.pre_run()
    if hooks is not None:
        target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        patcher.register_all_hook_patches(hooks, target)
        patcher.apply_hooks(hooks)
    try:
        return patcher.model.apply_model(latents, torch.tensor([0.7]), transformer_options=options, **inputs)
    finally:
        if hooks is not None:
            patcher.apply_hooks(None, force_apply=True)
            patcher.unpatch_hooks()
            patcher.restore_hook_patches()
        patcher.cleanup()
