"""The ways to put two adapters together that the study compares, as data: whose adapters, and factors over sigma."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from demo.pictures import CONTENT_TRIGGER, STYLE_TRIGGER
from demo.toy.features import words

from .live import Factors
from .protocol import Prompt


class Stage(NamedTuple):
    """Factors of content and style while sigma is above `down_to`."""

    down_to: float
    content: float
    style: float


Schedule = tuple[Stage, ...]  # from noise to picture, the last one down to 0; empty: the base alone

ON: Schedule = (Stage(0, 1, 1),)
CONTENT_ALONE: Schedule = (Stage(0, 1, 0),)
STYLE_ALONE: Schedule = (Stage(0, 0, 1),)


@dataclass(frozen=True, slots=True)
class Fusion:
    """One way.

    Attributes:
        name: in the tables.
        adapters: name of the recipe that trained them.
        both: factors over sigma where a prompt holds both triggers; without a gate, everywhere.
        gate: whether an adapter acts only where its trigger stands in the prompt.
        content, style: with a gate, factors where only that trigger stands there.
        separate: whether predictions are composed, a pass for each adapter, instead of weights.
        joint: what makes one adapter of the two, a name of `Study.joints`; a stage's first factor is then its own.
    """

    name: str
    adapters: str = "qr"
    both: Schedule = ON
    gate: bool = False
    content: Schedule = CONTENT_ALONE
    style: Schedule = STYLE_ALONE
    separate: bool = False
    joint: str = ""

    def schedule(self, text: str) -> Schedule:
        """What applies to a prompt of the toy."""
        held = words(text)
        return self.case(CONTENT_TRIGGER in held, STYLE_TRIGGER in held)

    def case(self, content: bool, style: bool) -> Schedule:
        """What applies where a prompt holds these triggers."""
        if not self.gate:
            return self.both
        cases = {(True, True): self.both, (True, False): self.content, (False, True): self.style, (False, False): ()}
        return cases[content, style]

    def factors(self, prompts: Sequence[Prompt]) -> Factors:
        """Factors (batch, 2) of content and style at a sigma, each sample by its own prompt; (batch, 1) of a joint."""
        schedules = [self.schedule(prompt.text) for prompt in prompts]
        columns = 1 if self.joint else 2

        def at(sigma: float) -> Tensor:
            return torch.tensor([factors_at(schedule, sigma)[:columns] for schedule in schedules])

        return at


def factors_at(schedule: Schedule, sigma: float) -> tuple[float, float]:
    """Factors of content and style."""
    for stage in schedule:
        if sigma > stage.down_to + 1e-6:  # 1 - 6 / 12 is not quite .5 everywhere
            return stage.content, stage.style
    return 0.0, 0.0


def fixed(alpha: float, beta: float) -> Schedule:
    """The same factors at every sigma: alpha for the style, beta for the content."""
    return (Stage(0, beta, alpha),)


def content_first(switch: float, overlap: float = 0.0, keep: float = 0.0, full: float = 1.0) -> Schedule:
    """Content down to `switch`, then style.

    Args:
        overlap: length in sigma, above the switch, where both act.
        keep: factor of the content after the switch.
        full: factor of the style after the switch.
    """
    stages = [Stage(min(switch + overlap, 1.0), 1, 0), Stage(switch, 1, full), Stage(0, keep, full)]
    return tuple(stage for number, stage in enumerate(stages) if number != 1 or overlap)


def half_then_full(switch: float, first: float = 0.5) -> Schedule:
    """A style alone: `first` down to `switch`, where shapes are decided, then all of it."""
    return (Stage(switch, 0, first), Stage(0, 0, 1))


def content_then_base(switch: float, last: float = 0.0) -> Schedule:
    """A content alone: all of it down to `switch`, then `last`."""
    return (Stage(switch, 1, 0), Stage(0, last, 0))
