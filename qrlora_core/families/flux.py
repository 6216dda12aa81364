"""FLUX.1 (dev, schnell, Krea, Kontext, Fill, Canny, Depth): double blocks, then single blocks."""

from ..targets import LayerTarget
from .record import DOUBLE_OR_SINGLE, BlockKind, Family, Layer, outside

DOUBLE_ATTENTION = (
    Layer("attn.to_q", "img_attn.qkv", "attention", "image", 1, True),
    Layer("attn.to_k", "img_attn.qkv", "attention", "image", 1, True),
    Layer("attn.to_v", "img_attn.qkv", "attention", "image", 1, True),
    Layer("attn.to_out.0", "img_attn.proj", "attention", "image", 1, True),
    Layer("attn.add_q_proj", "txt_attn.qkv", "attention", "text", 1, True),
    Layer("attn.add_k_proj", "txt_attn.qkv", "attention", "text", 1, True),
    Layer("attn.add_v_proj", "txt_attn.qkv", "attention", "text", 1, True),
    Layer("attn.to_add_out", "txt_attn.proj", "attention", "text", 1, True),
)
DOUBLE_FEED_FORWARD = (
    Layer("ff.net.0.proj", "img_mlp.0", "feed_forward", "image", 4, True),
    Layer("ff.net.2", "img_mlp.2", "feed_forward", "image", 1 / 4, True),
    Layer("ff_context.net.0.proj", "txt_mlp.0", "feed_forward", "text", 4, True),
    Layer("ff_context.net.2", "txt_mlp.2", "feed_forward", "text", 1 / 4, True),
)
DOUBLE_MODULATION = (
    Layer("norm1.linear", "img_mod.lin", "modulation", "image", 6),
    Layer("norm1_context.linear", "txt_mod.lin", "modulation", "text", 6),
)
SINGLE = (
    Layer("attn.to_q", "linear1", "attention", "both", 1, True),
    Layer("attn.to_k", "linear1", "attention", "both", 1, True),
    Layer("attn.to_v", "linear1", "attention", "both", 1, True),
    Layer("proj_mlp", "linear1", "feed_forward", "both", 4),
    Layer("proj_out", "linear2", "feed_forward", "both", 1 / 5),  # closes attention and MLP
)
SINGLE_MODULATION = (Layer("norm.linear", "modulation.lin", "modulation", "both", 3),)

# What the XLabs and USO trainers call the native modules, and the host the first three parts of a fused one
DOUBLE_ALIASES = (
    ("processor.qkv_lora1", "img_attn.qkv"),
    ("processor.qkv_lora2", "txt_attn.qkv"),
    ("processor.proj_lora1", "img_attn.proj"),
    ("processor.proj_lora2", "txt_attn.proj"),
)
ALIASES = (
    *DOUBLE_ALIASES,
    ("processor.qkv", "linear1"),
    ("processor.proj", "linear2"),
    ("linear1_qkv", "linear1"),
)

FLUX = Family(
    name="FLUX.1",
    architecture="flux-1-dev",
    block_kinds=(
        BlockKind(
            "double",
            "transformer_blocks.{}",
            "double_blocks.{}",
            DOUBLE_ATTENTION + DOUBLE_FEED_FORWARD + DOUBLE_MODULATION,
            19,
        ),
        BlockKind("single", "single_transformer_blocks.{}", "single_blocks.{}", SINGLE + SINGLE_MODULATION, 38),
        outside(
            {
                "x_embedder": "img_in",
                "context_embedder": "txt_in",
                "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
                "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
                "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
                "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
                "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
                "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
                "proj_out": "final_layer.linear",
            }
        ),
    ),
    marks=("vector_in.", "single_blocks.0.modulation.", "single_transformer_blocks.0.norm."),
    aliases=ALIASES,
    presets=DOUBLE_OR_SINGLE,
    # BFL's Canny and Depth LoRAs, whose input takes a control picture beside the latent; ComfyUI knows them by these
    widened=(("img_in", ("img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale")),),
    swapped=(("norm_out.linear", "final_layer.adaLN_modulation.1"),),
)

# Suffixes of the layers that the published scripts adapt.
DOUBLE_TARGETS = tuple(layer.suffix for layer in FLUX.block_kinds[0].layers if layer.published)
SINGLE_TARGETS = tuple(layer.suffix for layer in FLUX.block_kinds[1].layers if layer.published)


def flux_targets(num_double: int, num_single: int, hidden_size: int, mlp_ratio: int = 4) -> tuple[LayerTarget, ...]:
    """The published target layers of a FLUX with so many blocks, in network order (FLUX.1: 19, 38, 3072 -> 342)."""
    wide = hidden_size * mlp_ratio
    shapes = {"ff.net.0.proj": (wide, hidden_size), "ff_context.net.0.proj": (wide, hidden_size)}
    shapes |= {"ff.net.2": (hidden_size, wide), "ff_context.net.2": (hidden_size, wide)}
    square = (hidden_size, hidden_size)
    return tuple(
        LayerTarget(f"{kind.path.format(block)}.{suffix}", shapes.get(suffix, square))
        for kind, count, suffixes in (
            (FLUX.block_kinds[0], num_double, DOUBLE_TARGETS),
            (FLUX.block_kinds[1], num_single, SINGLE_TARGETS),
        )
        for block in range(count)
        for suffix in suffixes
    )
