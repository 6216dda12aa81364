"""Qwen-Image 1.x (Image, Edit, Layered): double blocks only, kept under diffusers' names everywhere."""

from .record import BlockKind, Family, Layer, outside

_DOUBLE = (
    Layer("attn.to_q", "attn.to_q", "attention", "image", 1, True),
    Layer("attn.to_k", "attn.to_k", "attention", "image", 1, True),
    Layer("attn.to_v", "attn.to_v", "attention", "image", 1, True),
    Layer("attn.to_out.0", "attn.to_out.0", "attention", "image", 1, True),
    Layer("attn.add_q_proj", "attn.add_q_proj", "attention", "text", 1, True),
    Layer("attn.add_k_proj", "attn.add_k_proj", "attention", "text", 1, True),
    Layer("attn.add_v_proj", "attn.add_v_proj", "attention", "text", 1, True),
    Layer("attn.to_add_out", "attn.to_add_out", "attention", "text", 1, True),
    Layer("img_mlp.net.0.proj", "img_mlp.net.0.proj", "feed_forward", "image", 4, True),
    Layer("img_mlp.net.2", "img_mlp.net.2", "feed_forward", "image", 1 / 4, True),
    Layer("txt_mlp.net.0.proj", "txt_mlp.net.0.proj", "feed_forward", "text", 4, True),
    Layer("txt_mlp.net.2", "txt_mlp.net.2", "feed_forward", "text", 1 / 4, True),
    Layer("img_mod.1", "img_mod.1", "modulation", "image", 6),
    Layer("txt_mod.1", "txt_mod.1", "modulation", "text", 6),
)
_OUTSIDE = (
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)

QWEN_IMAGE = Family(
    name="Qwen-Image",
    architecture="qwen-image",
    block_kinds=(
        BlockKind("double", "transformer_blocks.{}", "transformer_blocks.{}", _DOUBLE, 60),
        outside({name: name for name in _OUTSIDE}),
    ),
)
