"""Chroma: FLUX.1's blocks without their modulation, which one small network gives for all of them."""

from .flux import ALIASES, DOUBLE_ATTENTION, DOUBLE_FEED_FORWARD, SINGLE
from .record import DOUBLE_OR_SINGLE, BlockKind, Family, outside

CHROMA = Family(
    name="Chroma",
    architecture="chroma",
    block_kinds=(
        BlockKind("double", "transformer_blocks.{}", "double_blocks.{}", DOUBLE_ATTENTION + DOUBLE_FEED_FORWARD, 19),
        BlockKind("single", "single_transformer_blocks.{}", "single_blocks.{}", SINGLE, 38),
        outside({"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}),
    ),
    marks=("distilled_guidance_layer.",),
    aliases=ALIASES,
    presets=DOUBLE_OR_SINGLE,
)
