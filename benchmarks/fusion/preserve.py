"""`preserve`: while an adapter learns its picture, prompts without its trigger keep the base's velocity.

What it must stay quiet at are points of the base's own sampling paths, and the noised picture with prompts that do not
hold the trigger. Rules say how much of that gradient joins the picture's own (`Quiet.RULES`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from .live import Live, Update, encoded, noise_tokens
from .protocol import SAMPLER_STEPS, TRAINED


class Paths:
    """Points of the base's own sampling paths, with its velocity there: free of charge once they are sampled.

    Prompts are made of words of training and of words that say nothing, which stand for any trigger's place.

    Attributes:
        pictures: where the paths end, (count, 64, 64) tokens: class pictures, of the base's own making.
        inputs: layer -> mean of `x^T x` of what comes in, (in, in), divided by the mean square length of `W x`. So
            `tr(dR C dR^T)` is how much an update changes the layer's output on these prompts, relative to it.
    """

    def __init__(self, live: Live, count: int = 64, seed: int = 0) -> None:
        chosen = torch.Generator().manual_seed(seed)
        self.features, self.pooled = encoded([_neutral(chosen) for _ in range(count)])
        tokens, parts = noise_tokens(range(30_000, 30_000 + count)), []
        moments = {name: _Moments(layer.base) for name, layer in live.layers.items()}
        with torch.no_grad(), _watched(live, moments):
            for step in range(SAMPLER_STEPS):
                sigma = torch.full((count,), 1 - step / SAMPLER_STEPS)
                velocity = live.velocity(tokens, sigma, self.features, self.pooled, None)
                parts.append((tokens, sigma, velocity))
                tokens = tokens - velocity / SAMPLER_STEPS
        self.pictures = tokens
        self.inputs = {name: one.inputs / one.outputs for name, one in moments.items()}
        self.tokens, self.sigma, self.velocity = (torch.stack(part) for part in zip(*parts))  # (steps, count, ...)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """`count` points: tokens, sigma, features, pooled features, velocity."""
        step = torch.randint(len(self.tokens), (count,), generator=generator)
        which = torch.randint(len(self.features), (count,), generator=generator)
        at = (step, which)
        return self.tokens[at], self.sigma[at], self.features[which], self.pooled[which], self.velocity[at]

    def class_pictures(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """`count` of the base's own pictures: tokens, features, pooled features."""
        which = torch.randint(len(self.features), (count,), generator=generator)
        return self.pictures[which], self.features[which], self.pooled[which]

    def texts(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` of the prompts."""
        which = torch.randint(len(self.features), (count,), generator=generator)
        return self.features[which], self.pooled[which]


class _Moments:
    """Sums over what a layer was given and gave."""

    def __init__(self, layer: nn.Linear) -> None:
        self.inputs = torch.zeros(layer.in_features, layer.in_features)
        self.outputs = 0.0

    def __call__(self, layer: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        x = given[0].flatten(0, -2).float()
        self.inputs += x.mT @ x
        self.outputs += float(y.float().square().sum())


@contextmanager
def _watched(live: Live, moments: Mapping[str, _Moments]) -> Iterator[None]:
    handles = [live.layers[name].register_forward_hook(one) for name, one in moments.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def null_space_penalty(updates: Update, inputs: Mapping[str, Tensor]) -> Tensor:
    """How much updates change the base's layers on its own prompts, relative to their outputs, mean over layers.

    Args:
        updates: layer -> up (out, rank), orthonormal, so that it changes no length, and down (rank, in).
        inputs: of `Paths`, (in, in) for each layer.

    Returns:
        A scalar without a unit: mean squared change over mean squared output; 0 changes nothing.
    """
    parts = [((pair.down @ inputs[name]) * pair.down).sum() for name, pair in updates.items()]
    return torch.stack(parts).mean()


class Quiet:
    """Adds to the picture's gradient what keeps the rest as it is.

    Args:
        live: the base, which wears the adapter.
        paths: of the base.
        rule: one of RULES. "sum": a fixed weight. "learnt": one that follows how much of the first loss is gone.
            "yield": of each layer's gradient, without the part that opposes the picture's, and never longer than
            `weight` times that.
        weight: the highest, see `rule`.
        begin: steps of plain training before it.
        trained: the adapter's parameters.
        generator: of the points.
    """

    RULES = ("sum", "learnt", "yield")
    ON_PATHS, NOISED = 2, 1  # samples of a step, beside `batch_size` of the picture

    def __init__(
        self,
        live: Live,
        paths: Paths,
        rule: str,
        weight: float,
        trained: Sequence[Tensor],
        generator: torch.Generator,
        begin: int = 0,
    ) -> None:
        if rule not in self.RULES:
            raise ValueError(f"{rule!r} is no rule; expected one of {', '.join(self.RULES)}")
        self.live, self.paths, self.rule, self.weight = live, paths, rule, weight
        self.trained, self.generator, self.begin = trained, generator, begin
        self.losses: list[float] = []  # of the picture

    def add(self, noisy: Tensor, sigma: Tensor, loss: float) -> None:
        """Add it to the gradients that the picture's loss left on the parameters."""
        self.losses.append(loss)
        weight = self.now()
        if weight == 0:
            return
        tokens, sigma, features, pooled, velocity = self._kept(noisy, sigma)
        predicted = self.live.velocity(tokens, sigma, features, pooled, torch.ones(len(tokens), 1))
        gradients = torch.autograd.grad(functional.mse_loss(predicted, velocity), self.trained)
        for parameter, gradient in zip(self.trained, gradients):
            own = parameter.grad
            assert own is not None
            own += yielding(gradient, own, weight) if self.rule == "yield" else gradient * weight

    def now(self) -> float:
        """The weight at this step."""
        if len(self.losses) <= max(self.begin, 10):
            return 0.0
        if self.rule != "learnt":
            return self.weight
        first, recent = (sum(part) / len(part) for part in (self.losses[:10], self.losses[-20:]))
        return self.weight * min(max(1 - recent / first, 0.0), 1.0)

    def _kept(self, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """Tokens, sigma, features, pooled features and the base's velocity of the samples to keep."""
        from_paths = self.paths.draw(self.ON_PATHS, self.generator)
        texts = self.paths.texts(self.NOISED, self.generator)
        there = (noisy[: self.NOISED], sigma[: self.NOISED], *texts)
        with torch.no_grad():
            base = self.live.velocity(*there, None)
        return tuple(torch.cat(parts) for parts in zip(from_paths, (*there, base)))


def yielding(gradient: Tensor, own: Tensor, weight: float) -> Tensor:
    """A gradient without what opposes `own` (Yu et al. 2020, arXiv 2001.06782), no longer than `weight` times that."""
    length = own.norm()
    along = (gradient * own).sum() / length.square().clamp_min(1e-30)
    gradient = gradient - along.clamp_max(0.0) * own
    return gradient * (weight * length / gradient.norm().clamp_min(1e-30)).clamp_max(1.0)


def random_number(generator: torch.Generator) -> int:
    """For a word that says nothing."""
    return int(torch.randint(10**6, (1,), generator=generator))


def _neutral(generator: torch.Generator) -> str:
    """A prompt in words of training; shape, style, or both may be a word that says nothing."""

    def one_of(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    shapes, colours, textures = TRAINED
    hidden = torch.rand(2, generator=generator)
    random_words = [f"word{random_number(generator)}" for _ in range(2)]
    shape = random_words[0] if hidden[0] < 1 / 3 else one_of(shapes)
    style = random_words[1] if hidden[1] < 1 / 3 else f"{one_of(colours)} {one_of(textures)}"
    return f"a {shape} in {style} style"
