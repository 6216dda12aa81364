"""Apply: an adapter or a merge onto a model."""

from typing import Any

from comfy_api.latest import io

from ..qrlora_core import NOTHING, MergeRecipe, Residual
from . import sockets
from .arrivals import Node
from .host.application import MODES, Mode, apply_recipe


class Apply(Node):
    """MODEL and DELTA_R -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAApply",
            "Apply QR-LoRA",
            "Patches a model with an adapter or a merge. Works before and after other LoRAs and on fp8 bases. "
            "Stops with an error when a layer of the adapter is not in the model.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the adapters are for, with or without other LoRAs."),
                sockets.delta_r_input("delta_r", "From Load \u0394R Adapter or Merge \u0394R."),
                sockets.strength_input("strength", "A factor for the whole adapter or merge."),
                sockets.Residual.Input(
                    "residual",
                    optional=True,
                    tooltip="Not needed. With one, the adapted layers are restored from W_res + Q R, in its precision.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    optional=True,
                    tooltip="patch: changes weights when they are loaded. live: computes beside them at every step; "
                    "turning a strength costs nothing, and quantised weights are not rounded again. auto: live where "
                    "weights are quantised, the model does not fit, or strengths follow a schedule or the prompt.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The patched model, for a sampler.")],
            search_aliases=["qr-lora apply", "apply delta r"],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        strength: float,
        delta_r: MergeRecipe = NOTHING,
        residual: Residual | None = None,
        mode: Mode = "auto",
    ) -> io.NodeOutput:
        patched, text = apply_recipe(model, delta_r, strength, residual, mode)
        return io.NodeOutput(patched, ui={"text": [text]})
