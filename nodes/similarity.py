"""Two adapters side by side: a picture and numbers."""

import json
import logging

import torch
from comfy_api.latest import io, ui

from ..qrlora_core import MergeRecipe, SimilarityReport, merged_adapter, similarity_report
from ..qrlora_plots import PlotsUnavailableError, array_of, similarity_image, text_card
from . import host, report, sockets
from .arrivals import Node

log = logging.getLogger(__name__)


class Similarity(Node):
    """Two DELTA_R -> IMAGE, STRING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRASimilarity",
            "\u0394R Similarity",
            "Compares two adapters or merges layer by layer: cosine of the updates, of \u0394R, Q and R, principal "
            "angles, sizes and signs, against what chance alone would give. A picture and all numbers as JSON.",
            inputs=[
                sockets.DeltaR.Input("delta_r_a", tooltip="One adapter or merge."),
                sockets.DeltaR.Input("delta_r_b", tooltip="The other one."),
                io.Boolean.Input(
                    "fixed_scale",
                    default=True,
                    tooltip="On: cosines from -1 to 1, so that pictures can be compared. Off: each axis fits its "
                    "values, which shows small cosines.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="All plots as one picture, 1600 x 2300 pixels."),
                io.String.Output(display_name="json", tooltip="Every number; the help page explains the keys."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            search_aliases=["qr-lora similarity", "compare adapters", "cosine similarity"],
        )

    @classmethod
    def execute(cls, delta_r_a: MergeRecipe, delta_r_b: MergeRecipe, fixed_scale: bool) -> io.NodeOutput:
        a, b = (merged_adapter(recipe, progress=host.interruptible) for recipe in (delta_r_a, delta_r_b))
        comparison = similarity_report(a, b, host.with_progress)
        lines = [report.similarity_text(comparison)]
        picture, missing = _picture(comparison, lines, fixed_scale)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        numbers = json.dumps(comparison, allow_nan=False, indent=1)
        return io.NodeOutput(picture, numbers, ui={**shown, "text": missing + lines})


def _picture(comparison: SimilarityReport, lines: list[str], fixed_scale: bool) -> tuple[torch.Tensor, list[str]]:
    """The plots, or the numbers as text where they cannot be drawn; and what to say about that."""
    try:
        return torch.from_numpy(array_of(similarity_image(comparison, fixed_scale=fixed_scale))), []
    except PlotsUnavailableError as error:
        log.warning("QR-LoRA: %s", error)
        text = [line for part in (str(error), "", *lines) for line in part.split("\n")]
        return torch.from_numpy(array_of(text_card(text))), [str(error)]
