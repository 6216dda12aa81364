"""How much of two adapters survives when both act, against how far other prompts drift: by the model's predictions.

With v a prediction (velocity), 0 the model alone, i an adapter alone at full strength, and `both` a merge, at the same
latents, noise levels and prompts:

    e_i = v_i - v_0,  e = v_both - v_0          on the prompt that asks for both
    survival_i = <e, e_i> / |e_i|^2             1: all that the adapter does alone, in its direction
    purity_i = <e, e_i> / (|e| |e_i|)           1: nothing else beside it
    drift = |v_both - v_0| / (|e_style| + |e_content|)    its numerator on a prompt that asks for neither

over all points of a sampling path together. Everything follows from inner products, so no prediction has to be kept.
No picture is made and nobody reads one; docs/fusion.md says how far these numbers agree with what a reader sees.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .acts import ACTS, Act
from .gate import DOUBLED, holds, without

Asked = Literal["both", "style", "content", "none"]
ASKED: tuple[Asked, ...] = ("both", "style", "content", "none")
Prompts = Mapping[Asked, str]


class Trial(NamedTuple):
    """Factors of style and content that the model is asked with."""

    alpha: float
    beta: float


STYLE_ALONE, CONTENT_ALONE, BOTH_FULLY = Trial(1.0, 0.0), Trial(0.0, 1.0), Trial(1.0, 1.0)

# whose pull, its trial alone, that of the adapter which is asked for, and where
_GUESTS: tuple[tuple[str, Trial, Trial, Asked], ...] = (
    ("style", STYLE_ALONE, CONTENT_ALONE, "content"),
    ("content", CONTENT_ALONE, STYLE_ALONE, "style"),
)


class Products(NamedTuple):
    """Inner products of what a trial changes on a prompt with what each adapter changes alone, and with itself."""

    style: float = 0.0
    content: float = 0.0
    own: float = 0.0


class Point(NamedTuple):
    """What the model predicts at one place of a path.

    Attributes:
        level: of the noise, see `Schedule`: 1 to 0.
        base: what the prompt asks for -> squared norm of the model's own prediction.
        effects: trial and what the prompt asks for -> inner products. Those of `needed` have to be there.
    """

    level: float
    base: Mapping[Asked, float]
    effects: Mapping[tuple[Trial, Asked], Products]

    def effect(self, trial: Trial, asked: Asked) -> Products:
        """That of a trial; without any strength nothing changes."""
        return self.effects[trial, asked] if any(trial) else Products()

    def composed(self, alpha: float, beta: float, asked: Asked) -> Products:
        """That of predictions that are added, `alpha e_style + beta e_content`, see `passes`."""
        style, content = self.effects[STYLE_ALONE, asked], self.effects[CONTENT_ALONE, asked]
        ss, sc, cc = style.own, style.content, content.own
        own = alpha * alpha * ss + 2 * alpha * beta * sc + beta * beta * cc
        return Products(alpha * ss + beta * sc, alpha * sc + beta * cc, own)


class Cell(NamedTuple):
    """One setting and what it does.

    Attributes:
        act, alpha, beta, switch: as Merge has them; no switch where there is nothing to switch.
        style, content: survival; None where the adapter changes nothing alone.
        style_purity, content_purity: see above.
        drift: see above; by the prompt it is 0 by construction.
        moved: what drifts, relative to the model's own prediction.
    """

    act: str
    alpha: float
    beta: float
    switch: float | None
    style: float | None
    content: float | None
    style_purity: float | None
    content_purity: float | None
    drift: float
    moved: float


def products(effect: Tensor, style: Tensor, content: Tensor) -> Products:
    """Inner products of a change of the prediction with those of the adapters alone; all of one shape."""
    # on the processor: latents are small, and Apple's graphics have no float64
    change, *others = (tensor.flatten().cpu().double() for tensor in (effect, style, content))
    return Products(*(float(torch.dot(change, other)) for other in (*others, change)))


def four_prompts(prompt: str, style: Sequence[str], content: Sequence[str]) -> dict[Asked, str]:
    """The prompt that asks for both adapters, and what asks for one of them and for neither.

    Args:
        prompt: "" makes prompts of the triggers. A trigger that it lacks altogether is put before it, as QR-LoRA
            Prompt does; the other prompts are what is left of it without triggers.
        style, content: triggers.
    """
    if not prompt.strip():
        subject, manner = (words[0] if words else "" for words in (content, style))
        in_style = f" in {manner} style" if manner else ""
        thing = f"a {subject}" if subject else "a picture"
        alone = f"a picture of a {subject}" if subject else "a picture"
        return {"both": thing + in_style, "style": "a picture" + in_style, "content": alone, "none": "a picture"}
    missing = [words[0] for words in (style, content) if words and not any(holds(prompt, word) for word in words)]
    both = " ".join([*dict.fromkeys(missing), prompt])
    return {
        "both": both,
        "style": without(both, [word for word in content if word not in style]),
        "content": without(both, [word for word in style if word not in content]),
        "none": without(both, [*style, *content]),
    }


def needed(alphas: Sequence[float], betas: Sequence[float], acts: Iterable[str]) -> dict[Trial, tuple[Asked, ...]]:
    """What the model has to be asked at each point besides its own predictions: trial -> prompts."""
    ways = [ACTS[act] for act in acts]
    asked_at: dict[Trial, set[Asked]] = {trial: set(ASKED) for trial in (STYLE_ALONE, CONTENT_ALONE, BOTH_FULLY)}

    def ask(pairs: Iterable[tuple[float, float]], prompts: Iterable[Asked]) -> None:
        for pair in pairs:
            if any(pair):
                asked_at.setdefault(Trial(*pair), set()).update(prompts)

    if any(not way.one_pass_each and not way.content_first for way in ways):
        free = any(not way.one_pass_each and not way.by_prompt for way in ways)
        ask(itertools.product(alphas, betas), ("both", "none") if free else ("both",))
    if any(way.content_first for way in ways):
        ask([(alpha, 0.0) for alpha in alphas] + [(0.0, beta) for beta in betas], ("both",))
    return {trial: tuple(asked for asked in ASKED if asked in prompts) for trial, prompts in asked_at.items()}


def cells(points: Sequence[Point], alphas: Sequence[float], betas: Sequence[float], acts: Iterable[str]) -> list[Cell]:
    """Every setting of a grid, measured.

    Args:
        points: with the answers to `needed`.
        alphas, betas: factors of style and content.
        acts: names of ACTS; each is tried with the whole grid, and content first with a switch between any two points.
    """
    levels = [point.level for point in points]
    between = [round((high + low) / 2, 2) for high, low in itertools.pairwise(levels)]
    return [
        _cell(points, act, alpha, beta, switch)
        for act in acts
        for alpha, beta in itertools.product(alphas, betas)
        for switch in ([level for level in between if 0.01 <= level <= 0.99] if ACTS[act].content_first else [None])
    ]


def pulls(points: Sequence[Point]) -> tuple[float | None, float | None]:
    """How much of its own effect each adapter has where only the other one is asked for, both fully on and no gate.

    Returns:
        Of the style on prompts for the content, and of the content on prompts for the style; None without an effect.
    """
    shares: list[float | None] = []
    for field, own, other, asked in _GUESTS:
        size = _sum(point.effects[own, asked] for point in points).own
        extra = sum(getattr(point.effects[BOTH_FULLY, asked], field) for point in points)
        extra -= sum(getattr(point.effects[other, asked], field) for point in points)
        shares.append(extra / size if size else None)
    return shares[0], shares[1]


def _cell(points: Sequence[Point], act: str, alpha: float, beta: float, switch: float | None) -> Cell:
    way = ACTS[act]
    merged = _sum(_effect(point, way, alpha, beta, switch, "both") for point in points)
    alone = [_sum(point.effects[trial, "both"] for point in points).own for trial in (STYLE_ALONE, CONTENT_ALONE)]
    drift = moved = 0.0
    if not way.by_prompt:
        change = math.sqrt(_sum(_effect(point, way, alpha, beta, switch, "none") for point in points).own)
        size, base = sum(map(math.sqrt, alone)), math.sqrt(sum(point.base["none"] for point in points))
        drift, moved = (change / whole if whole else 0.0 for whole in (size, base))
    survival = [along / own if own else None for along, own in zip(merged, alone)]
    purity = [along / math.sqrt(own * merged.own or 1.0) if own else None for along, own in zip(merged, alone)]
    return Cell(act, alpha, beta, switch, survival[0], survival[1], purity[0], purity[1], drift, moved)


def _effect(point: Point, way: Act, alpha: float, beta: float, switch: float | None, asked: Asked) -> Products:
    """What a merge changes on a prompt that it acts on."""
    if way.one_pass_each:
        return point.composed(alpha, beta * (DOUBLED if way.by_prompt else 1.0), asked)
    if switch is not None:
        return point.effect(Trial(0.0, beta) if point.level > switch else Trial(alpha, 0.0), asked)
    return point.effect(Trial(alpha, beta), asked)


def _sum(parts: Iterable[Products]) -> Products:
    rows = list(parts)
    return Products(*map(sum, zip(*rows))) if rows else Products()
