"""Nodes in the middle of a graph: merge adapters, apply them to a model."""

from typing import Any

from comfy_api.latest import io

from ..qrlora_core import MergeRecipe, Residual, merge, merge_report
from . import report, sockets
from .apply import patch_model


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


class Apply(io.ComfyNode):
    """MODEL and DELTA_R -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAApply",
            "Apply QR-LoRA",
            "Patches a FLUX model with an adapter or a merge. Works before and after other LoRAs and on fp8 bases. "
            "Stops with an error when a layer of the adapter is not in the model.",
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.1 model, with or without other LoRAs."),
                sockets.DeltaR.Input("delta_r", tooltip="From Load \u0394R Adapter or Merge \u0394R."),
                sockets.strength_input("strength", "A factor for the whole adapter or merge."),
                sockets.Residual.Input(
                    "residual",
                    optional=True,
                    tooltip="Not needed. With one, the adapted layers are restored from W_res + Q R, in its precision.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The patched model, for a sampler.")],
            search_aliases=["qr-lora apply", "apply delta r"],
        )

    @classmethod
    def execute(
        cls, model: Any, delta_r: MergeRecipe, strength: float, residual: Residual | None = None
    ) -> io.NodeOutput:
        patched, text = patch_model(model, delta_r, strength, residual)
        return io.NodeOutput(patched, ui={"text": [text]})
