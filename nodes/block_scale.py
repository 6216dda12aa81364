"""Strength per block, part and stream of an adapter."""

from comfy_api.latest import io

from ..qrlora_core import (
    NOTHING,
    BlockScale,
    Family,
    MergeRecipe,
    QRLoRAError,
    SettingError,
    block_factors,
    combined,
    family_of_targets,
    parse_kind_ranges,
    parse_ranges,
    preset_names,
    preset_scale,
    scale_from_json,
    scale_to_json,
)
from . import report, sockets
from .arrivals import Node
from .host import block_files, folders

NO_PRESET = "none"
SAVED = "saved: "


class BlockScaleNode(Node):
    """DELTA_R -> DELTA_R with a factor for every layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRABlockScale",
            "\u0394R Block Scale",
            "Strength per kind of block, per part, per stream and per range of blocks, or a preset. Factors that meet "
            "in a layer multiply. Nothing is computed before the result is applied or saved.",
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
                io.Combo.Input(
                    "preset",
                    options=[NO_PRESET, *preset_names(), *(SAVED + name for name in block_files.block_names())],
                    default=NO_PRESET,
                    optional=True,
                    tooltip="Strengths by name; those above multiply with them. Some are for one family only, and the "
                    "node says so. saved: your own, from models/qrlora/blocks.",
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    optional=True,
                    tooltip="A name under which these strengths are saved in models/qrlora/blocks when the node runs, "
                    "to be chosen as a preset after R. Empty: not saved.",
                ),
            ],
            outputs=[sockets.DeltaR.Output(display_name="delta_r", tooltip="The scaled adapter, for Merge and Apply.")],
            search_aliases=["block weight", "layer strength", "qr-lora blocks"],
        )

    @classmethod
    def validate_inputs(cls, preset: str = NO_PRESET) -> bool | str:
        """A saved preset may be newer than the list that the page has."""
        if not isinstance(preset, str) or preset.startswith(SAVED):
            return folders.refusal(block_files.block_path, str(preset).removeprefix(SAVED)) or True
        if preset not in (NO_PRESET, *preset_names()):
            return f"preset is {preset!r:.80}, expected {NO_PRESET}, {', '.join(preset_names())}, or one that is saved"
        return True

    @classmethod
    def fingerprint_inputs(cls, preset: str = NO_PRESET, save_as: str = "", **_: object) -> str:
        """Changes when a saved preset does, and when what was saved is no longer there."""
        seen = []
        chosen, wanted = str(preset), str(save_as).strip()
        for name in (chosen.removeprefix(SAVED) if chosen.startswith(SAVED) else "", wanted):
            if name:
                seen.append(folders.version(block_files.block_path, name.removesuffix(block_files.ENDING)))
        return ":".join(seen)

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
        preset: str = NO_PRESET,
        save_as: str = "",
    ) -> io.NodeOutput:
        family = family_of_targets(target for adapter in delta_r.adapters for target in adapter.targets)
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
            family=family,
        )
        if preset != NO_PRESET and delta_r.terms:
            scale = combined(scale, _preset(preset, delta_r, family))
        scaled = delta_r.block_scaled(scale)
        text = report.block_text(scale, scaled)
        if save_as.strip() and delta_r.terms:
            name, is_new = block_files.write_blocks(save_as, scale_to_json(scale))
            text += f"\nsaved as {name}" if is_new else f"\n{name} is saved already"
        blocks = [
            {"kind": kind, "blocks": factors} for kind, factors in block_factors(scale, scaled.layer_names).items()
        ]
        return io.NodeOutput(scaled, ui={"text": [text], "qrlora_blocks": blocks})


def _preset(preset: str, recipe: MergeRecipe, family: Family | None) -> BlockScale:
    """The strengths that a preset stands for, checked against the adapter's blocks.

    Raises:
        QRLoRAError: there is no such preset, or it is for other blocks.
    """
    names = list(recipe.layer_names)
    if not preset.startswith(SAVED):
        return preset_scale(preset, names, family)
    title = preset.removeprefix(SAVED)
    scale = scale_from_json(block_files.read_blocks(title), title, family)
    try:
        scale.check(names)
    except QRLoRAError as error:
        raise SettingError(f"the saved preset {title!r} is for another adapter: {error}") from error
    return scale


def _ranges_input(name: str, example: str, block: str) -> io.String.Input:
    return io.String.Input(
        name,
        default="",
        placeholder=example,
        tooltip=f"Factors for some {block} blocks, as in '{example}'; blocks that are not named keep 1. Empty: all 1.",
    )
