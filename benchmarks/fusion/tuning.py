"""Chooses what every method leaves open, on tuning units only, by one rule for all: `measures.score`."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from .fusions import Fusion, Schedule, content_first, content_then_base, fixed, half_then_full
from .measures import harmonic, mean, numbers, score
from .protocol import Unit
from .store import Study

log = logging.getLogger(__name__)
GRID = (0.2, 0.4, 0.6, 0.8, 1.0)
SWITCHES = (0.5, 0.6, 0.7, 0.8)


def both_schedules() -> list[Schedule]:
    """Candidates where a prompt holds both triggers: content first, with an overlap, with some of the content kept."""
    made = itertools.product(SWITCHES, (0.0, 0.1), (0.0, 0.4, 0.7))
    return [content_first(*parts) for parts in made]


def style_schedules() -> list[Schedule]:
    """Candidates for a style alone."""
    every = [fixed(strength, 0) for strength in (0.7, 0.85, 1.0)]
    return every + [half_then_full(switch, first) for switch in (0.6, 0.75, 0.85) for first in (0.0, 0.4, 0.7)]


def content_schedules() -> list[Schedule]:
    """Candidates for a content alone."""
    every = [fixed(0, strength) for strength in (0.7, 0.85, 1.0)]
    return every + [content_then_base(switch, last) for switch in (0.3, 0.5, 0.7) for last in (0.0, 0.5)]


def best_everywhere(study: Study, units: Sequence[Unit], name: str, adapters: str, each: Iterable[Schedule]) -> Fusion:
    """The schedule that scores best where there is no gate and it applies to every prompt."""
    best, highest = None, -1.0
    for schedule in each:
        fusion = Fusion(name, adapters, schedule)
        found = mean([numbers(study.readings(fusion, unit)) for unit in units])
        log.info("%s %s: %s", name, schedule, _line(found._asdict()))
        if score(found) > highest:
            best, highest = fusion, score(found)
    assert best is not None
    return best


def best_gated(study: Study, units: Sequence[Unit], name: str, adapters: str) -> Fusion:
    """A gate with the best schedule for each case; each is judged by its own prompts, as no other sees it."""
    fusion = Fusion(name, adapters, gate=True)

    def right(candidate: Fusion, kind: str) -> float:
        return sum(study.readings(candidate, unit, [kind])[kind]["right"] for unit in units) / len(units)

    def both(candidate: Fusion) -> float:
        every = [study.readings(candidate, unit, ("both", "both+")) for unit in units]
        h = sum(harmonic(one["both"]["content"], one["both"]["style"]) for one in every) / len(every)
        extra = sum(one["both+"]["extra"] for one in every) / len(every)
        log.info("%s both %s: H %.2f, extra word %.2f", name, candidate.both, h, extra)
        return harmonic(h, extra)

    def judged(kind: str, candidate: Fusion) -> float:
        value = right(candidate, kind)
        log.info("%s %s %s: %.2f", name, kind, getattr(candidate, kind), value)
        return value

    fusion = max((replace(fusion, both=one) for one in both_schedules()), key=both)
    fusion = max((replace(fusion, style=one) for one in style_schedules()), key=lambda one: judged("style", one))
    return max((replace(fusion, content=one) for one in content_schedules()), key=lambda one: judged("content", one))


def tuned(study: Study, units: Sequence[Unit], recipes: Sequence[str]) -> list[Fusion]:
    """Every method of the study, with nothing left open. `recipes` names the adapters that get gate and schedule."""
    pairs = itertools.product(GRID, GRID)
    fusions = [
        Fusion("no adapter", both=()),
        Fusion("plain sum"),
        Fusion("plain LoRA, equal rank", "lora"),
        Fusion("plain LoRA, equal parameters", "lora8"),
        best_everywhere(study, units, "best fixed alpha, beta", "qr", (fixed(*pair) for pair in pairs)),
        best_everywhere(study, units, "content first", "qr", both_schedules()),
        Fusion("prompt gate", gate=True),
        best_gated(study, units, "gate + schedule", "qr"),
    ]
    for recipe in recipes:
        fusions.append(Fusion(f"{recipe}, plain sum", recipe))
        fusions.append(best_gated(study, units, f"{recipe}, gate + schedule", recipe))
    return fusions


def _line(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in shares.items())
