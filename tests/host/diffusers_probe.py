"""Run inside ComfyUI's interpreter: `diffusers_probe.py HOST BASE RESULT`. The families that the trainer does not know:
diffusers' own small model with random weights, and ComfyUI's, whose weights this pack's tables put into its layout."""

import json
import re
import sys
import traceback
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent))
from in_host import Host

wanted = sys.argv[4:]
host = Host(sys.argv[1:4])
sys.path.append(str(Path(__file__).parent))

import comfy.utils
import diffusers
import qr_lora_pack.qrlora_core as core
import torch
from qr_lora_pack.qrlora_core.families import FAMILIES, find, has_layer, native_place
from small_models import MODELS, model

BY_NAME = {family.name: family for family in FAMILIES}
PATCH = 2


def packed(latents):
    """(b, c, h, w) -> (b, h/2 * w/2, c * 4), and the place of each token."""
    batch, channels, height, width = latents.shape
    rows, columns = height // PATCH, width // PATCH
    tokens = latents.reshape(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
    places = torch.zeros(rows, columns, 3)
    places[..., 1], places[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return tokens.reshape(batch, rows * columns, -1), places.reshape(-1, 3)


def unpacked(tokens, like):
    batch, channels, height, width = like.shape
    rows, columns = height // PATCH, width // PATCH
    return tokens.reshape(batch, rows, columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


def chroma(net, given):
    tokens, places = packed(given["latents"])
    out = net(tokens, given["text"], given["sigma"], places, torch.zeros(given["text"].shape[1], 3), return_dict=False)
    return unpacked(out[0], given["latents"])


def krea2(net, given):
    tokens, places = packed(given["latents"])
    length = given["text"].shape[1]
    layered = given["text"].reshape(1, length, 3, 64)
    places = torch.cat([torch.zeros(length, 3), places])
    return unpacked(net(tokens, layered, given["sigma"], places, return_dict=False)[0], given["latents"])


def sd3(net, given):
    return net(given["latents"], given["text"], given["y"], given["sigma"] * 1000, return_dict=False)[0]


def sdxl(net, given):
    times = net.add_time_proj(given["sizes"].flatten()).reshape(1, -1)
    given["y"] = torch.cat([given["y"][:, :16], times], dim=1)
    added = {"text_embeds": given["y"][:, :16], "time_ids": given["sizes"]}
    return net(given["latents"], given["sigma"] * 1000, given["text"], added_cond_kwargs=added, return_dict=False)[0]


# family -> diffusers' class, its arguments, how it is called, what of ComfyUI's configuration is other
NETS = {
    "Chroma": ("ChromaTransformer2DModel", {
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 1, "joint_attention_dim": 64, "axes_dims_rope": (16, 56, 56),
        "approximator_num_channels": 64, "approximator_hidden_dim": 64, "approximator_layers": 2,
    }, chroma, {"depth": 19, "depth_single_blocks": 38}),
    "Krea 2": ("Krea2Transformer2DModel", {
        "in_channels": 64, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 384, "text_hidden_dim": 64, "num_text_layers": 3,
        "text_num_attention_heads": 1, "text_num_key_value_heads": 1, "text_intermediate_size": 256,
        "axes_dims_rope": (16, 24, 24),
    }, krea2, {}),
    "SD3.5": ("SD3Transformer2DModel", {
        "sample_size": 8, "patch_size": 2, "in_channels": 16, "num_layers": 2, "attention_head_dim": 64,
        "num_attention_heads": 2, "joint_attention_dim": 64, "caption_projection_dim": 128,
        "pooled_projection_dim": 64, "out_channels": 16, "pos_embed_max_size": 8, "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }, sd3, {}),
    "SDXL": ("UNet2DConditionModel", {
        "sample_size": 8, "block_out_channels": (32, 64, 128), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 64, "attention_head_dim": (1, 1, 2),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }, sdxl, {}),
}  # fmt: skip

# norms and tables, which no adapter changes, where the host has no map of them: diffusers' name -> ComfyUI's
NORMS = {
    "Chroma": (
        (r"(distilled_guidance_layer\.layers\.\d+)\.linear_1", r"\1.in_layer"),
        (r"(distilled_guidance_layer\.layers\.\d+)\.linear_2", r"\1.out_layer"),
    ),
    "Krea 2": (
        (r"text_fusion\.", "txtfusion."),
        (r"transformer_blocks\.", "blocks."),
        (r"\.norm1\.weight", ".prenorm.scale"),
        (r"\.norm2\.weight", ".postnorm.scale"),
        (r"\.norm_q\.weight", ".qknorm.qnorm.scale"),
        (r"\.norm_k\.weight", ".qknorm.knorm.scale"),
        (r"txt_in\.norm\.weight", "txtmlp.0.scale"),
        (r"final_layer\.norm\.weight", "last.norm.scale"),
        (r"final_layer\.scale_shift_table", "last.modulation.lin"),
        (r"\.scale_shift_table", ".mod.lin"),
    ),
}
MAPS = {
    "Chroma": comfy.utils.flux_to_diffusers,
    "Krea 2": comfy.utils.krea2_to_diffusers,
    "SD3.5": comfy.utils.mmdit_to_diffusers,
    "SDXL": comfy.utils.unet_to_diffusers,
}


def fill(net):
    """Random weights that keep activations near 1, norms near 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(net.named_parameters()):
            noise = torch.randn(weight.shape)
            if weight.ndim == 1 and "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * noise)
            else:
                weight.copy_(noise * (0.05 if weight.ndim == 1 else weight[0].numel() ** -0.5))
    return net.eval()


def in_comfy(name, net, state):
    """The weights in ComfyUI's layout; how many of them the family's table placed."""
    family, made, mapped = BY_NAME[name], {}, MAPS[name](MODELS[name][1] | NETS[name][3])
    filled, by_table = {key: torch.zeros(value.shape[:1], dtype=torch.bool) for key, value in state.items()}, 0
    for key, value in net.state_dict().items():
        layer, _, end = key.rpartition(".")
        if find(family, layer) is not None and has_layer(family, layer):
            columns = net.state_dict()[f"{layer}.weight"][0].numel()
            place = native_place(family, layer, (value.shape[0], columns))
            target = place.key.removesuffix("weight") + end
            rows = slice(place.start, None if place.start is None else place.start + value.shape[0])
            by_table += 1
        else:
            entry = mapped.get(key, key)
            for theirs, ours in NORMS.get(name, ()):
                entry = re.sub(theirs, ours, entry) if isinstance(entry, str) else entry
            target, place, function = (*entry, None)[:3] if isinstance(entry, tuple) else (entry, None, None)
            value = function(value) if function is not None else value
            rows = slice(place[1], place[1] + place[2]) if place else slice(None)
        if target not in made:
            made[target] = torch.empty(state[target].shape)
        made[target][rows] = value.reshape(made[target][rows].shape)
        filled[target][rows] = True
    rest = [key for key, done in filled.items() if done.numel() and not bool(done.all())]
    assert not rest, f"{name}: nothing was put into {rest[:5]}"
    return made, by_table


@torch.no_grad()
def compared(name):
    kind, arguments, call, changes = NETS[name]
    net = fill(getattr(diffusers, kind)(**arguments))
    patcher = model(name, **changes)
    inner = patcher.model.diffusion_model
    made, by_table = in_comfy(name, net, inner.state_dict())
    inner.load_state_dict(made)
    torch.manual_seed(6)
    given = {
        "latents": torch.randn(1, 4 if name == "SDXL" else 16, 8, 4),
        "text": torch.randn(1, 7, 3 * 64 if name == "Krea 2" else 64),
        "sigma": torch.tensor([0.4]),
        "y": torch.randn(1, 64),
        "sizes": torch.tensor([[64.0, 32.0, 0.0, 0.0, 64.0, 32.0]]),
    }
    theirs = call(net, given)
    more = {"guidance": torch.zeros(1)} if name == "Chroma" else {}
    time = given["sigma"] * (1000 if name in ("SD3.5", "SDXL") else 1)
    ours = inner(given["latents"], time, context=given["text"], y=given["y"], **more)
    gap = float((ours - theirs).abs().max() / theirs.abs().max())
    return {"gap": gap, "size": float(theirs.abs().max()), "by table": by_table}


def checked(name):
    try:
        return compared(name)
    except Exception as error:  # noqa: BLE001 - one family must not hide the others
        return {"error": f"{error!r}\n{traceback.format_exc()[-1500:]}"}


if __name__ == "__main__":
    assert core.__version__
    host.result.write_text(json.dumps({name: checked(name) for name in wanted or NETS}, indent=1))
