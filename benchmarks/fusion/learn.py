"""Trains one adapter on one picture: QR-LoRA or plain LoRA, with or without `preserve`.

The same picture, caption, layers and optimizer for all of them; training ends when the adapter alone is read at
FIDELITY on words of training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from demo.model import pack
from demo.pictures import CONTENT_TRIGGER, STYLE_TRIGGER, Look
from demo.toy.features import to_latents
from qrlora_core import Basis

from .live import Live, Pair, Update, encoded, noise_tokens
from .pictures import draw, read
from .protocol import (
    CONTENT_LOOK,
    FIDELITY,
    FIRST_LOOK,
    LAST_LOOK,
    LOOK_EVERY,
    SAMPLER_STEPS,
    STYLE_LOOK,
    TEXTURE_LOOK,
    TRAINED,
    TRAINING,
    Unit,
    fidelity_prompts,
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an adapter is trained.

    Attributes:
        name: of its files and in the tables.
        kind: "qr" (Q from the base, dR upper trapezoidal) or "lora" (both factors).
        rank: of the update.
        preserve: highest weight of the base's velocity on prompts without the trigger; 0 for none.
        steps: exactly so many instead of as many as FIDELITY needs; 0 for the latter.
    """

    name: str
    kind: str = "qr"
    rank: int = int(TRAINING["rank"])
    preserve: float = 0.0
    steps: int = 0


# plain LoRA of half the rank trains as many numbers as QR-LoRA where layers are square
RECIPES = {
    one.name: one
    for one in (
        Recipe("qr"),
        Recipe("lora", "lora"),
        Recipe("lora8", "lora", 8),
        Recipe("preserve", preserve=2.0),
        Recipe("qr40", steps=40),
    )
}


@dataclass(frozen=True, slots=True)
class Learned:
    """A trained adapter, its steps, and the share of pictures in which it was read right (words of training)."""

    update: Update
    steps: int
    fidelity: float


def picture_of(unit: Unit, side: str) -> tuple[Tensor, str]:
    """The concept's one picture and its caption."""
    if side == "content":
        return draw(Look(unit.content, *CONTENT_LOOK)), f"a {CONTENT_TRIGGER} in {' '.join(CONTENT_LOOK)} style"
    if side == "style":
        return draw(Look(STYLE_LOOK, *unit.style)), f"a {STYLE_LOOK} in {STYLE_TRIGGER} style"
    shape, colour = TEXTURE_LOOK
    return draw(Look(shape, colour, unit.style[1])), f"a {shape} in {colour} {STYLE_TRIGGER} style"


def shows(unit: Unit, side: str, look: Look) -> bool:
    """Whether a picture shows the unit's content, its style (palette and texture), or its texture."""
    if side == "content":
        return look.shape == unit.content
    return look[1:] == unit.style if side == "style" else look.texture == unit.style[1]


def fidelity(live: Live, unit: Unit, side: str, strength: float = 1.0) -> float:
    """Share of the fidelity prompts' pictures that show the concept; the adapter that is worn, alone."""
    prompts = fidelity_prompts(side)
    found = read(live.sample(prompts, lambda _sigma: torch.full((len(prompts), 1), strength)))
    return sum(shows(unit, side, one) for one in found) / len(found)


def learn(
    live: Live,
    bases: dict[str, Basis],
    unit: Unit,
    side: str,
    recipe: Recipe,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
    last: int = LAST_LOOK,
    paths: "Paths | None" = None,
) -> Learned:
    """Train until FIDELITY, at most `last` steps; the best state that was looked at.

    Args:
        live: the base; wears the result afterwards.
        bases: layer name -> Q and R of the base's weight.
        unit, side: the concept, a side of SIDES, and the seed.
        recipe: how.
        on_step: called with step and loss of the picture.
        last: see above.
        paths: the base's own sampling paths, for `preserve`.
    """
    last = recipe.steps or last
    generator = torch.Generator().manual_seed(unit.seed)
    pairs = {name: _start(bases[name], recipe, generator) for name in live.layers}
    live.wear([pairs])
    trained = [tensor for pair in pairs.values() for tensor in pair if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAINING["learning_rate"], weight_decay=1e-4)
    step_of = _Step(live, unit, side, recipe, generator, paths)
    best: Learned | None = None
    for step in range(1, last + 1):
        loss, quiet = step_of()
        (loss + quiet).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step, float(loss.detach()))
        if step == last or (not recipe.steps and step >= FIRST_LOOK and step % LOOK_EVERY == 0):
            read_right = fidelity(live, unit, side)
            if best is None or read_right > best.fidelity:
                kept = {
                    name: Pair(pair.up.detach().clone(), pair.down.detach().clone()) for name, pair in pairs.items()
                }
                best = Learned(kept, step, read_right)
            if read_right >= FIDELITY:
                break
    assert best is not None
    live.wear([best.update])
    return best


def _start(basis: Basis, recipe: Recipe, generator: torch.Generator) -> Pair:
    """The first factors: no update yet."""
    out, width = len(basis.q), basis.r.shape[1]
    if recipe.kind == "lora":
        down = torch.randn(recipe.rank, width, generator=generator) / recipe.rank
        return Pair(torch.zeros(out, recipe.rank).requires_grad_(), down.requires_grad_())
    delta_r = torch.zeros(recipe.rank, width).requires_grad_()
    delta_r.register_hook(torch.triu)  # entries below the diagonal never get a gradient, so they stay zero
    return Pair(basis.q[:, : recipe.rank].contiguous(), delta_r)


class _Step:
    """The losses of one step after another: of the picture, and of what should stay as it is.

    `preserve`: at points of the base's own paths, and at the noised picture with prompts that do not hold the trigger,
    the adapter must not change the base's velocity. The picture's own loss decides the weight: none while nothing is
    learnt, up to `Recipe.preserve` as the loss falls from where it was; a concept that is being unlearnt gets its way.
    """

    KEPT_PATHS, KEPT_NOISED = 2, 1  # samples of a step, beside `batch_size` of the picture

    def __init__(
        self, live: Live, unit: Unit, side: str, recipe: Recipe, generator: torch.Generator, paths: "Paths | None"
    ) -> None:
        picture, caption = picture_of(unit, side)
        self.live, self.recipe, self.generator, self.paths = live, recipe, generator, paths
        self.size = int(TRAINING["batch_size"])
        self.tokens = pack(to_latents(picture[None])).expand(self.size, -1, -1)
        self.text = tuple(part.expand(self.size, *part.shape[1:]) for part in encoded([caption]))
        self.first: list[float] = []  # losses before anything is learnt
        self.smoothed = 0.0

    def __call__(self) -> tuple[Tensor, Tensor]:
        """The picture's loss, and the weighted loss of what is kept."""
        sigma = torch.rand(self.size, generator=self.generator).clamp_min(1e-3)  # as the trainer's default
        noise = torch.randn(self.tokens.shape, generator=self.generator)
        noisy = torch.lerp(self.tokens, noise, sigma[:, None, None])
        target = noise - self.tokens
        if not self.recipe.preserve:
            predicted = self.live.velocity(noisy, sigma, *self.text, torch.ones(self.size, 1))
            return functional.mse_loss(predicted, target), torch.zeros(())
        assert self.paths is not None
        kept = self._kept(noisy, sigma)
        inputs = [torch.cat(parts) for parts in zip((noisy, sigma, *self.text), kept[:4])]
        predicted = self.live.velocity(*inputs, torch.ones(len(inputs[0]), 1))
        loss = functional.mse_loss(predicted[: self.size], target)
        return loss, self._weight(float(loss.detach())) * functional.mse_loss(predicted[self.size :], kept[4])

    def _kept(self, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """Tokens, sigma, features, pooled features and the base's velocity of the samples to keep."""
        from_paths = self.paths.draw(self.KEPT_PATHS, self.generator)
        texts = self.paths.texts(self.KEPT_NOISED, self.generator)
        there = (noisy[: self.KEPT_NOISED], sigma[: self.KEPT_NOISED], *texts)
        with torch.no_grad():
            base = self.live.velocity(*there, None)
        return tuple(torch.cat(parts) for parts in zip(from_paths, (*there, base)))

    def _weight(self, loss: float) -> float:
        if len(self.first) < 10:
            self.first.append(loss)
            self.smoothed = sum(self.first) / len(self.first)
            return 0.0
        self.smoothed += 0.1 * (loss - self.smoothed)
        learnt = 1 - self.smoothed / (sum(self.first) / len(self.first))
        return self.recipe.preserve * min(max(learnt, 0.0), 1.0)


class Paths:
    """Points of the base's own sampling paths, with its velocity there: free of charge once they are sampled.

    Prompts are made of words of training and of words that say nothing, which stand for any trigger's place.
    """

    def __init__(self, live: Live, count: int = 64, seed: int = 0) -> None:
        chosen = torch.Generator().manual_seed(seed)
        self.features, self.pooled = encoded([_neutral(chosen) for _ in range(count)])
        tokens, parts = noise_tokens(range(30_000, 30_000 + count)), []
        with torch.no_grad():
            for step in range(SAMPLER_STEPS):
                sigma = torch.full((count,), 1 - step / SAMPLER_STEPS)
                velocity = live.velocity(tokens, sigma, self.features, self.pooled, None)
                parts.append((tokens, sigma, velocity))
                tokens = tokens - velocity / SAMPLER_STEPS
        self.tokens, self.sigma, self.velocity = (torch.stack(part) for part in zip(*parts))  # (steps, count, ...)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """`count` points: tokens, sigma, features, pooled features, velocity."""
        step = torch.randint(len(self.tokens), (count,), generator=generator)
        which = torch.randint(len(self.features), (count,), generator=generator)
        at = (step, which)
        return self.tokens[at], self.sigma[at], self.features[which], self.pooled[which], self.velocity[at]

    def texts(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` of the prompts."""
        which = torch.randint(len(self.features), (count,), generator=generator)
        return self.features[which], self.pooled[which]


def _neutral(generator: torch.Generator) -> str:
    """A prompt in words of training; shape, style, or both may be a word that says nothing."""

    def one_of(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    shapes, colours, textures = TRAINED
    hidden = torch.rand(2, generator=generator)
    random_words = [f"word{int(number)}" for number in torch.randint(10**6, (2,), generator=generator)]
    shape = random_words[0] if hidden[0] < 1 / 3 else one_of(shapes)
    style = random_words[1] if hidden[1] < 1 / 3 else f"{one_of(colours)} {one_of(textures)}"
    return f"a {shape} in {style} style"
