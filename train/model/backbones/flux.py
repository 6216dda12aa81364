"""ComfyUI's names of FLUX.1's tensors, and what diffusers calls them."""

from qrlora_core import layer_names

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
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}


def diffusers_name(key: str, rows: int) -> list[tuple[str, int, int]]:
    """What diffusers calls a tensor of ComfyUI's layout: (name, first row, rows) for each part of it.

    Args:
        key: without a prefix, such as `double_blocks.0.img_attn.qkv.bias`.
        rows: length of its first dimension.

    Returns:
        Nothing for a key that is no parameter of FLUX.1.
    """
    module, _, kind = key.rpartition(".")
    if module in _PLAIN and kind in ("weight", "bias"):
        return [(f"{_PLAIN[module]}.{kind}", 0, rows)]
    block, _, rest = module.partition(".")
    number, _, suffix = rest.partition(".")
    if kind == "scale" and suffix in _NORMS and block in _BLOCKS:
        return [(f"{_BLOCKS[block]}.{number}.{_NORMS[suffix]}.weight", 0, rows)]
    names = layer_names(f"{module}.weight") if kind in ("weight", "bias") else ()
    if not names:
        return []
    # q, k, v are a third of a double block's rows, and a seventh of a single block's (its MLP has the other four)
    share = {1: rows, 3: rows // 3, 4: rows // 7}[len(names)]
    sizes = [share] * (len(names) - 1)
    sizes.append(rows - sum(sizes))
    return [(f"{name}.{kind}", sum(sizes[:index]), sizes[index]) for index, name in enumerate(names)]
