"""A merge that is learnt: one adapter that predicts what two adapters with a gate and a pass of their own each do.

The teacher is a fusion (the base where a prompt holds no trigger, one adapter where it holds one, the composed
prediction where it holds both). The student starts from the sum of the two, of their rank, and is trained on the
teacher's velocities, first at points of the teacher's own sampling paths and then of the student's too, where its
errors lead. What comes out is an ordinary adapter: it needs no gate and no further passes, and can be exported.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from demo.pictures import CONTENT_TRIGGER, STYLE_TRIGGER, Look
from qrlora_core.gate import DOUBLED, HALF_UNTIL

from .fusions import Fusion, fixed, half_then_full
from .learn import Recipe
from .live import Live, Pair, Update, encoded, noise_tokens
from .protocol import SAMPLER_STEPS, TRAINED, Prompt, Unit
from .store import Study, write_update

log = logging.getLogger(__name__)
NAME = "learnt"  # among `Study.joints`
TEACHER = Fusion(
    "by prompt, one pass each",
    both=fixed(1.0, DOUBLED),
    gate=True,
    style=half_then_full(HALF_UNTIL),
    separate=True,
)
STEPS, BATCH, LEARNING_RATE = 300, 16, 1.5e-3
EACH = 18  # prompts of each kind
OWN_PATHS = (0.25, 0.5, 0.75)  # shares of the steps after which the student's own paths join the points
_NOISE = 40_000  # first seed of the paths; others than those of judged pictures


class Points(NamedTuple):
    """Where the student is taught: tokens, sigmas, texts and the teacher's velocity, (points, ...)."""

    tokens: Tensor
    sigma: Tensor
    features: Tensor
    pooled: Tensor
    velocity: Tensor


def teach(study: Study, unit: Unit, side: str, recipe: Recipe) -> None:
    """Write a unit's learnt merge, see `Study.joints`."""
    content, style = (study.adapter(unit, which, recipe).update for which in ("content", side))
    path = study.joined_path(NAME, unit, side, recipe)
    steps = STEPS if study.adapter_steps is None else study.adapter_steps

    def on_step(step: int, loss: float) -> None:
        if step % 100 == 0:
            log.info("%s: step %d, loss %.4f", path.stem, step, loss)

    write_update(path, distil(study.live, content, style, side, unit.seed, on_step, steps), {"steps": str(steps)})


def distil(
    live: Live,
    content: Update,
    style: Update,
    side: str,
    seed: int,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
    steps: int = STEPS,
    each: int = EACH,
) -> Update:
    """The student of a pair on one basis.

    Args:
        live: the base.
        content, style: the pair; both on one Q.
        side: "style" or "texture", what the second one is of.
        seed: of prompts and points.
        on_step: called with step and loss.
        steps: of the optimizer.
        each: prompts of each kind.

    Raises:
        ValueError: the two have different bases.
    """
    generator = torch.Generator().manual_seed(seed)
    student: dict[str, Pair] = {}
    for name, one in content.items():
        if not torch.equal(one.up, style[name].up):
            raise ValueError(f"{name}: the pair has two bases")
        down = one.down + style[name].down
        student[name] = Pair(one.up.clone().requires_grad_(), down.requires_grad_())
    live.wear([content, style, student])
    trained = [tensor for pair in student.values() for tensor in pair]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    points = _paths(live, prompts(side, generator, _NOISE, each), of_student=False)
    joining = [round(share * steps) for share in OWN_PATHS]
    for step in range(1, steps + 1):
        if step - 1 in joining:
            own = prompts(side, generator, _NOISE + 1000 * (1 + joining.index(step - 1)), each)
            points = Points(*map(torch.cat, zip(points, _paths(live, own, of_student=True))))
        which = torch.randint(len(points.tokens), (BATCH,), generator=generator)
        tokens, sigma, features, pooled, velocity = (part[which] for part in points)
        predicted = live.velocity(tokens, sigma, features, pooled, _student(BATCH))
        loss = functional.mse_loss(predicted, velocity)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step, float(loss.detach()))
    return {name: Pair(pair.up.detach(), pair.down.detach()) for name, pair in student.items()}


def prompts(side: str, generator: torch.Generator, noise: int, each: int) -> list[Prompt]:
    """Prompts of a pair of a content and a style (or a texture), `each` of four kinds.

    In words of training; every other one has words that say nothing instead, so that the student learns what any
    other word is to it and not what these few are.
    """
    shapes, colours, textures = TRAINED

    def any_word(number: int, words: Sequence[str]) -> str:
        if number % 2:
            return f"word{int(torch.randint(10**6, (1,), generator=generator))}"
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    def styled(number: int) -> str:
        return f"{any_word(number, colours)} {any_word(number // 2, textures)}"

    def own(number: int) -> str:
        return STYLE_TRIGGER if side == "style" else f"{any_word(number, colours)} {STYLE_TRIGGER}"

    kinds: tuple[tuple[str, Callable[[int], str]], ...] = (
        ("both", lambda number: f"a {CONTENT_TRIGGER} in {own(number)} style"),
        ("content", lambda number: f"a {CONTENT_TRIGGER} in {styled(number)} style"),
        ("style", lambda number: f"a {any_word(number, shapes)} in {own(number // 2)} style"),
        ("none", lambda number: f"a {any_word(number, shapes)} in {styled(number // 2)} style"),
    )
    seeds = itertools.count(noise)
    return [Prompt(kind, text(n), Look("", "", ""), next(seeds)) for kind, text in kinds for n in range(each)]


@torch.no_grad()
def _paths(live: Live, asked: Sequence[Prompt], of_student: bool) -> Points:
    """Every point of these prompts' sampling paths, the teacher's or the student's, with the teacher's velocity."""
    features, pooled = encoded([one.text for one in asked])
    tokens = noise_tokens([one.noise for one in asked])
    factors = TEACHER.factors(asked)
    parts = []
    for step in range(SAMPLER_STEPS):
        sigma = 1 - step / SAMPLER_STEPS
        times = torch.full((len(asked),), sigma)
        table = functional.pad(factors(sigma), (0, 1))  # the student is worn too
        taught = live.composed(tokens, times, features, pooled, table)
        parts.append(Points(tokens, times, features, pooled, taught))
        moved = live.velocity(tokens, times, features, pooled, _student(len(asked))) if of_student else taught
        tokens = tokens - moved / SAMPLER_STEPS
    return Points(*map(torch.cat, zip(*parts)))


def _student(batch: int) -> Tensor:
    """Factors of the student alone."""
    return torch.tensor([[0.0, 0.0, 1.0]]).expand(batch, -1)
