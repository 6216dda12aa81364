"""Stable Diffusion 3 and 3.5: double blocks; some of 3.5 medium's attend once more within the image."""

from .record import BlockKind, Family, Layer, outside

_DOUBLE = (
    Layer("attn.to_q", "x_block.attn.qkv", "attention", "image", 1, True),
    Layer("attn.to_k", "x_block.attn.qkv", "attention", "image", 1, True),
    Layer("attn.to_v", "x_block.attn.qkv", "attention", "image", 1, True),
    Layer("attn.to_out.0", "x_block.attn.proj", "attention", "image", 1, True),
    Layer("attn.add_q_proj", "context_block.attn.qkv", "attention", "text", 1, True),
    Layer("attn.add_k_proj", "context_block.attn.qkv", "attention", "text", 1, True),
    Layer("attn.add_v_proj", "context_block.attn.qkv", "attention", "text", 1, True),
    Layer("attn.to_add_out", "context_block.attn.proj", "attention", "text", 1, True),
    Layer("attn2.to_q", "x_block.attn2.qkv", "attention", "image", 1, True),
    Layer("attn2.to_k", "x_block.attn2.qkv", "attention", "image", 1, True),
    Layer("attn2.to_v", "x_block.attn2.qkv", "attention", "image", 1, True),
    Layer("attn2.to_out.0", "x_block.attn2.proj", "attention", "image", 1, True),
    Layer("ff.net.0.proj", "x_block.mlp.fc1", "feed_forward", "image", 4, True),
    Layer("ff.net.2", "x_block.mlp.fc2", "feed_forward", "image", 1 / 4, True),
    Layer("ff_context.net.0.proj", "context_block.mlp.fc1", "feed_forward", "text", 4, True),
    Layer("ff_context.net.2", "context_block.mlp.fc2", "feed_forward", "text", 1 / 4, True),
    Layer("norm1.linear", "x_block.adaLN_modulation.1", "modulation", "image"),
    # not context_block.adaLN_modulation.1: the last block's halves change places between the layouts, so LoRAs of it
    # keep the name of their own layout
)

SD3 = Family(
    name="SD3.5",
    architecture="stable-diffusion-v3.5",
    block_kinds=(
        BlockKind("double", "transformer_blocks.{}", "joint_blocks.{}", _DOUBLE, 38),
        outside(
            {
                "pos_embed.proj": "x_embedder.proj",
                "context_embedder": "context_embedder",
                "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
                "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
                "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
                "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
                "proj_out": "final_layer.linear",
            }
        ),
    ),
    marks=("pos_embed.proj", "joint_blocks."),
    swapped=(("norm_out.linear", "final_layer.adaLN_modulation.1"),),
)
