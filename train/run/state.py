"""What the training loop works on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import FitConfig
from ..data.batches import Sampler
from ..model.backbones import Backbone
from ..model.basis import BasisOf
from ..model.layer import QRLinear
from ..model.source import BaseModel
from ..model.training_adapter import TrainingAdapter
from ..model.transformer import DTYPES
from .estimate import MemoryPlan
from .reporter import Reporter
from .stop import StopWatch


@dataclass(slots=True)
class TrainingState:
    """A run that is ready for its next step."""

    config: FitConfig
    plan: MemoryPlan
    accelerator: Any
    source: BaseModel
    sampler: Sampler
    class_sampler: Sampler
    model: Any
    layers: dict[str, QRLinear]
    parameters: dict[str, nn.Parameter]
    basis_of: BasisOf
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: Any
    identity: dict[str, Any]
    run_id: str
    done: int
    reporter: Reporter
    watch: StopWatch
    training_adapter: TrainingAdapter | None = None

    @property
    def backbone(self) -> Backbone:
        return self.source.backbone

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.precision]
