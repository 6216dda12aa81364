"""A prompt that tells which text it was made of, so that adapters can act by it."""

from typing import Any

from comfy_api.latest import io

from ..qrlora_core import NOTHING, MergeRecipe, holds, triggers_of
from . import sockets
from .arrivals import Node
from .host.encoders import conditioning_of


class PromptNode(Node):
    """CLIP and text -> CONDITIONING that holds its text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAPrompt",
            "QR-LoRA Prompt",
            "CLIP Text Encode whose conditioning tells its text: a merge that acts by the prompt then knows, for each "
            "prompt of a batch or region, which adapters it asks for. With an adapter connected, it shows which "
            "triggers the text holds.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a <c> dog in <s> style",
                    tooltip="The prompt. A trigger counts in upper and lower case, in brackets and with a weight.",
                ),
                io.Boolean.Input(
                    "insert_triggers",
                    default=False,
                    tooltip="On: triggers of the connected adapters that the text lacks are put at its beginning.",
                ),
                sockets.delta_r_input("delta_r", "The adapter or merge whose triggers are looked for."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="For a sampler, positive or negative."),
                io.String.Output(display_name="text", tooltip="The text that was encoded."),
            ],
            search_aliases=["qr-lora prompt", "trigger", "clip text encode", "prompt gate"],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, insert_triggers: bool, delta_r: MergeRecipe = NOTHING) -> io.NodeOutput:
        triggers = list(dict.fromkeys(trigger for adapter in delta_r.adapters for trigger in triggers_of(adapter)))
        if insert_triggers:
            text = " ".join([*(trigger for trigger in triggers if not holds(text, trigger)), text])
        return io.NodeOutput(conditioning_of(clip, text), text, ui={"text": [_report(text, triggers)]})


def _report(text: str, triggers: list[str]) -> str:
    """Which triggers a prompt holds."""
    if not triggers:
        return "no adapter connected, or its file states no trigger"
    held = [trigger for trigger in triggers if holds(text, trigger)]
    missing = [trigger for trigger in triggers if trigger not in held]
    lines = [f"holds {', '.join(held)}"] if held else []
    lines += [f"lacks {', '.join(missing)}: where a merge acts by the prompt, those stay off"] if missing else []
    return "\n".join(lines)
