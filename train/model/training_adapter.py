"""A LoRA that is there while a model trains and gone when it samples: for models that are distilled for few steps.

Training such a model undoes its distillation bit by bit. An adapter that undoes it beforehand takes that out of what is
learnt: the trained update is found beside it, and is applied to the distilled model without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qrlora_core import QRLoRAError, model_fingerprint, open_lora

from ..errors import TrainError
from .source import BaseModel


class TrainingAdapter:
    """A LoRA file of any common dialect, beside a frozen model: `y = W x + B (A x)`, where `active`.

    Attributes:
        path: the file.
        fingerprint: sixteen hex digits of its content.
        active: whether it counts in a forward pass.

    Raises:
        TrainError: reason "model": not a LoRA that can be read exactly, or of another model.
    """

    def __init__(self, path: Path, source: BaseModel) -> None:
        self.path, self.active = path, True
        try:
            self.fingerprint = model_fingerprint(path)
            self._adapter = open_lora(path).adapter
        except QRLoRAError as error:
            raise TrainError("model", f"the training adapter cannot be used: {error}") from error
        for target in self._adapter.targets:
            spec = source.specs.get(f"{target.name}.weight")
            if spec is None or spec.shape != target.shape:
                shape = spec.shape if spec else "not there"
                raise TrainError(
                    "model",
                    f"the training adapter {path.name} is of another model: its {target.name} is {target.shape}, in "
                    f"{source.path.name} it is {shape}",
                )

    def attach(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Put it beside the layers of diffusers' transformer; a layer may be one that is trained."""
        for name in self._adapter.layers:
            up, down, alpha = self._adapter.update(name)
            scaled = up.float() * (alpha / up.shape[1])
            model.get_submodule(name).register_forward_hook(
                self._added(scaled.to(device, dtype), down.to(device, dtype))
            )

    @contextmanager
    def off(self) -> Iterator[None]:
        """Not there meanwhile."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def _added(self, up: Tensor, down: Tensor) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.active:
                return output
            x = inputs[0]
            return output + (x @ down.to(x.dtype).mT) @ up.to(x.dtype).mT

        return add
