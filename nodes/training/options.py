"""What Train dR Options says, and the presets for graphics cards."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"
# What a preset fills in where the user left "preset". Offload: the share of the blocks' weights that waits in RAM.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "12 GB": {"base_storage": "fp8", "gradient_checkpointing": True, "offload": 0.7},
    "16 GB": {"base_storage": "fp8", "gradient_checkpointing": True, "offload": 0.35},
    "24 GB": {"base_storage": "fp8", "gradient_checkpointing": True, "offload": 0.0},
    "more than 24 GB": {"base_storage": "bf16", "gradient_checkpointing": True, "offload": 0.0},
}


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What Train dR Options says.

    Attributes:
        preset: a key of PRESETS, or AUTO.
        fit: fields of FitConfig; those that the preset decides are missing.
        keep_aspect, flip: of the pictures.
        resume: "auto", "never", "require".
        processes: of accelerate.
        stop_seconds: how long the trainer may take to write a checkpoint when it is stopped.
        silence_seconds: how long it may say nothing before it counts as hung.
        repeats, resolutions: of the pictures, see EncodeConfig.
    """

    preset: str = AUTO
    fit: Mapping[str, Any] = field(default_factory=lambda: {"sample_every": 250})
    keep_aspect: bool = True
    flip: bool = False
    resume: str = "auto"
    processes: int = 1
    stop_seconds: float = 30.0
    silence_seconds: float = 1800.0
    repeats: int = 1
    resolutions: tuple[str, ...] = ()

    def fit_fields(self) -> dict[str, Any]:
        """Fields of FitConfig, the preset's included; what auto leaves out the trainer chooses by what is free."""
        return {**PRESETS.get(self.preset, {}), **self.fit}
