"""A small FLUX in diffusers from a ComfyUI single file, and the golden tensors that tests and demo compare with."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qrlora_core import Adapter
from qrlora_core.families import FLUX, native_layers, native_place

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
ALPHA_BETA = ((0.0, 0.0), (0.5, 0.25), (0.9, 1.0), (1.0, 1.0))

_PLAIN = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}


@cache
def golden_tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tensors.safetensors")


@cache
def base_weights() -> dict[str, Tensor]:
    """The base in ComfyUI's layout."""
    return load_file(GOLDEN / "base_bfl.safetensors")


def own_weight(name: str, adapter: Adapter) -> Tensor:
    """The base weight of one layer, (out, in), cut out of ComfyUI's fused one."""
    place = native_place(FLUX, name, adapter.layers[name].shape)
    weight = base_weights()[place.key]
    return weight if place.start is None else weight.narrow(0, place.start, place.length)


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's single-file layout as diffusers' FluxTransformer2DModel names it.

    Written apart from the trainer's own table on purpose: tests compare the two.
    """
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, kind = key.rsplit(".", 1)
        if module in _PLAIN:
            result[f"{_PLAIN[module]}.{kind}"] = tensor
        elif module == "final_layer.adaLN_modulation.1":
            shift, scale = tensor.chunk(2)
            result[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
        elif kind == "scale":
            block, suffix = key.split(".", 2)[:2], key.split(".", 2)[2]
            prefix = "transformer_blocks" if block[0] == "double_blocks" else "single_transformer_blocks"
            result[f"{prefix}.{block[1]}.{_NORMS[suffix]}"] = tensor
        else:
            names = native_layers(FLUX, module)
            hidden = tensor.shape[0] // 3 if "qkv" in module else 0
            if "linear1" in module:
                hidden = state[f"{module}.weight"].shape[1]
            start = 0
            for index, name in enumerate(names):
                last = index == len(names) - 1
                length = tensor.shape[0] - start if last else hidden
                result[f"{name}.{kind}"] = tensor.narrow(0, start, length)
                start += length
    return result


def golden_flux() -> nn.Module:
    """The golden base as a diffusers model, fp32, eval."""
    from diffusers import FluxTransformer2DModel

    config = json.loads((GOLDEN / "transformer_config.json").read_text())
    model = FluxTransformer2DModel(**config)
    model.load_state_dict(to_diffusers(base_weights()))
    return model.eval()


@torch.no_grad()
def golden_output(model: nn.Module) -> Tensor:
    """The model's output on the golden inputs."""
    inputs = {key.removeprefix("input."): value for key, value in golden_tensors().items() if key.startswith("input.")}
    return model(**inputs).sample


def with_weights(weights: dict[str, Tensor]) -> nn.Module:
    """The golden model with some layers' weights replaced: layer name -> weight."""
    model = golden_flux()
    missing = model.load_state_dict({f"{name}.weight": value for name, value in weights.items()}, strict=False)
    assert not missing.unexpected_keys
    return model
