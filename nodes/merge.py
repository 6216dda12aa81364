"""Merge: two adapters or merges become one."""

from comfy_api.latest import io

from ..qrlora_core import MergeRecipe, merge, merge_report
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
                sockets.DeltaR.Input("delta_r_style", tooltip="The style adapter (or any first one)."),
                sockets.strength_input("alpha", "How much style. 0.9 to 1.0 is usual; 0 switches it off."),
                sockets.DeltaR.Input("delta_r_content", tooltip="The content adapter (or any second one)."),
                sockets.strength_input("beta", "How much content. 0.9 to 1.0 is usual; 0 switches it off."),
                sockets.mismatch_input(),
            ],
            outputs=[sockets.DeltaR.Output(display_name="delta_r", tooltip="The merge, for Apply, Save or Merge.")],
            search_aliases=["qr-lora merge", "style content merge"],
        )

    @classmethod
    def execute(
        cls, delta_r_style: MergeRecipe, alpha: float, delta_r_content: MergeRecipe, beta: float, on_basis_mismatch: str
    ) -> io.NodeOutput:
        merged = merge(delta_r_style, alpha, delta_r_content, beta, on_basis_mismatch)
        return io.NodeOutput(merged, ui={"text": [report.merge_text(merged, merge_report(merged))]})
