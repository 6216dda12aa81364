"""Nodes that bring ordinary LoRA files in: one file, or a stack that another node made."""

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..qrlora_core import NOTHING, OTHER_PARTS, MergeRecipe, OpenedLora, OtherParts, lora_text, open_lora
from . import report, sockets
from .arrivals import Node
from .host import folders, with_progress, work_device
from .lora_stack import LoraStack, stack_entries, stack_output


class LoadLoRA(Node):
    """File in models/loras -> DELTA_R."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRALoadLoRA",
            "Load LoRA as \u0394R",
            "Opens an ordinary LoRA (kohya, diffusers, ai-toolkit, SimpleTuner, OneTrainer, XLabs, LoCon) as a \u0394R "
            "adapter: B A = Q \u0394R with an orthonormal Q, exactly. Merge, sweep, block scale, schedules, similarity "
            "and export then work on it, whatever model it is for.",
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=folders.lora_names(),
                    tooltip="A file in models/loras. Its text encoder part, if any, is reported and left to Load LoRA.",
                ),
                *_settings(),
            ],
            outputs=[sockets.DeltaR.Output(display_name="delta_r", tooltip="The LoRA, for Merge, Apply and Save.")],
            search_aliases=["lora loader", "load lora", "any lora", "lora merge"],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str) -> bool | str:
        return folders.refusal(folders.lora_file, lora_name) or True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, rank: int = 0, other_parts: str = "refuse") -> str:
        return f"{folders.version(folders.lora_file, lora_name)}:{rank}:{other_parts}"

    @classmethod
    def execute(cls, lora_name: str, rank: int = 0, other_parts: OtherParts = "refuse") -> io.NodeOutput:
        opened = _opened(folders.lora_file(lora_name), rank, other_parts)
        ours = "qrlora.method" in opened.adapter.metadata
        text = "\n".join([report.adapter_text(opened.adapter, with_basis=ours), *lora_text(opened)])
        return io.NodeOutput(MergeRecipe.of(opened.adapter), ui={"text": [text]})


class FromLoRAStack(Node):
    """LORA_STACK -> DELTA_R, and a stack of what is left for the text encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAFromLoRAStack",
            "LoRA Stack to \u0394R",
            "Turns the stack of a LoRA stacker, Lora Manager or Efficiency node into one \u0394R: every file at its "
            "model strength. Text encoder parts come out as a stack, for the node that applies stacks.",
            inputs=[
                LoraStack.Input("lora_stack", tooltip="A list of (file, model strength, CLIP strength)."),
                *_settings(),
            ],
            outputs=[
                sockets.DeltaR.Output(display_name="delta_r", tooltip="All of them, for Merge, Apply and Save."),
                stack_output(
                    "The files that also change text encoders, at their CLIP strength and model strength 0: for the "
                    "Apply LoRA Stack of the stack's own pack."
                ),
            ],
            search_aliases=["lora stack", "lora stacker"],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_stack: Any = None, rank: int = 0, other_parts: str = "refuse") -> str:
        names = [entry[0] for entry in lora_stack or () if isinstance(entry, list | tuple) and entry]
        return ":".join([*(folders.version(folders.lora_file, str(name)) for name in names), str(rank), other_parts])

    @classmethod
    def execute(cls, lora_stack: Any, rank: int = 0, other_parts: OtherParts = "refuse") -> io.NodeOutput:
        recipe, texts, lines = NOTHING, [], []
        for name, strength, clip in stack_entries(lora_stack):
            opened = _opened(folders.lora_file(name), rank, other_parts)
            recipe = MergeRecipe(recipe.terms + MergeRecipe.of(opened.adapter, strength).terms)
            lines.append(f"{strength:g} x {name}: {len(opened.adapter.layers)} layers, {'; '.join(lora_text(opened))}")
            if clip and opened.text_encoder:
                texts.append((name, 0.0, clip))
                lines.append(f"{name}: CLIP strength {clip:g} is in the stack that goes on")
        return io.NodeOutput(recipe, texts, ui={"text": ["\n".join(lines) or "the stack is empty"]})


def _settings() -> list[Any]:
    return [
        sockets.advanced(
            io.Int.Input,
            "rank",
            default=0,
            min=0,
            max=1024,
            optional=True,
            tooltip="For files that are not low-rank (LoHa, LoKr, whole differences): the best approximation of this "
            "rank is taken, and what it loses is reported. 0: such files are refused. Ordinary LoRAs are always exact.",
        ),
        sockets.advanced(
            io.Combo.Input,
            "other_parts",
            options=list(OTHER_PARTS),
            default="refuse",
            optional=True,
            tooltip="Files that also change biases, norms or sizes (BFL's Canny and Depth LoRAs): refuse, or leave "
            "those parts out and say how many.",
        ),
    ]


def _opened(path: Path, rank: int, other_parts: OtherParts) -> OpenedLora:
    return open_lora(path, rank=rank, other_parts=other_parts, device=work_device(), progress=with_progress)
