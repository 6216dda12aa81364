"""Runs in ComfyUI's own Python: random weights of the host's autoencoder for videos, 8 channels wide, which VAELoader
takes for Qwen-Image's. `python write_video_vae.py COMFYUI_PATH FILE`."""

import sys

target = sys.argv[2]
sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--cpu"]

import comfy.options

comfy.options.enable_args_parsing()

import torch
from comfy.ldm.wan.vae import WanVAE
from safetensors.torch import save_file

torch.manual_seed(0)
model = WanVAE(
    dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True]
)
state = {}
for name, value in model.state_dict().items():
    scale = value[0].numel() ** -0.5 if value.dim() > 1 else 0.02
    state[name] = torch.ones_like(value) if name.endswith("gamma") else torch.randn(value.shape) * scale
save_file(state, target)
