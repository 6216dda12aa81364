"""Strength per block, part and stream of an adapter."""

from comfy_api.latest import io

from ..qrlora_core import NOTHING, BlockScale, MergeRecipe, family_of_targets, parse_kind_ranges, parse_ranges
from . import report, sockets
from .arrivals import Node


class BlockScaleNode(Node):
    """DELTA_R -> DELTA_R with a factor for every layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRABlockScale",
            "\u0394R Block Scale",
            "Strength per kind of block, per part, per stream and per range of blocks. Factors that meet in a layer "
            "multiply. Nothing is computed before the result is applied or saved.",
            inputs=[
                sockets.delta_r_input("delta_r", "An adapter or a merge; all of it is scaled."),
                sockets.strength_input(
                    "double_blocks",
                    "Double blocks: image and text have weights of their own (FLUX, Chroma, Qwen-Image, SD3.5).",
                ),
                sockets.strength_input(
                    "single_blocks",
                    "Single blocks: image and text share their weights (FLUX, Chroma, Z-Image, Krea 2).",
                ),
                sockets.strength_input("attention", "Attention layers of both kinds of blocks."),
                sockets.strength_input("feed_forward", "Feed-forward layers (MLP)."),
                sockets.strength_input("image_stream", "Image layers of double blocks; single blocks keep 1."),
                sockets.strength_input("text_stream", "Text layers of double blocks; single blocks keep 1."),
                _ranges_input("double_ranges", "0-9: 1.0, 10-18: 0.5", "double"),
                _ranges_input("single_ranges", "0-18: 1.0, 19-37: 0.5", "single"),
                io.String.Input(
                    "other_ranges",
                    default="",
                    optional=True,
                    placeholder="input 4-5: 0.5, middle: 0",
                    tooltip="Factors for kinds of blocks that only some models have, with the kind before the blocks, "
                    "as in 'input 4-5: 0.5, middle: 0' (SDXL) or 'context_refiner 0-1: 0' (Z-Image). Empty: all 1.",
                ),
            ],
            outputs=[sockets.DeltaR.Output(display_name="delta_r", tooltip="The scaled adapter, for Merge and Apply.")],
            search_aliases=["block weight", "layer strength", "qr-lora blocks"],
        )

    @classmethod
    def execute(
        cls,
        double_blocks: float,
        single_blocks: float,
        attention: float,
        feed_forward: float,
        image_stream: float,
        text_stream: float,
        double_ranges: str,
        single_ranges: str,
        delta_r: MergeRecipe = NOTHING,
        other_ranges: str = "",
    ) -> io.NodeOutput:
        scale = BlockScale(
            double=double_blocks,
            single=single_blocks,
            attention=attention,
            feed_forward=feed_forward,
            image=image_stream,
            text=text_stream,
            double_ranges=parse_ranges(double_ranges, "double_ranges"),
            single_ranges=parse_ranges(single_ranges, "single_ranges"),
            other_ranges=parse_kind_ranges(other_ranges, "other_ranges"),
            family=family_of_targets(target for adapter in delta_r.adapters for target in adapter.targets),
        )
        scaled = delta_r.block_scaled(scale)
        return io.NodeOutput(scaled, ui={"text": [report.block_text(scale, scaled)]})


def _ranges_input(name: str, example: str, block: str) -> io.String.Input:
    return io.String.Input(
        name,
        default="",
        placeholder=example,
        tooltip=f"Factors for some {block} blocks, as in '{example}'; blocks that are not named keep 1. Empty: all 1.",
    )
