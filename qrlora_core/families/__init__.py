"""Model families: one file each, data only (`record.py` says what), and `lookup.py`, which finds layers in them."""

from .flux import DOUBLE_TARGETS, FLUX, SINGLE_TARGETS, flux_targets
from .krea2 import KREA2
from .lookup import (
    FAMILIES,
    OTHER,
    LayerKind,
    TableEntry,
    cut,
    family_of,
    family_of_targets,
    find,
    has_layer,
    is_known,
    layer_kind,
    likely_families,
    native_layers,
    native_place,
    network_order,
    published_layers,
)
from .record import BlockKind, Family, Layer, Preset
from .sd3 import SD3
from .sdxl import SDXL

__all__ = [
    "DOUBLE_TARGETS",
    "FAMILIES",
    "FLUX",
    "KREA2",
    "OTHER",
    "SD3",
    "SDXL",
    "SINGLE_TARGETS",
    "BlockKind",
    "Family",
    "Layer",
    "LayerKind",
    "Preset",
    "TableEntry",
    "cut",
    "family_of",
    "family_of_targets",
    "find",
    "flux_targets",
    "has_layer",
    "is_known",
    "layer_kind",
    "likely_families",
    "native_layers",
    "native_place",
    "network_order",
    "published_layers",
]
