"""Save FLUX Residual: what a model holds beside the Q R of an adapter or of its own decomposition."""

from collections.abc import Callable, Iterator
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..qrlora_core import (
    Adapter,
    BasisMismatchError,
    LayerTarget,
    MergeRecipe,
    Saved,
    decompose,
    free_name,
    own_basis,
    residual_weight,
    storage_tolerance,
    write_residual,
)
from . import host, sockets
from .arrivals import Node
from .host import folders
from .save import DTYPES, filename_input, saved_output


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
                    options=list(DTYPES),
                    default="float32",
                    tooltip="float32 is exact and takes 21 GB for FLUX.1; float16 takes half.",
                ),
                filename_input("flux_residual", "models/qrlora"),
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
        write_residual(path, targets, _stepwise(targets, residual_of), dtype=DTYPES[dtype], metadata=metadata)
        return saved_output(Saved(path, True, 1), folders.FOLDER)


def _one_basis(recipe: MergeRecipe) -> Adapter:
    """The adapter whose Q and R a residual is made for; a merge will do when all of it lies on one basis."""
    prints = {adapter.basis_fingerprint for adapter in recipe.adapters}
    if len(prints) > 1 or None in prints:
        raise BasisMismatchError(
            "a residual belongs to one basis: connect a single adapter that holds its Q (a full-QR file does not)"
        )
    return recipe.adapters[0]


def _stepwise(targets: tuple[LayerTarget, ...], residual_of: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """`residual_of`, under the progress bar and stopped by Cancel; the layers are asked for in order, once each."""
    steps: Iterator[LayerTarget] = host.with_progress(targets)

    def next_residual(name: str) -> Tensor:
        next(steps)
        return residual_of(name)

    return next_residual
