"""Nodes that write files: adapters, plain LoRAs, residuals. Nothing that exists is overwritten, or written twice."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..qrlora_core import (
    Adapter,
    BasisMismatchError,
    LayerTarget,
    MergeRecipe,
    Saved,
    SettingError,
    WeightSlice,
    decompose,
    free_name,
    merged_adapter,
    own_basis,
    residual_weight,
    save_once,
    storage_tolerance,
    truncated,
    write_residual,
)
from ..qrlora_core.save import AdapterFormat
from . import host, report, sockets
from .arrivals import Node
from .host import folders
from .lora_stack import Entry, stack_entries, stack_input, stack_output, with_file

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
                _filename("merged", "the folder"),
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
            format=format, base_r=base_r, dtype=_DTYPES.get(dtype), progress=host.interruptible,
        )  # fmt: skip
        note = "" if not stack or kind == folders.LORAS else "not in lora_stack: LoRA loaders look into models/loras"
        return _saved(saved, kind, note, stack)


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
                _filename("qr_lora", "models/loras"),
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
        saved = save_once(adapter, folder, filename, dtype=_DTYPES.get(dtype), progress=host.interruptible)
        return _saved(saved, folders.LORAS, note, stack)


class SaveResidual(Node):
    """MODEL -> residual file in models/qrlora."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRASaveResidual",
            "Save FLUX Residual",
            "Writes W_res = W - Q R of every adapted layer (10-21 GB for FLUX.1), layer by layer. With an adapter its "
            "own Q and R are used; without, every weight is decomposed exactly, which takes minutes on a GPU and an "
            "hour or more on a CPU.",
            inputs=[
                io.Model.Input("model", tooltip="The base model, straight from its loader: no LoRAs."),
                io.Int.Input(
                    "rank", default=64, min=1, max=3072, tooltip="Rank of the decomposition; not used with an adapter."
                ),
                sockets.DeltaR.Input(
                    "delta_r", optional=True, tooltip="Use this adapter's own Q and R instead of decomposing."
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(_DTYPES),
                    default="float32",
                    tooltip="float32 is exact and takes 21 GB for FLUX.1; float16 takes half.",
                ),
                _filename("flux_residual", "models/qrlora"),
            ],
            outputs=[io.String.Output(display_name="filename", tooltip="Name of the file inside models/qrlora.")],
            is_output_node=True,
            search_aliases=["qr-lora residual"],
            category=sockets.ADVANCED,
        )

    @classmethod
    def execute(
        cls, model: Any, rank: int, dtype: str, filename: str, delta_r: MergeRecipe | None = None
    ) -> io.NodeOutput:
        path = free_name(folders.save_folder(), filename)
        adapter = None if delta_r is None else _one_basis(delta_r)
        targets = host.published_layers(model) if adapter is None else adapter.targets
        places = host.place_layers(model, targets)
        host.require_unpatched(model, places.values())

        def residual_of(name: str) -> Tensor:
            weight, stored = host.own_weight(model, places[name])
            weight = weight.to(host.load_device(model))
            if adapter is None:
                return residual_weight(weight, decompose(weight, rank, method="exact"), 1.0)
            basis = own_basis(adapter, name, weight, storage_tolerance(stored, adapter.layers[name].dtype))
            return residual_weight(weight, basis, adapter.layers[name].scaling)

        metadata = {"qrlora.format": "residual", "qrlora.rank": str(rank if adapter is None else adapter.rank)}
        if adapter is not None and adapter.basis_fingerprint:
            metadata["qrlora.basis_fingerprint"] = adapter.basis_fingerprint
        write_residual(path, targets, _stepwise(targets, residual_of), dtype=_DTYPES[dtype], metadata=metadata)
        return _saved(Saved(path, True, 1), folders.FOLDER)


def _filename(default: str, folder: str) -> Any:
    return io.String.Input(
        "filename", default=default, tooltip=f"A name inside {folder}; sub-folders are allowed: styles/ink."
    )


def _dtype_input(default: str, tooltip: str) -> Any:
    """How numbers are stored; optional, so that graphs saved by older versions keep working."""
    options = ["as it is", *_DTYPES]
    return io.Combo.Input("dtype", options=options, default=default, optional=True, tooltip=tooltip)


def _saved(saved: Saved, kind: str, note: str = "", stack: Sequence[Entry] | None = None) -> io.NodeOutput:
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


def _stepwise(targets: tuple[LayerTarget, ...], residual_of: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """`residual_of`, under the progress bar and stopped by Cancel; the layers are asked for in order, once each."""
    steps: Iterator[LayerTarget] = host.with_progress(targets)

    def next_residual(name: str) -> Tensor:
        next(steps)
        return residual_of(name)

    return next_residual


def _one_basis(recipe: MergeRecipe) -> Adapter:
    """The adapter whose Q and R a residual is made for; a merge will do when all of it lies on one basis."""
    prints = {adapter.basis_fingerprint for adapter in recipe.adapters}
    if len(prints) > 1 or None in prints:
        raise BasisMismatchError(
            "a residual belongs to one basis: connect a single adapter that holds its Q (a full-QR file does not)"
        )
    return recipe.adapters[0]


def _base_r_of(model: Any, adapter: Adapter) -> Callable[[str], Tensor]:
    """Base R per layer from the model that an adapter was trained on."""
    places: dict[str, WeightSlice] = host.place_layers(model, adapter.targets)

    def base_r(name: str) -> Tensor:
        weight, stored = host.own_weight(model, places[name])
        return own_basis(adapter, name, weight, storage_tolerance(stored, adapter.layers[name].dtype)).r.cpu()

    return base_r
