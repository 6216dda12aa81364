"""Adapters beside the weights of a diffusers model: `y = W x + sum_i a_i(sigma, prompt) Q_i (dR_i x)`.

The factors a_i are a table (batch, adapters) that is read in every forward pass, so they may differ between samples
(a gate by the prompt) and between steps (a schedule), and turning them costs nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from demo.model import pack, unpack, velocity
from demo.toy.features import CHANNELS, SIZE, text_features, to_pictures

from .protocol import SAMPLER_STEPS, Prompt


class Pair(NamedTuple):
    """A layer's update: up (out, rank) times down (rank, in)."""

    up: Tensor
    down: Tensor


Update = Mapping[str, Pair]  # layer name -> update
Factors = Callable[[float], Tensor]  # sigma -> (batch, adapters)


class LiveLinear(nn.Module):
    """A frozen linear layer with any number of low-rank updates beside it, all in one pair of products.

    Shapes: input (batch, ..., in) -> output (batch, ..., out).
    """

    def __init__(self, base: nn.Linear, live: "Wearer") -> None:
        super().__init__()
        self.base = base
        self.live = [live]  # in a list, so that it is no submodule
        self.pairs: list[Pair] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        table = self.live[0].table
        if table is None or not self.pairs:
            return y
        down = torch.cat([pair.down for pair in self.pairs])
        up = torch.cat([pair.up for pair in self.pairs], 1)
        ranks = torch.tensor([len(pair.down) for pair in self.pairs], device=table.device)
        scale = table.repeat_interleave(ranks, 1).view(len(x), *[1] * (x.ndim - 2), -1)
        return y + (x @ down.mT * scale) @ up.mT


class Wearer:
    """A model whose target layers are wrapped; `table` (batch, adapters) holds the factors, None for the base alone.

    Args:
        model: changed in place; its parameters are frozen.
        targets: names of the layers.
    """

    def __init__(self, model: nn.Module, targets: Iterable[str]) -> None:
        self.model = model.requires_grad_(False)
        self.table: Tensor | None = None
        self.layers: dict[str, LiveLinear] = {}
        for name in targets:
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            self.layers[name] = LiveLinear(owner.get_submodule(child), self)
            owner.register_module(child, self.layers[name])

    def wear(self, updates: Sequence[Update]) -> None:
        """Put these adapters on, in the order of the table's columns.

        Raises:
            KeyError: an update has not the layers that were wrapped.
        """
        for name, layer in self.layers.items():
            layer.pairs = [update[name] for update in updates]


class Live(Wearer):
    """The toy.

    Args:
        model, targets: see `Wearer`.
        half: compute products in bf16, twice as fast on processors that know it.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str], half: bool = False) -> None:
        super().__init__(model, targets)
        self.half = half

    def velocity(self, tokens: Tensor, sigma: Tensor, features: Tensor, pooled: Tensor, table: Tensor | None) -> Tensor:
        """The model's prediction, (batch, 64, 64), with these factors."""
        self.table = table
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                return velocity(self.model, tokens, sigma, features, pooled).float()
        finally:
            self.table = None

    def composed(self, tokens: Tensor, sigma: Tensor, features: Tensor, pooled: Tensor, table: Tensor) -> Tensor:
        """See `composed`, of the toy's predictions."""
        return composed(lambda factors: self.velocity(tokens, sigma, features, pooled, factors), table)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        factors: Factors | None = None,
        steps: int = SAMPLER_STEPS,
        separate: bool = False,
    ) -> Tensor:
        """One picture for each prompt, (len(prompts), 3, SIZE, SIZE), 0 to 1, by Euler steps of equal length.

        Args:
            prompts: with the seeds of their noise.
            factors: of the adapters that are worn; None for the base alone.
            steps: of the sampler.
            separate: a pass of its own for each adapter, see `composed`.
        """
        features, pooled = encoded([prompt.text for prompt in prompts])
        tokens = noise_tokens([prompt.noise for prompt in prompts])
        for step in range(steps):
            sigma = 1 - step / steps
            table = factors(sigma) if factors else None
            times = torch.full((len(prompts),), sigma)
            if separate and table is not None:
                predicted = self.composed(tokens, times, features, pooled, table)
            else:
                predicted = self.velocity(tokens, times, features, pooled, table)
            tokens = tokens - predicted / steps
        return to_pictures(unpack(tokens))


def composed(predict: Callable[[Tensor | None], Tensor], table: Tensor) -> Tensor:
    """The base's prediction and what each adapter alone changes, times its factor: `v_0 + sum_i a_i (v_i - v_0)`.

    Predictions are composed instead of weights (Liu et al. 2022, arXiv 2206.01714), so that no adapter sees what
    another does in the layers before. It takes a pass of the model for each adapter, and one for the base.

    Args:
        predict: factors (batch, adapters), None for the base alone -> prediction (batch, ...).
        table: (batch, adapters).
    """
    base = predict(None)
    total = base
    for column, factors in enumerate(table.T):
        if bool(factors.any()):
            alone = torch.zeros_like(table)
            alone[:, column] = 1
            total = total + factors.view(-1, *[1] * (base.ndim - 1)) * (predict(alone) - base)
    return total


def encoded(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Features (batch, words, width) and pooled features (batch, width) of prompts."""
    features, pooled = (torch.cat(parts) for parts in zip(*(text_features(text) for text in texts)))
    return features, pooled


def noise_tokens(seeds: Sequence[int]) -> Tensor:
    """Noise of these seeds, (batch, 64, 64)."""
    shape = (CHANNELS, SIZE // 2, SIZE // 2)
    return pack(torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]))
