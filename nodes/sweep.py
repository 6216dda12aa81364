"""Many merges at once, and their pictures on one sheet."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..qrlora_core import ACTS, NOTHING, MergeRecipe, OnMismatch, SettingError, contained_path, sweep
from ..qrlora_plots import ContactSheet, array_of, contact_sheet, images_of
from . import report, sockets
from .arrivals import Node
from .host import folders

METADATA = "qr_lora_contact_sheet"


class ScaleSweep(Node):
    """Two DELTA_R -> a list of DELTA_R and a list of labels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAScaleSweep",
            "\u0394R Scale Sweep",
            "Merges two adapters with every pair of an alpha and a beta, and with every schedule. Connect delta_r to "
            "Apply QR-LoRA: ComfyUI then samples once for each. \u0394R Contact Sheet shows all pictures as one.",
            inputs=[
                sockets.delta_r_input("delta_r_style", "The style adapter (or any first one)."),
                _list_input("alphas", "0.6, 0.8, 1.0", "style"),
                sockets.delta_r_input("delta_r_content", "The content adapter (or any second one)."),
                _list_input("betas", "0.6, 0.8, 1.0", "content"),
                sockets.mismatch_input(),
                io.Combo.Input(
                    "act",
                    options=list(ACTS),
                    default="always",
                    optional=True,
                    tooltip="How the two act in each merge, as in Merge \u0394R. By prompt, triggers are those that "
                    "the files state; encode the prompt with QR-LoRA Prompt.",
                ),
                io.String.Input(
                    "schedules",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Empty: constant strengths. Otherwise one schedule in each line, each tried with every "
                    "pair: 'constant', 'content first 0.5', 'fade in', 'style: late', 'style: late | content: early', "
                    "'0: 1, 0.5: 0'.",
                ),
            ],
            outputs=[
                sockets.DeltaR.Output(
                    display_name="delta_r", is_output_list=True, tooltip="One merge for each pair, for Apply QR-LoRA."
                ),
                io.String.Output(
                    display_name="labels", is_output_list=True, tooltip="Their labels, for \u0394R Contact Sheet."
                ),
                io.String.Output(display_name="title", tooltip="What alpha and beta are, for \u0394R Contact Sheet."),
            ],
            search_aliases=["alpha beta grid", "xy plot", "qr-lora sweep"],
        )

    @classmethod
    def execute(
        cls,
        alphas: str,
        betas: str,
        on_basis_mismatch: OnMismatch,
        delta_r_style: MergeRecipe = NOTHING,
        delta_r_content: MergeRecipe = NOTHING,
        act: str = "always",
        schedules: str = "",
    ) -> io.NodeOutput:
        cells = sweep(delta_r_style, alphas, delta_r_content, betas, on_basis_mismatch, act, schedules)
        title = f"alpha: {_names(delta_r_style)}; beta: {_names(delta_r_content)}"
        return io.NodeOutput(
            [cell.recipe for cell in cells],
            [cell.label for cell in cells],
            title,
            ui={"text": [report.sweep_text(cells, act)]},
        )


class ContactSheetNode(Node):
    """A list of IMAGE and a list of labels -> IMAGE and a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAContactSheet",
            "\u0394R Contact Sheet",
            "Puts labelled pictures on one sheet and saves it. Labels from \u0394R Scale Sweep become the axes of a "
            "grid; any other labels are written below their pictures.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures, as a list or as one batch."),
                io.String.Input(
                    "labels",
                    optional=True,
                    force_input=True,
                    tooltip="One for each picture: a list from \u0394R Scale Sweep, or a text with one in each line. "
                    "Without any, the pictures are numbered.",
                ),
                io.Int.Input(
                    "columns", default=0, min=0, max=100, tooltip="Pictures in a row; 0 chooses. Not used with axes."
                ),
                io.Int.Input(
                    "max_size",
                    default=512,
                    min=32,
                    max=4096,
                    tooltip="Longest side of a picture on the sheet in pixels; larger ones are reduced.",
                ),
                io.String.Input("title", default="", tooltip="A line at the top, such as the one of the sweep."),
                io.String.Input(
                    "filename_prefix", default="qr_lora_sheet", tooltip="Name of the file in ComfyUI's output folder."
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="The whole sheet as one picture.")],
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            search_aliases=["grid of images", "xy plot", "image grid", "qr-lora sheet"],
        )

    @classmethod
    def execute(
        cls,
        images: list[torch.Tensor],
        columns: list[int],
        max_size: list[int],
        title: list[str],
        filename_prefix: list[str],
        labels: list[str] | None = None,
    ) -> io.NodeOutput:
        contained_path(folders.output_folder(), filename_prefix[0])  # before any work, and with the reason in words
        pictures = [picture for batch in images for picture in images_of(batch.float().cpu().numpy())]
        names = picture_labels(labels or [], [len(batch) for batch in images])
        sheet = contact_sheet(pictures, names, columns=columns[0], max_size=max_size[0], title=title[0])
        picture = torch.from_numpy(array_of(sheet.image))
        extra = {**(cls.hidden.extra_pnginfo or {}), METADATA: recipe_of(sheet, title[0], cls.hidden)}
        # The host's own writer reads nothing but `hidden` of the class it is given
        holder: Any = SimpleNamespace(hidden=SimpleNamespace(prompt=cls.hidden.prompt, extra_pnginfo=extra))
        saved = ui.ImageSaveHelper.save_images(picture, filename_prefix[0], io.FolderType.output, holder)
        text = report.sheet_text(sheet, saved[0]["filename"])
        return io.NodeOutput(picture, ui={"images": saved, "text": [text]})


def picture_labels(labels: list[str], counts: list[int]) -> list[str]:
    """One label for each picture of batches with so many pictures.

    Raises:
        SettingError: there are neither as many labels as pictures, nor as many as batches.
    """
    total = sum(counts)
    if len(labels) == 1 and total > 1:
        labels = [line for line in labels[0].split("\n") if line.strip()]
    if not any(label.strip() for label in labels):
        return [str(index + 1) for index in range(total)]
    if len(labels) == len(counts) and total != len(labels):
        return [
            f"{label}, picture {index + 1}" if count > 1 else label
            for label, count in zip(labels, counts)
            for index in range(count)
        ]
    if len(labels) != total:
        raise SettingError(f"there are {total} pictures and {len(labels)} labels; give each picture one label")
    return labels


def recipe_of(sheet: ContactSheet, title: str, hidden: Any) -> dict[str, Any]:
    """What a sheet was made of: its axes and cells, and the adapters and seeds that lead to it in the workflow."""
    upstream = list(_upstream(hidden.prompt or {}, str(hidden.unique_id)))
    return {
        "schema": "qr-lora/contact-sheet",
        "version": 1,
        "title": title,
        "rows": list(sheet.row_labels),
        "columns": list(sheet.column_labels),
        "cells": [
            {"row": cell.row, "column": cell.column, "label": cell.label, "values": _values(cell.label)}
            for cell in sheet.cells
        ],
        "adapters": _collected(upstream, ("delta_r_name",)),
        "seeds": _collected(upstream, ("seed", "noise_seed")),
    }


def _upstream(prompt: dict[str, Any], node_id: str) -> Iterator[dict[str, Any]]:
    """The inputs of a node and of everything that leads to it, with linked primitives as their values."""
    waiting, seen = [node_id], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in prompt:
            continue
        seen.add(name)
        inputs = prompt[name].get("inputs", {})
        links = {key: str(value[0]) for key, value in inputs.items() if isinstance(value, list) and len(value) == 2}
        waiting += links.values()
        values = {key: prompt.get(source, {}).get("inputs", {}).get("value") for key, source in links.items()}
        yield {**inputs, **values}


def _collected(nodes: list[dict[str, Any]], keys: tuple[str, ...]) -> list[Any]:
    """Every value of these inputs once."""
    values = [inputs[key] for inputs in nodes for key in keys if inputs.get(key) is not None]
    return sorted(dict.fromkeys(values), key=str)


def _values(label: str) -> dict[str, float | str]:
    """{"alpha": 0.6, "beta": 1.0, "schedule": "late"} of "alpha=0.6, beta=1, schedule=late"; empty for other labels."""
    values: dict[str, float | str] = {}
    for part in label.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name == "schedule" and value:
            values[name] = value
            continue
        try:
            number = float(value)
        except ValueError:
            return {}
        if math.isfinite(number):
            values[name] = number
    return values


def _names(recipe: MergeRecipe) -> str:
    return " + ".join(adapter.name for adapter in recipe.adapters) or "nothing"


def _list_input(name: str, default: str, what: str) -> io.String.Input:
    return io.String.Input(
        name, default=default, tooltip=f"Factors of the {what}: '0.6, 0.8, 1.0', or first:last:step as in '0:1:0.25'."
    )
