"""The mathematics and the files of QR-LoRA: torch, safetensors and numpy, without ComfyUI or diffusers."""

__version__ = "0.1.0"

from .acts import ACTS, Act, Triggers, merge_acting, triggers_of_both
from .adapter import METHODS, Adapter, AdapterLayer, LayerInfo
from .balance import ASKED, Asked, Cell, Point, Products, Prompts, Trial, cells, four_prompts, needed, products, pulls
from .balance_choice import BY_HAND, CHOICES, EVALUATIONS, balance_report, both_shown, frontier, proposal, shown
from .basis import (
    JointBasis,
    basis_name,
    initial_basis,
    joint_basis,
    open_basis,
    orthonormal,
    own_basis,
    same_basis,
    save_basis,
)
from .block_presets import (
    LARGEST_FILE,
    block_factors,
    combined,
    preset_names,
    preset_scale,
    scale_from_json,
    scale_to_json,
)
from .blocks import BlockRange, BlockScale, parse_kind_ranges, parse_ranges
from .buckets import bucket_size
from .cache import CacheItem, EncodedPicture, EncodedText, ModelInputs, PlainText, TrainingCache
from .cache_writing import save_cache
from .errors import (
    BasisMismatchError,
    FileFormatError,
    NameTakenError,
    PathError,
    QRLoRAError,
    SettingError,
    TargetError,
    WeightError,
)
from .families import Family, LayerKind, family_of_targets, flux_targets, layer_kind
from .formats import file_kind, is_residual, open_adapter
from .gate import (
    Gate,
    content_gate,
    content_pass_gate,
    holds,
    plain_caption,
    style_gate,
    style_pass_gate,
    triggers_of,
    without,
)
from .linalg import Basis, base_r, core_energy, decompose, residual_weight, restored_weight
from .lora import OTHER_PARTS, OpenedLora, OtherParts, lora_text, open_lora
from .merge import MergeReport, OnMismatch, merge, merge_report, merged_adapter
from .passes import Evaluation, evaluations
from .paths import contained_path, free_name
from .products import LayerSum, Product, layer_sum, term_products
from .recipe import NOTHING, MergeRecipe, Term
from .residual import Residual, match_residual, storage_tolerance, value_dtype, write_residual
from .save import Saved, save_adapter, save_once
from .schedule import PRESETS, Schedule, SchedulePair, content_first, parse_schedule, parse_schedule_pairs
from .similarity import similarity_report
from .similarity_schema import SimilarityReport
from .storage import TensorFile, model_fingerprint
from .sweep import MAX_COMBINATIONS, SweepCell, parse_scales, sweep
from .targets import LayerTarget, WeightSlice, match_targets
from .truncate import Truncated, truncated
from .whole import require_free_name, whole_file

__all__ = [
    "ACTS",
    "ASKED",
    "BY_HAND",
    "CHOICES",
    "EVALUATIONS",
    "LARGEST_FILE",
    "MAX_COMBINATIONS",
    "METHODS",
    "NOTHING",
    "OTHER_PARTS",
    "PRESETS",
    "Act",
    "Adapter",
    "AdapterLayer",
    "Asked",
    "Basis",
    "BasisMismatchError",
    "BlockRange",
    "BlockScale",
    "CacheItem",
    "Cell",
    "EncodedPicture",
    "EncodedText",
    "Evaluation",
    "Family",
    "FileFormatError",
    "Gate",
    "JointBasis",
    "LayerInfo",
    "LayerKind",
    "LayerSum",
    "LayerTarget",
    "MergeRecipe",
    "MergeReport",
    "ModelInputs",
    "NameTakenError",
    "OnMismatch",
    "OpenedLora",
    "OtherParts",
    "PathError",
    "PlainText",
    "Point",
    "Product",
    "Products",
    "Prompts",
    "QRLoRAError",
    "Residual",
    "Saved",
    "Schedule",
    "SchedulePair",
    "SettingError",
    "SimilarityReport",
    "SweepCell",
    "TargetError",
    "TensorFile",
    "Term",
    "TrainingCache",
    "Trial",
    "Triggers",
    "Truncated",
    "WeightError",
    "WeightSlice",
    "balance_report",
    "base_r",
    "basis_name",
    "block_factors",
    "both_shown",
    "bucket_size",
    "cells",
    "combined",
    "contained_path",
    "content_first",
    "content_gate",
    "content_pass_gate",
    "core_energy",
    "decompose",
    "evaluations",
    "family_of_targets",
    "file_kind",
    "flux_targets",
    "four_prompts",
    "free_name",
    "frontier",
    "holds",
    "initial_basis",
    "is_residual",
    "joint_basis",
    "layer_kind",
    "layer_sum",
    "lora_text",
    "match_residual",
    "match_targets",
    "merge",
    "merge_acting",
    "merge_report",
    "merged_adapter",
    "model_fingerprint",
    "needed",
    "open_adapter",
    "open_basis",
    "open_lora",
    "orthonormal",
    "own_basis",
    "parse_kind_ranges",
    "parse_ranges",
    "parse_scales",
    "parse_schedule",
    "parse_schedule_pairs",
    "plain_caption",
    "preset_names",
    "preset_scale",
    "products",
    "proposal",
    "pulls",
    "require_free_name",
    "residual_weight",
    "restored_weight",
    "same_basis",
    "save_adapter",
    "save_basis",
    "save_cache",
    "save_once",
    "scale_from_json",
    "scale_to_json",
    "shown",
    "similarity_report",
    "storage_tolerance",
    "style_gate",
    "style_pass_gate",
    "sweep",
    "term_products",
    "triggers_of",
    "triggers_of_both",
    "truncated",
    "value_dtype",
    "whole_file",
    "without",
    "write_residual",
]
