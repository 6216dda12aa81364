"""Samples of merges as Apply QR-LoRA draws them live, without ComfyUI: by the prompt, and in passes of their own."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.fusion.live import Live, Pair, Update, encoded, noise_tokens
from qrlora_core import Adapter, MergeRecipe, Schedule, Term, evaluations

from .model import STEPS, unpack
from .toy.features import to_pictures


class Fused:
    """A copy of a model that draws merges of some adapters, whatever their strengths.

    Args:
        model: the toy; it is not changed.
        adapters: all that a recipe may hold; they have the same layers.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]) -> None:
        self._live = Live(copy.deepcopy(model), tuple(adapters[0].layers))
        self._updates = {id(adapter): _update(adapter) for adapter in adapters}

    @torch.no_grad()
    def sample(self, recipe: MergeRecipe, prompts: Sequence[str], seeds: Sequence[int], steps: int = STEPS) -> Tensor:
        """One picture for each prompt and seed, (len(prompts), 3, 32, 32), 0 to 1, by Euler steps of equal length."""
        self._live.wear([self._updates[id(term.adapter)] for term in recipe.terms])
        passes = [term.own_pass for term in recipe.terms]
        features, pooled = encoded(prompts)
        tokens = noise_tokens(seeds)
        for step in range(steps):
            sigma = 1 - step / steps
            times = torch.full((len(prompts),), sigma)
            rows = [tuple(_factor(term, sigma, step / steps, prompt) for term in recipe.terms) for prompt in prompts]
            total = torch.zeros_like(tokens)
            for table, weights in evaluations(passes, rows):
                predicted = self._live.velocity(tokens, times, features, pooled, torch.tensor(table))
                total += torch.tensor(weights)[:, None, None] * predicted
            tokens = tokens - total / steps
        return to_pictures(unpack(tokens))


def _factor(term: Term, sigma: float, done: float, prompt: str) -> float:
    """What a term counts at one evaluation for one prompt."""
    schedules = list(term.schedules)
    found = term.gate.schedule(prompt) if term.gate else None
    if found is False:
        return 0.0
    if isinstance(found, Schedule):
        schedules.append(found)
    return term.strength * math.prod(one.factor(sigma if one.over == "sigma" else done) for one in schedules)


def _update(adapter: Adapter) -> Update:
    update = {}
    for name in adapter.layers:
        up, down, alpha = adapter.update(name)
        update[name] = Pair(up.float() * (alpha / up.shape[1]), down.float())
    return update
