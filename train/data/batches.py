"""Which pictures a step sees, with which noise and sigma. Nothing here has a state: number k of the run's batches is a
function of the settings and of k, so a resumed run and a run on other numbers of processes see the same batches.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qrlora_core import EncodedText, TrainingCache

from ..config import FitConfig

# A sigma of 0 has nothing to predict; the published schedule ends at 1/1000
_SMALLEST_SIGMA = 1e-3


class Batch(NamedTuple):
    """One forward pass. All tensors are float32 on the CPU but for the text, which are as the cache holds them.

    Attributes:
        latents: (batch, channels, height, width), without noise.
        noise: the same shape.
        sigmas: (batch,), 0 is clean, 1 is noise; before any shift.
        text: encoded, its tensors with a batch dimension.
        mask: (batch, height, width) weights of the loss, or None.
    """

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    text: EncodedText
    mask: Tensor | None


class Sampler:
    """Draws batches of equal size and shape from a training cache.

    In one pass over the data every picture comes `repeats` times, in an order drawn from the seed; a bucket whose
    pictures do not fill its last batch begins again.

    Args:
        cache: the pictures.
        config: batch size, seed, sampling of sigma, caption dropout.
        is_class: draw the class pictures (prior preservation) instead of the others.
    """

    def __init__(self, cache: TrainingCache, config: FitConfig, is_class: bool = False) -> None:
        self.cache, self.config, self.is_class = cache, config, is_class
        self._buckets: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(cache.items):
            if item.is_class == is_class:
                shape = (*cache.latent_shape(index), *cache.text(item.text).embeds.shape)
                self._buckets.setdefault(shape, []).extend([index] * item.repeats)
        size = config.batch_size
        self.batches_per_pass = sum(-(-len(items) // size) for items in self._buckets.values())
        self._order: tuple[int, list[list[int]]] = (-1, [])

    def __bool__(self) -> bool:
        return bool(self._buckets)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of every bucket: channels, height and width of the latents, tokens and width of the texts."""
        return list(self._buckets)

    def indices(self, number: int) -> list[int]:
        """The pictures of batch `number` of the run."""
        which, position = divmod(number, self.batches_per_pass)
        if self._order[0] != which:
            self._order = (which, self._shuffled(which))
        return self._order[1][position]

    def batch(self, number: int) -> Batch:
        """Batch `number` of the run, from 0."""
        chosen = self.indices(number)
        draws = [self._draw(index, number, place) for place, index in enumerate(chosen)]
        return _stacked(draws)

    def fixed(self, draw: int, draws: int) -> Batch:
        """Draw number `draw` of `draws` for a validation loss: one picture, sigma spread evenly over 0 to 1."""
        items = [index for bucket in self._buckets.values() for index in dict.fromkeys(bucket)]
        index = items[draw % len(items)]
        drawn = self._draw(index, draw, 0, fixed=True)
        return _stacked([drawn])._replace(sigmas=torch.tensor([(draw + 0.5) / draws]))

    def _shuffled(self, which: int) -> list[list[int]]:
        size = self.config.batch_size
        generator = generator_of(self.config.seed, "order", self.is_class, which)
        batches: list[list[int]] = []
        for items in self._buckets.values():
            order = [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
            while len(order) % size:
                order.append(order[len(order) % len(items)])
            batches += [order[start : start + size] for start in range(0, len(order), size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _draw(self, index: int, number: int, place: int, fixed: bool = False) -> Batch:
        """One picture with its noise and sigma, as a batch without the first dimension."""
        config, item = self.config, self.cache.items[index]
        generator = generator_of(config.seed, "fixed" if fixed else "draw", self.is_class, number, place)
        shape = self.cache.latent_shape(index)
        noise = torch.randn(shape, generator=generator)
        # every draw takes all its numbers, used or not, so that a setting changes nothing but what it is about
        flip, drop = torch.rand(2, generator=generator).tolist()
        sigma = drawn_sigma(config, generator)
        text = item.text
        if drop < config.caption_dropout and self.cache.empty_text is not None and not fixed:
            text = self.cache.empty_text
        flipped = flip < 0.5 and self.cache.has_flip(index) and not fixed
        latent = self.cache.latent(index, flipped).float()
        mask = self.cache.mask(index) if config.use_mask else None
        if mask is not None:
            mask = mask.float().flip(-1) if flipped else mask.float()
        return Batch(latent, noise, sigma.clamp(_SMALLEST_SIGMA, 1.0), self.cache.text(text), mask)


def drawn_sigma(config: FitConfig, generator: torch.Generator) -> Tensor:
    """One sigma, 0 to 1: uniform, logit-normal, or denser in the middle (Esser et al., equations 19 and 20)."""
    if config.timestep_sampling == "logit_normal":
        return torch.normal(config.logit_mean, config.logit_std, size=(1,), generator=generator).sigmoid()[0]
    uniform = torch.rand(1, generator=generator)
    if config.timestep_sampling == "mode":
        uniform = 1 - uniform - config.mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
    return uniform[0]


def generator_of(seed: int, *what: object) -> torch.Generator:
    """A generator on the CPU for one purpose: equal for equal arguments, unrelated for others."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=False) >> 1)


def _stacked(draws: Sequence[Batch]) -> Batch:
    mask = None
    if any(drawn.mask is not None for drawn in draws):
        mask = torch.stack(
            [drawn.mask if drawn.mask is not None else torch.ones(drawn.latents.shape[1:]) for drawn in draws]
        )
    return Batch(
        torch.stack([drawn.latents for drawn in draws]),
        torch.stack([drawn.noise for drawn in draws]),
        torch.stack([drawn.sigmas for drawn in draws]),
        _stacked_texts([drawn.text for drawn in draws]),
        mask,
    )


def _stacked_texts(texts: Sequence[EncodedText]) -> EncodedText:
    """A dropped caption may have fewer tokens than the others: zeros fill it up."""
    tokens = max(text.embeds.shape[0] for text in texts)
    pooled = [text.pooled for text in texts if text.pooled is not None]
    return EncodedText(
        torch.stack([_padded(text.embeds, tokens) for text in texts]), torch.stack(pooled) if pooled else None
    )


def _padded(embeds: Tensor, tokens: int) -> Tensor:
    missing = tokens - embeds.shape[0]
    return torch.cat([embeds, embeds.new_zeros(missing, embeds.shape[1])]) if missing else embeds
