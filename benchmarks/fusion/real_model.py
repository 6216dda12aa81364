"""A real model for the study: a diffusers pipeline whose transformer wears adapters, with factors for each step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qrlora_core import Adapter
from train.errors import TrainError
from train.model.basis import require_layers
from train.model.pipeline_folder import open_pipeline
from train.model.source import BaseModel
from train.model.transformer import DTYPES

from .live import Pair, Wearer, composed

Factors = Callable[[float], Tensor | None]  # sigma -> (1, adapters), None for the base alone


class RealModel:
    """FLUX.1 from a folder on this disk; nothing is downloaded.

    Args:
        path: diffusers' pipeline folder.
        adapters: everything that will be worn; says which layers.
        device, precision: where and in what it computes.
        offload: parts of the pipeline wait in RAM.

    Raises:
        TrainError: it is no such folder, of another family, or lacks layers of an adapter.
    """

    def __init__(
        self, path: Path, adapters: Sequence[Adapter], device: torch.device, precision: str, offload: bool = False
    ) -> None:
        folder = open_pipeline(path)
        if folder.backbone.family != "flux":  # others tell their transformer the time otherwise
            raise TrainError("model", f"{path.name} is of {folder.backbone.title}; this study is for FLUX.1")
        source = BaseModel(path)
        for adapter in adapters:
            require_layers(source, adapter.targets)
        self.device, self.dtype = device, DTYPES[precision]
        self.pipeline = folder.load("parts", self.dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        transformer = self.pipeline.transformer
        names = sorted({name for adapter in adapters for name in adapter.layers})
        self.wearer = Wearer(transformer, names)
        self._bare = transformer.forward
        transformer.forward = self._forward
        self._factors: Factors | None = None
        self._separate = False
        self._distances: list[float] | None = None
        if offload and device.type != "cpu":
            self.pipeline.enable_model_cpu_offload(device=device)
        else:
            self.pipeline.to(device)

    def wear(self, adapters: Sequence[Adapter]) -> None:
        """Put these on, in the order of the factors."""
        self.wearer.wear([self._update(adapter) for adapter in adapters])

    def draw(self, text: str, seed: int, factors: Factors, separate: bool, **settings: Any) -> Image.Image:
        """One picture.

        Args:
            text: prompt.
            seed: of its noise.
            factors: of what is worn.
            separate: a pass of its own for each adapter, see `composed`.
            settings: of the pipeline's call: height, width, num_inference_steps, guidance_scale.
        """
        with self._acting(factors, separate):
            picture: Image.Image = self._call(text, seed, **settings).images[0]
        return picture

    def drift(self, text: str, seed: int, factors: Factors, separate: bool, **settings: Any) -> float:
        """How far predictions leave the base's on the base's own path: mean of |v - v_0| / |v_0| over its steps."""
        self._distances = []
        try:
            with self._acting(factors, separate):
                self._call(text, seed, output_type="latent", **settings)
            return sum(self._distances) / len(self._distances)
        finally:
            self._distances = None

    @contextmanager
    def _acting(self, factors: Factors, separate: bool) -> Iterator[None]:
        self._factors, self._separate = factors, separate
        try:
            yield
        finally:
            self._factors, self._separate = None, False

    @torch.no_grad()
    def _call(self, text: str, seed: int, **settings: Any) -> Any:
        return self.pipeline(text, generator=torch.Generator().manual_seed(seed), **settings)

    def _forward(self, *args: Any, **given: Any) -> Any:
        """In place of the transformer's own: with the factors of this step."""

        def predict(table: Tensor | None) -> Tensor:
            self.wearer.table = table
            try:
                return self._bare(*args, **{**given, "return_dict": False})[0]
            finally:
                self.wearer.table = None

        sigma = float(given["timestep"].flatten()[0])
        table = None if self._factors is None else self._factors(sigma)
        if table is None or not table.any():
            found = base = predict(None)
        else:
            table = table.to(self.device, self.dtype)
            found = composed(predict, table) if self._separate else predict(table)
            base = predict(None) if self._distances is not None else found
        if self._distances is not None:
            self._distances.append(float((found - base).float().norm() / base.float().norm()))
        return (found if self._distances is None else base,)

    def _update(self, adapter: Adapter) -> dict[str, Pair]:
        update = {}
        for name, layer in self.wearer.layers.items():
            if name in adapter.layers:
                up, down, alpha = adapter.update(name)
                factors = (up.float() * (alpha / up.shape[1]), down)
            else:
                out, width = layer.base.weight.shape
                factors = (torch.zeros(out, 0), torch.zeros(0, width))
            update[name] = Pair(*(factor.to(self.device, self.dtype) for factor in factors))
        return update
