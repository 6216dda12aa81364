"""What all nodes share: socket types, the category, and schemas that older hosts understand too."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

CATEGORY = "QR-LoRA"
ADVANCED = f"{CATEGORY}/advanced"

# A list of types connects to whatever has one of them, at both ends and on every host: the names without the prefix are
# in graphs that were saved before it, on subgraphs' sockets, and on nodes of other packs.
DeltaR = io.Custom("QRLORA_DELTA_R,DELTA_R")
Residual = io.Custom("QRLORA_RESIDUAL,RESIDUAL")
TrainOptions = io.Custom("QRLORA_TRAIN_OPTIONS")


def schema(
    node_id: str, display_name: str, description: str, *, search_aliases: Sequence[str] = (), **fields: Any
) -> io.Schema:
    """An `io.Schema`, in our category unless another is given. Fields that this host does not know are left out.

    Args:
        node_id, display_name, description: as the host shows them.
        search_aliases: other words that find the node. The title in letters that a keyboard has ("Merge delta R") and
            "qr-lora" are among them for every node.
        fields: the rest of `io.Schema`.
    """
    typed = display_name.replace("\u0394R", "delta R")
    fields["search_aliases"] = list(dict.fromkeys([typed, "qr-lora delta r", *search_aliases]))
    known_fields = {field.name for field in dataclasses.fields(io.Schema)}
    fields = {name: value for name, value in fields.items() if name in known_fields}
    fields = {"category": CATEGORY, **fields}
    return io.Schema(node_id=node_id, display_name=display_name, description=description, **fields)


def newest(kind: Any, name: str, **fields: Any) -> Any:
    """An input of a kind such as `io.Combo.Input`, without the arguments that this host's version does not know."""
    parameters = inspect.signature(kind).parameters
    return kind(name, **{key: value for key, value in fields.items() if key in parameters})


def advanced(kind: Any, name: str, **fields: Any) -> Any:
    """An input that the page may keep out of sight until it is asked for, where the host can do that."""
    return newest(kind, name, advanced=True, **fields)


def delta_r_input(name: str, tooltip: str) -> Any:
    """An adapter or a merge. Optional, so that one that is bypassed or muted counts as nothing and the rest runs."""
    return DeltaR.Input(name, optional=True, tooltip=f"{tooltip} Left empty, bypassed or muted: counts as nothing.")


def strength_input(name: str, tooltip: str) -> Any:
    """A factor from -4 to 4 in steps of 0.01, 1 by default."""
    return io.Float.Input(name, default=1.0, min=-4.0, max=4.0, step=0.01, tooltip=tooltip)


def mismatch_input() -> Any:
    """What a merge does when bases differ."""
    return io.Combo.Input(
        "on_basis_mismatch",
        options=["stack", "align", "raise"],
        default="stack",
        tooltip="When the two were trained on different bases. stack: exact, the ranks add up. align: "
        "write content on the style's basis, keeps the rank and says how much is lost. raise: stop.",
    )
