"""Merge: two adapters or merges become one."""

from comfy_api.latest import io

from ..qrlora_core import ACTS, NOTHING, MergeRecipe, OnMismatch, Triggers, merge_acting, merge_report
from . import host, report, sockets
from .arrivals import Node


class Merge(Node):
    """Two DELTA_R -> DELTA_R."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAMerge",
            "Merge \u0394R",
            "alpha * style + beta * content. The output merges again, so any number of adapters can be combined. "
            "Nothing is computed before the result is applied or saved.",
            inputs=[
                sockets.delta_r_input("delta_r_style", "The style adapter (or any first one)."),
                sockets.strength_input("alpha", "How much style. 0.9 to 1.0 is usual; 0 switches it off."),
                sockets.delta_r_input("delta_r_content", "The content adapter (or any second one)."),
                sockets.strength_input("beta", "How much content. 0.9 to 1.0 is usual; 0 switches it off."),
                sockets.mismatch_input(),
                io.Combo.Input(
                    "act",
                    options=list(ACTS),
                    default="always",
                    optional=True,
                    tooltip="always: both act everywhere. by prompt: each acts only on prompts that hold its trigger. "
                    "by prompt, content first: and where both are asked for, content acts first and style after it. "
                    "one pass each: the model is asked once for each adapter and their predictions are added, so that "
                    "neither draws over the other; up to 3 times the work in each step.",
                ),
                io.Float.Input(
                    "switch",
                    default=0.5,
                    min=0.01,
                    max=0.99,
                    step=0.01,
                    optional=True,
                    tooltip="For 'content first': the sigma (1 noise, 0 picture) at which style takes over.",
                ),
                io.String.Input(
                    "style_trigger",
                    default="",
                    optional=True,
                    tooltip="Words that call the style, separated by commas. Empty: those that its file states.",
                ),
                io.String.Input(
                    "content_trigger",
                    default="",
                    optional=True,
                    tooltip="Words that call the content, separated by commas. Empty: those that its file states.",
                ),
                io.String.Input(
                    "prompt",
                    optional=True,
                    force_input=True,
                    tooltip="The positive prompt's text, where it is not encoded by QR-LoRA Prompt. The negative "
                    "prompt is then taken to hold no trigger.",
                ),
            ],
            outputs=[sockets.DeltaR.Output(display_name="delta_r", tooltip="The merge, for Apply, Save or Merge.")],
            search_aliases=["qr-lora merge", "style content merge"],
        )

    @classmethod
    def execute(
        cls,
        alpha: float,
        beta: float,
        on_basis_mismatch: OnMismatch,
        delta_r_style: MergeRecipe = NOTHING,
        delta_r_content: MergeRecipe = NOTHING,
        act: str = "always",
        switch: float = 0.5,
        style_trigger: str = "",
        content_trigger: str = "",
        prompt: str | None = None,
    ) -> io.NodeOutput:
        merged = merge_acting(
            delta_r_style,
            alpha,
            delta_r_content,
            beta,
            act=act,
            switch=switch,
            triggers=Triggers(style_trigger, content_trigger),
            prompt=prompt,
            on_basis_mismatch=on_basis_mismatch,
        )
        missing = [
            name for name, recipe in (("style", delta_r_style), ("content", delta_r_content)) if not recipe.terms
        ]
        done = merge_report(merged, host.interruptible)
        return io.NodeOutput(merged, ui={"text": [report.merge_text(merged, done, missing)]})
