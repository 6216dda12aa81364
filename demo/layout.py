"""A diffusers FLUX written as ComfyUI's single file: q, k, v in one weight, other names, shift before scale."""

from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qrlora_core.families import FLUX, native_place

# The norms of queries and keys; every other name follows from `native_place`.
_NORMS = {
    "transformer_blocks": {
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
    },
    "single_transformer_blocks": {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"},
}


def to_comfy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a diffusers FluxTransformer2DModel under ComfyUI's names; the inverse of reading such a file.

    Raises:
        TargetError: a name that no FLUX has.
    """
    result: dict[str, Tensor] = {}
    rows: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)  # fused key -> (first row, part)
    for key, tensor in state.items():
        module, kind = key.rsplit(".", 1)
        kind_of_block, _, rest = module.partition(".")
        number, _, name = rest.partition(".")
        if module == "norm_out.linear":
            scale, shift = tensor.chunk(2)
            result[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        elif name in _NORMS.get(kind_of_block, {}):
            block = "double_blocks" if kind_of_block == "transformer_blocks" else "single_blocks"
            result[f"{block}.{number}.{_NORMS[kind_of_block][name]}.scale"] = tensor
        else:
            place = native_place(FLUX, module, state[f"{module}.weight"].shape)
            rows[place.key.removesuffix("weight") + kind].append((place.start or 0, tensor))
    for key, parts in rows.items():
        result[key] = torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
    return result


def save_comfy(state: dict[str, Tensor], path: Path, metadata: dict[str, str], dtype: torch.dtype) -> None:
    """Write a diffusers state as ComfyUI's single file."""
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in to_comfy(state).items()}, path, metadata)
