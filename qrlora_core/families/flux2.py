"""FLUX.2 (dev, klein 4B and 9B): double and single blocks with one modulation for all, gated MLPs, no biases."""

from .flux import DOUBLE_ALIASES, DOUBLE_ATTENTION
from .record import DOUBLE_OR_SINGLE, BlockKind, Family, Layer, outside

FLUX2 = Family(
    name="FLUX.2",
    architecture="flux-2",
    block_kinds=(
        BlockKind(
            "double",
            "transformer_blocks.{}",
            "double_blocks.{}",
            (
                *DOUBLE_ATTENTION,
                Layer("ff.linear_in", "img_mlp.0", "feed_forward", "image", 6, True),
                Layer("ff.linear_out", "img_mlp.2", "feed_forward", "image", 1 / 3, True),
                Layer("ff_context.linear_in", "txt_mlp.0", "feed_forward", "text", 6, True),
                Layer("ff_context.linear_out", "txt_mlp.2", "feed_forward", "text", 1 / 3, True),
            ),
            8,
        ),
        BlockKind(
            "single",
            "single_transformer_blocks.{}",
            "single_blocks.{}",
            (  # diffusers keeps these fused too: q, k, v and the MLP are one matrix in every layout
                Layer("attn.to_qkv_mlp_proj", "linear1", "attention", "both", 9, True),
                Layer("attn.to_out", "linear2", "attention", "both", 1 / 4, True),
            ),
            48,
        ),
        outside(
            {
                "x_embedder": "img_in",
                "context_embedder": "txt_in",
                "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
                "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
                "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
                "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
                "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
                "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
                "single_stream_modulation.linear": "single_stream_modulation.lin",
                "proj_out": "final_layer.linear",
            }
        ),
    ),
    marks=("double_stream_modulation_", "single_stream_modulation.", "time_guidance_embed."),
    aliases=DOUBLE_ALIASES,
    presets=DOUBLE_OR_SINGLE,
    swapped=(("norm_out.linear", "final_layer.adaLN_modulation.1"),),
)
