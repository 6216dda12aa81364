"""A merge that is learnt: one adapter that predicts, everywhere, what two adapters with a gate and passes of their own do.

Teachers, by the prompt: the base where it holds no trigger, one adapter where it holds one, and where it holds both
the composed prediction `v_0 + 2 (v_content - v_0) + (v_style - v_0)`. The student starts from the sum of the two, of
their rank, and is trained on the teachers' velocities at points of the teachers' own sampling paths. What comes out is
an ordinary adapter: it needs no gate, no further passes, and can be exported.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from demo.pictures import CONTENT_TRIGGER, STYLE_TRIGGER
from qrlora_core.gate import DOUBLED

from .live import Live, Pair, Update, encoded, noise_tokens
from .protocol import SAMPLER_STEPS, TRAINED

STEPS, BATCH, LEARNING_RATE = 300, 16, 1e-3
_NOISE = 40_000  # first seed of the paths; others than those of judged pictures
_EACH = 18  # prompts of each kind


class Asked(NamedTuple):
    """A prompt in words of training, and the factors (content, style) of its teacher."""

    text: str
    content: float
    style: float


def asked(side: str) -> list[Asked]:
    """The prompts of a pair of a content and a style (or a texture); as many of each kind."""
    shapes, colours, textures = TRAINED
    styles = list(itertools.product(colours, textures))
    own = [f"{STYLE_TRIGGER}"] if side == "style" else [f"{colour} {STYLE_TRIGGER}" for colour in colours]
    kinds = (
        [Asked(f"a {CONTENT_TRIGGER} in {one} style", DOUBLED, 1.0) for one in own],
        [Asked(f"a {CONTENT_TRIGGER} in {' '.join(one)} style", 1.0, 0.0) for one in styles],
        [Asked(f"a {shape} in {one} style", 0.0, 1.0) for shape, one in itertools.product(shapes, own)],
        [Asked(f"a {shape} in {' '.join(one)} style", 0.0, 0.0) for shape, one in itertools.product(shapes, styles)],
    )
    return [kind[number % len(kind)] for kind in kinds for number in range(_EACH)]


class _Paths(NamedTuple):
    """Points of the teachers' sampling paths: tokens and velocities (steps, prompts, 64, 64), the texts of each."""

    tokens: Tensor
    velocity: Tensor
    features: Tensor
    pooled: Tensor


@torch.no_grad()
def _paths(live: Live, prompts: Sequence[Asked]) -> _Paths:
    """Sample as the teachers do; the pair is worn."""
    features, pooled = encoded([one.text for one in prompts])
    tokens = noise_tokens(range(_NOISE, _NOISE + len(prompts)))
    table = torch.tensor([[one.content, one.style] for one in prompts])
    points, velocities = [], []
    for step in range(SAMPLER_STEPS):
        sigma = torch.full((len(prompts),), 1 - step / SAMPLER_STEPS)
        velocity = live.composed(tokens, sigma, features, pooled, table)
        points.append(tokens)
        velocities.append(velocity)
        tokens = tokens - velocity / SAMPLER_STEPS
    return _Paths(torch.stack(points), torch.stack(velocities), features, pooled)


def distil(
    live: Live,
    content: Update,
    style: Update,
    side: str,
    seed: int,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
    steps: int = STEPS,
) -> Update:
    """The student of a pair on one basis.

    Args:
        live: the base.
        content, style: the pair; both on one Q.
        side: "style" or "texture", what the second one is of.
        seed: of the order of the points.
        on_step: called with step and loss.
        steps: of the optimizer.

    Raises:
        ValueError: the two have different bases.
    """
    live.wear([content, style])
    paths = _paths(live, asked(side))
    pairs: dict[str, Pair] = {}
    for name, one in content.items():
        if not torch.equal(one.up, style[name].up):
            raise ValueError(f"{name}: the pair has two bases")
        down = one.down + style[name].down
        pairs[name] = Pair(one.up.clone().requires_grad_(), down.clone().requires_grad_())
    live.wear([pairs])
    trained = [tensor for pair in pairs.values() for tensor in pair]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    ones = torch.ones(BATCH, 1)
    for step in range(1, steps + 1):
        at = torch.randint(SAMPLER_STEPS, (BATCH,), generator=generator)
        which = torch.randint(len(paths.features), (BATCH,), generator=generator)
        sigma = 1 - at / SAMPLER_STEPS
        predicted = live.velocity(paths.tokens[at, which], sigma, paths.features[which], paths.pooled[which], ones)
        loss = functional.mse_loss(predicted, paths.velocity[at, which])
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step, float(loss.detach()))
    return {name: Pair(pair.up.detach(), pair.down.detach()) for name, pair in pairs.items()}
