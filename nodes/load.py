"""Nodes that read files: adapters and residuals."""

from comfy_api.latest import io

from ..qrlora_core import MergeRecipe, Residual, open_adapter
from . import report, sockets
from .arrivals import Node
from .host import folders


class LoadDeltaR(Node):
    """File -> DELTA_R."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRALoadDeltaR",
            "Load \u0394R Adapter",
            "Opens a QR-LoRA adapter: published (q, delta_r, base_r), portable, or full QR. "
            "Files come from models/qrlora and output/qrlora.",
            inputs=[
                io.Combo.Input(
                    "delta_r_name",
                    options=folders.file_names(residuals=False),
                    tooltip="A file in models/qrlora or output/qrlora. A plain LoRA belongs into Load LoRA as \u0394R.",
                )
            ],
            outputs=[sockets.DeltaR.Output(display_name="delta_r", tooltip="The adapter, for Merge, Apply and Save.")],
            search_aliases=["qr-lora", "load qr lora", "delta r"],
        )

    @classmethod
    def validate_inputs(cls, delta_r_name: str) -> bool | str:
        return folders.refusal(folders.find_file, delta_r_name) or True

    @classmethod
    def fingerprint_inputs(cls, delta_r_name: str) -> str:
        return folders.version(folders.find_file, delta_r_name)

    @classmethod
    def execute(cls, delta_r_name: str) -> io.NodeOutput:
        adapter = open_adapter(folders.find_file(delta_r_name))
        return io.NodeOutput(MergeRecipe.of(adapter), ui={"text": [report.adapter_text(adapter)]})


class LoadResidual(Node):
    """File -> RESIDUAL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRALoadResidual",
            "Load FLUX Residual",
            "Opens a residual file (W_res, 10-21 GB) without reading it into memory. Optional: Apply QR-LoRA needs no "
            "residual. It gives an fp8 model the residual's precision on the adapted layers.",
            inputs=[
                io.Combo.Input(
                    "residual_name",
                    options=folders.file_names(residuals=True),
                    tooltip="A file with <layer>.residual.weight tensors in models/qrlora or output/qrlora.",
                )
            ],
            outputs=[sockets.Residual.Output(display_name="residual", tooltip="For Apply QR-LoRA.")],
            search_aliases=["qr-lora residual"],
            category=sockets.ADVANCED,
        )

    @classmethod
    def validate_inputs(cls, residual_name: str) -> bool | str:
        return folders.refusal(folders.find_file, residual_name) or True

    @classmethod
    def fingerprint_inputs(cls, residual_name: str) -> str:
        return folders.version(folders.find_file, residual_name)

    @classmethod
    def execute(cls, residual_name: str) -> io.NodeOutput:
        residual = Residual(folders.find_file(residual_name))
        return io.NodeOutput(residual, ui={"text": [report.residual_text(residual)]})
