"""Merge: two adapters or merges become one."""

from comfy_api.latest import io

from ..qrlora_core import NOTHING, MergeRecipe, OnMismatch, merge, merge_report
from . import report, sockets


class Merge(io.ComfyNode):
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
    ) -> io.NodeOutput:
        merged = merge(delta_r_style, alpha, delta_r_content, beta, on_basis_mismatch)
        missing = [name for name, one in (("style", delta_r_style), ("content", delta_r_content)) if not one.terms]
        return io.NodeOutput(merged, ui={"text": [report.merge_text(merged, merge_report(merged), missing)]})
