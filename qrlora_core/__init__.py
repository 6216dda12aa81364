"""The mathematics and the files of QR-LoRA: torch, safetensors and numpy, without ComfyUI or diffusers."""

__version__ = "0.1.0"

from .adapter import METHODS, Adapter, AdapterLayer, LayerInfo
from .cache import CacheItem, EncodedPicture, EncodedText, TrainingCache, bucket_size, save_cache
from .errors import BasisMismatchError, FileFormatError, PathError, QRLoRAError, TargetError, WeightError
from .formats import file_kind, open_adapter
from .linalg import Basis, base_r, core_energy, decompose, residual_weight, restored_weight
from .merge import MergeRecipe, MergeReport, Term, merge, merge_report, merged_adapter
from .residual import Residual, match_residual, storage_tolerance, value_dtype, write_residual
from .save import open_basis, save_adapter, save_basis
from .storage import TensorFile, contained_path, free_name, model_fingerprint
from .targets import LayerTarget, WeightSlice, comfy_slice, flux_targets, layer_names, match_targets

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterLayer",
    "Basis",
    "BasisMismatchError",
    "CacheItem",
    "EncodedPicture",
    "EncodedText",
    "FileFormatError",
    "LayerInfo",
    "LayerTarget",
    "MergeRecipe",
    "MergeReport",
    "PathError",
    "QRLoRAError",
    "Residual",
    "TargetError",
    "TensorFile",
    "Term",
    "TrainingCache",
    "WeightError",
    "WeightSlice",
    "base_r",
    "bucket_size",
    "comfy_slice",
    "contained_path",
    "core_energy",
    "decompose",
    "file_kind",
    "flux_targets",
    "free_name",
    "layer_names",
    "match_residual",
    "match_targets",
    "merge",
    "merge_report",
    "merged_adapter",
    "model_fingerprint",
    "open_adapter",
    "open_basis",
    "residual_weight",
    "restored_weight",
    "save_adapter",
    "save_basis",
    "save_cache",
    "storage_tolerance",
    "value_dtype",
    "write_residual",
]
