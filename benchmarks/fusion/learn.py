"""Trains one adapter on one picture: QR-LoRA or plain LoRA, with or without `preserve`.

The same picture, caption, layers and optimizer for all of them; training ends when the adapter alone is read at
FIDELITY on words of training.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from demo.model import pack
from demo.pictures import CONTENT_TRIGGER, STYLE_TRIGGER, Look
from demo.toy.features import to_latents, words
from qrlora_core import Basis

from .live import Live, Pair, Update, encoded
from .preserve import Paths, Quiet, null_space_penalty, random_number
from .protocol import (
    CONTENT_LOOK,
    FIDELITY,
    FIRST_LOOK,
    LAST_LOOK,
    LOOK_EVERY,
    STYLE_LOOK,
    TEXTURE_LOOK,
    TRAINING,
    Unit,
    fidelity_prompts,
)
from .unit_pictures import draw, read


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an adapter is trained.

    Attributes:
        name: of its files and in the tables.
        kind: "qr" (Q from the base, dR upper trapezoidal) or "lora" (both factors).
        rank: of the update.
        learning_rate: of AdamW.
        preserve: highest weight of the base's velocity on prompts without the trigger (see `Quiet`); 0 for none.
        rule, begin: of `Quiet`.
        vary: whether captions vary, see `Picture`.
        penalty: weight of the sum of the trained numbers' squares.
        null: weight of `null_space_penalty`.
        classes: weight of the loss on class pictures, half as many of them in a step as of the concept's.
        only: layers whose names hold it; "" for all.
        steps: exactly so many instead of as many as FIDELITY needs; 0 for the latter.
    """

    name: str
    kind: str = "qr"
    rank: int = int(TRAINING["rank"])
    learning_rate: float = TRAINING["learning_rate"]
    preserve: float = 0.0
    rule: str = "learnt"
    begin: int = 0
    vary: bool = False
    penalty: float = 0.0
    null: float = 0.0
    classes: float = 0.0
    only: str = ""
    steps: int = 0

    @property
    def needs_paths(self) -> bool:
        """Whether it asks what the base itself does."""
        return bool(self.preserve or self.null or self.classes)


def at_rate(recipe: Recipe, rate: float) -> Recipe:
    """The same recipe at a learning rate, by which it is named unless it is the rate of all others."""
    name = recipe.name if rate == recipe.learning_rate else f"{recipe.name}-rate{rate:g}"
    return replace(recipe, name=name, learning_rate=rate)


# plain LoRA of half the rank trains as many numbers as QR-LoRA where layers are square
LORAS = (Recipe("lora", "lora"), Recipe("lora8", "lora", 8))
LORA_RATES = (7.5e-4, 1.5e-3, 3e-3)  # candidates, as that of all others was chosen for QR-LoRA
RECIPES = {
    one.name: one
    for one in (
        Recipe("qr"),
        *(at_rate(recipe, rate) for recipe in LORAS for rate in LORA_RATES),
        Recipe("qr40", steps=40),
        Recipe("qr60", steps=60),
        Recipe("preserve", preserve=0.3, rule="sum", vary=True, steps=400),
        # what else was tried: a bound by the picture's gradient, fewer layers, small updates
        Recipe("yielding", preserve=0.5, rule="yield", vary=True, steps=400),
        Recipe("attention", only="attn."),
        Recipe("small", penalty=1e-3),
        Recipe("null", null=1.0),
        Recipe("classes", classes=0.3),
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
    found = read(live.sample(prompts, lambda _sigma: torch.full((len(prompts), 1), strength)), unit)
    return sum(shows(unit, side, one) for one in found) / len(found)


def learn(
    live: Live,
    bases: dict[str, Basis],
    unit: Unit,
    side: str,
    recipe: Recipe,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
    last: int = LAST_LOOK,
    paths: Paths | None = None,
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
    for name, pair in pairs.items():
        if recipe.only not in name:
            pairs[name] = Pair(pair.up.detach(), pair.down.detach() * 0)  # no update, then or ever
    live.wear([pairs])
    trained = [tensor for pair in pairs.values() for tensor in pair if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=1e-4)
    picture = Picture(live, unit, side, generator, recipe.vary)
    quiet = None
    own = torch.Generator().manual_seed(unit.seed + 1)  # so that the picture's draws are those of plain training
    if recipe.needs_paths and paths is None:
        raise ValueError(f"{recipe.name} needs the base's own paths")
    if recipe.preserve:
        quiet = Quiet(live, paths, recipe.rule, recipe.preserve, trained, own, recipe.begin)
    best: Learned | None = None
    for step in range(1, last + 1):
        loss, noisy, sigma = picture.loss()
        total = loss + recipe.penalty * sum(tensor.square().sum() for tensor in trained)
        if recipe.null:
            total = total + recipe.null * null_space_penalty(pairs, paths.inputs)
        if recipe.classes:
            total = total + recipe.classes * class_loss(live, paths, len(noisy) // 2, own)
        total.backward()
        if quiet is not None:
            quiet.add(noisy, sigma, float(loss.detach()))
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


def class_loss(live: Live, paths: Paths, count: int, generator: torch.Generator) -> Tensor:
    """The loss of `count` of the base's own pictures (prior preservation, Ruiz et al. 2023, arXiv 2208.12242)."""
    tokens, *text = paths.class_pictures(count, generator)
    sigma = torch.rand(count, generator=generator).clamp_min(1e-3)
    noise = torch.randn(tokens.shape, generator=generator)
    predicted = live.velocity(torch.lerp(tokens, noise, sigma[:, None, None]), sigma, *text, torch.ones(count, 1))
    return functional.mse_loss(predicted, noise - tokens)


class Picture:
    """A concept's picture at random sigmas, `batch_size` of them in a step.

    Args:
        vary: every other sample's caption holds the trigger among words that say nothing. Else nothing tells an adapter
            that must keep all other prompts as they are that it is the trigger alone that calls it.
    """

    def __init__(self, live: Live, unit: Unit, side: str, generator: torch.Generator, vary: bool = False) -> None:
        picture, self.caption = picture_of(unit, side)
        size = int(TRAINING["batch_size"])
        self.live, self.generator, self.vary = live, generator, vary
        self.tokens = pack(to_latents(picture[None])).expand(size, -1, -1)
        self.text = encoded([self.caption] * size)

    def loss(self) -> tuple[Tensor, Tensor, Tensor]:
        """The picture's loss, the noised tokens (batch, 64, 64) and their sigmas (batch,)."""
        size = len(self.tokens)
        sigma = torch.rand(size, generator=self.generator).clamp_min(1e-3)  # as the trainer's default
        noise = torch.randn(self.tokens.shape, generator=self.generator)
        noisy = torch.lerp(self.tokens, noise, sigma[:, None, None])
        text = encoded([self._varied(number) for number in range(size)]) if self.vary else self.text
        predicted = self.live.velocity(noisy, sigma, *text, torch.ones(size, 1))
        return functional.mse_loss(predicted, noise - self.tokens), noisy, sigma

    def _varied(self, number: int) -> str:
        if number % 2 == 0:
            return self.caption
        kept = (CONTENT_TRIGGER, STYLE_TRIGGER)
        said = [word if word in kept else f"word{random_number(self.generator)}" for word in words(self.caption)]
        return " ".join(said)
