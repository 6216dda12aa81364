"""Nodes that write adapters and plain LoRAs. Nothing that exists is overwritten, or written twice."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..qrlora_core import (
    Adapter,
    MergeRecipe,
    Saved,
    SettingError,
    WeightSlice,
    merged_adapter,
    own_basis,
    save_once,
    storage_tolerance,
    truncated,
)
from ..qrlora_core.save import AdapterFormat
from . import host, report, sockets
from .arrivals import Node
from .host import folders
from .lora_stack import Entry, stack_entries, stack_input, stack_output, with_file

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class SaveDeltaR(Node):
    """DELTA_R -> file in models/qrlora or models/loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRASaveDeltaR",
            "Save \u0394R Adapter",
            "Writes an adapter or a merge to models/qrlora, or to models/loras, where every LoRA loader finds it. A "
            "name that is taken gets a number, unless that file holds the same already.",
            inputs=[
                sockets.DeltaR.Input("delta_r", tooltip="From Load \u0394R Adapter or Merge \u0394R."),
                filename_input("merged", "the folder"),
                io.Combo.Input(
                    "format",
                    options=["portable", "published"],
                    default="portable",
                    tooltip="portable: any LoRA loader can apply it too. published: as the research scripts write it.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Only for 'published', when the adapter does not hold base R: the model it was trained on.",
                ),
                _dtype_input("as it is", "as it is: nothing is rounded. bfloat16 and float16 halve the file."),
                io.Combo.Input(
                    "folder",
                    options=[label for label, kind in folders.PLACES.items() if kind],
                    default="models/qrlora",
                    optional=True,
                    tooltip="models/qrlora: for Load \u0394R Adapter. models/loras: for ComfyUI's Load LoRA, LoRA "
                    "managers and Load LoRA as \u0394R; a portable file is an ordinary LoRA too.",
                ),
                stack_input("The stack that lora_stack goes on from, from a LoRA stacker."),
            ],
            outputs=[
                io.String.Output(display_name="filename", tooltip="Name of the file inside the folder."),
                stack_output("lora_stack with the new file at strength 1, when it was saved to models/loras."),
            ],
            is_output_node=True,
            search_aliases=["save adapter"],
        )

    @classmethod
    def execute(
        cls,
        delta_r: MergeRecipe,
        filename: str,
        format: AdapterFormat,
        model: Any = None,
        dtype: str = "as it is",
        folder: str = "models/qrlora",
        lora_stack: Any = None,
    ) -> io.NodeOutput:
        kind = folders.PLACES[folder]
        stack = list(stack_entries(lora_stack))  # first: nothing is written for a wrong stack
        if kind == folders.LORAS and format == "published":
            raise SettingError("a published file is no LoRA: save it to models/qrlora, or choose the format portable")
        adapter = merged_adapter(delta_r, progress=host.interruptible)
        base_r = _base_r_of(model, adapter) if model is not None else None
        saved = save_once(
            adapter, folders.save_folder(kind), filename,
            format=format, base_r=base_r, dtype=DTYPES.get(dtype), progress=host.interruptible,
        )  # fmt: skip
        note = "" if not stack or kind == folders.LORAS else "not in lora_stack: LoRA loaders look into models/loras"
        return saved_output(saved, kind, note, stack)


class ExportLoRA(Node):
    """DELTA_R -> standard LoRA in models/loras, and in a stack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAExportLoRA",
            "Export as LoRA",
            "Writes an adapter or a merge as a standard LoRA to models/loras, for ComfyUI's own Load LoRA, diffusers "
            "and others. In float32 it changes the model exactly as Apply QR-LoRA does. What is there already is not "
            "written again.",
            inputs=[
                sockets.DeltaR.Input("delta_r", tooltip="From Load \u0394R Adapter or Merge \u0394R."),
                filename_input("qr_lora", "models/loras"),
                _dtype_input(
                    "bfloat16",
                    "bfloat16: half the size, the update rounded by about 0.2 %. float32: exactly what Apply does.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    tooltip="0: all columns. Otherwise the best approximation with so many; what is lost is reported.",
                ),
                stack_input("The stack that lora_stack goes on from, from a LoRA stacker."),
            ],
            outputs=[
                io.String.Output(display_name="filename", tooltip="Name of the file inside models/loras."),
                stack_output("lora_stack with the new file at strength 1."),
            ],
            is_output_node=True,
            search_aliases=["save lora", "export delta r", "convert adapter"],
        )

    @classmethod
    def execute(
        cls, delta_r: MergeRecipe, filename: str, dtype: str = "bfloat16", rank: int = 0, lora_stack: Any = None
    ) -> io.NodeOutput:
        stack, note = stack_entries(lora_stack), ""
        adapter = merged_adapter(delta_r, progress=host.interruptible)
        if rank:
            adapter, lost = truncated(adapter, rank, host.with_progress)
            note = f"rank {adapter.rank}: {100 * lost:.2g} % of the energy left out"
        folder = folders.save_folder(folders.LORAS)
        saved = save_once(adapter, folder, filename, dtype=DTYPES.get(dtype), progress=host.interruptible)
        return saved_output(saved, folders.LORAS, note, stack)


def filename_input(default: str, folder: str) -> Any:
    """The name that a file gets."""
    return io.String.Input(
        "filename", default=default, tooltip=f"A name inside {folder}; sub-folders are allowed: styles/ink."
    )


def _dtype_input(default: str, tooltip: str) -> Any:
    """How numbers are stored; optional, so that graphs saved by older versions keep working."""
    options = ["as it is", *DTYPES]
    return io.Combo.Input("dtype", options=options, default=default, optional=True, tooltip=tooltip)


def saved_output(saved: Saved, kind: str, note: str = "", stack: Sequence[Entry] | None = None) -> io.NodeOutput:
    """Name and report of a file that was written, and for nodes that hand on a stack, the stack with it.

    The page makes its lists of files anew when it reads `qrlora_saved`.
    """
    folders.forget_names(kind)
    name = saved.path.relative_to(folders.save_folder(kind).resolve()).as_posix()
    text = report.saved_text(saved, name, folders.spoken(kind)) + (f"\n{note}" if note else "")
    results: list[Any] = [name]
    if stack is not None:
        results.append(with_file(stack, name) if kind == folders.LORAS else list(stack))
    return io.NodeOutput(*results, ui={"text": [text], "qrlora_saved": [saved.is_new]})


def _base_r_of(model: Any, adapter: Adapter) -> Callable[[str], Tensor]:
    """Base R per layer from the model that an adapter was trained on."""
    places: dict[str, WeightSlice] = host.place_layers(model, adapter.targets)

    def base_r(name: str) -> Tensor:
        weight, stored = host.own_weight(model, places[name])
        return own_basis(adapter, name, weight, storage_tolerance(stored, adapter.layers[name].dtype)).r.cpu()

    return base_r
