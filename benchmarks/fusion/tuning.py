"""Chooses what every method leaves open, on tuning units only, the same rules for all."""

import itertools
import logging
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from qrlora_core.gate import DOUBLED, HALF_UNTIL

from .fusions import Fusion, Schedule, Stage, content_first, content_then_base, fixed, half_then_full
from .learn import LORA_RATES, RECIPES, at_rate
from .learnt import NAME as LEARNT
from .measures import h, harmonic, other_words
from .optimizer import NAME as OPTIMIZER
from .protocol import Unit
from .store import Study, concept_of, trained

log = logging.getLogger(__name__)
REFERENCE, PASSES = "best fixed alpha, beta", "Merge: by prompt, one pass each"  # what the others are compared with
QUIET_PASSES = "soft null space, Merge: by prompt, one pass each"
# what Merge does by itself
MERGE = (
    Fusion(
        "Merge: by prompt, content first", "qr", content_first(0.5), True, content_then_base(0.5), half_then_full(0.5)
    ),
    Fusion(PASSES, "qr", fixed(1.0, DOUBLED), True, style=half_then_full(HALF_UNTIL), separate=True),
)
GRID = (0.2, 0.4, 0.6, 0.8, 1.0)
SWITCHES, LATER_SWITCHES = (0.5, 0.6, 0.7), (0.3, 0.4)


def both_schedules() -> list[Schedule]:
    """Candidates where a prompt holds both triggers: content first, some of it kept, the style as it is or stronger."""
    made = [*itertools.product(SWITCHES, (0.0,), (0.0, 0.5), (1.0, 1.4))]
    made += itertools.product(LATER_SWITCHES, (0.0,), (0.5, 0.8), (1.4, 1.8))
    return [content_first(*parts) for parts in made]


def separate_schedules() -> list[Schedule]:
    """Candidates for predictions that are composed: the content stronger or not, to the end or less of it later."""
    made = [fixed(style, content) for style in (1.0, 1.2) for content in (1.0, 1.5, 2.0, 2.5)]
    return made + [(Stage(switch, content, 1), Stage(0, 1, 1)) for switch in (0.3, 0.5) for content in (2.0, 2.5)]


def fixed_factors() -> list[Schedule]:
    """Candidates for factors that are the same at every sigma."""
    return [fixed(*pair) for pair in itertools.product(GRID, GRID)]


def style_schedules() -> list[Schedule]:
    """Candidates for a style alone."""
    every = [fixed(strength, 0) for strength in (0.85, 1.0)]
    return every + [half_then_full(switch, first) for switch in (0.6, 0.75) for first in (0.0, 0.4, 0.7)]


def content_schedules() -> list[Schedule]:
    """Candidates for a content alone."""
    every = [fixed(0, strength) for strength in (0.85, 1.0)]
    return every + [content_then_base(switch, last) for switch in (0.3, 0.5) for last in (0.0, 0.5)]


def best_everywhere(
    study: Study,
    units: Sequence[Unit],
    name: str,
    each: Iterable[Schedule],
    separate: bool = False,
    adapters: str = "qr",
) -> Fusion:
    """The schedule that is best where there is no gate and it applies to every prompt: harmonic mean of H and words.

    H alone bounds it, so the other prompts are sampled only for candidates that can still be the best.
    """
    candidates = [Fusion(name, adapters, one, separate=separate) for one in each]
    shown = [statistics.fmean(h(study.readings(one, unit, ["both"])["both"]) for unit in units) for one in candidates]
    best, highest = candidates[0], -1.0
    for found, candidate in sorted(zip(shown, candidates), key=lambda pair: -pair[0]):
        if harmonic(found, 1.0) <= highest:
            break
        every = [study.readings(candidate, unit, ("content", "style", "none")) for unit in units]
        words = statistics.fmean(other_words(one) for one in every)
        log.info("%s %s: H %.2f, other words %.2f", name, candidate.both, found, words)
        if harmonic(found, words) > highest:
            best, highest = candidate, harmonic(found, words)
    return best


def best_gated(study: Study, units: Sequence[Unit], name: str, adapters: str, separate: bool = False) -> Fusion:
    """A gate with the best schedule for each case; each is judged by its own prompts, as no other sees it."""
    fusion = Fusion(name, adapters, gate=True, separate=separate)

    def both(candidate: Fusion) -> float:
        every = [study.readings(candidate, unit, ("both", "both+")) for unit in units]
        shown = sum(h(one["both"]) for one in every) / len(every)
        right = sum(one["both+"]["right"] for one in every) / len(every)
        log.info("%s both %s: H %.2f, all right with a colour %.2f", name, candidate.both, shown, right)
        return shown + right

    def alone(kind: str, candidate: Fusion) -> float:
        right = sum(study.readings(candidate, unit, [kind])[kind]["right"] for unit in units) / len(units)
        log.info("%s %s %s: all right %.2f", name, kind, getattr(candidate, kind), right)
        return right

    candidates = separate_schedules() if separate else both_schedules()
    fusion = max((replace(fusion, both=one) for one in candidates), key=both)
    fusion = max((replace(fusion, style=one) for one in style_schedules()), key=lambda one: alone("style", one))
    return max((replace(fusion, content=one) for one in content_schedules()), key=lambda one: alone("content", one))


class Single(NamedTuple):
    """An adapter alone, everywhere, at one strength; a number for each of the units' contents, then styles.

    Attributes:
        name: recipe.
        strength: of the adapter.
        shown: share of the prompts with its trigger that show the concept.
        rest: other words right, mean over prompts with its trigger and without.
    """

    name: str
    strength: float
    shown: tuple[float, ...]
    rest: tuple[float, ...]


def single_adapters(study: Study, units: Sequence[Unit], without: Collection[str] = ()) -> list[Single]:
    """Concept shown against rest unchanged: what `preserve` must lie above is plain training, weaker and shorter."""
    asked = [("qr", 0.4), ("qr", 0.6), ("qr", 0.8), ("qr", 1.0), ("qr40", 1.0), ("qr60", 1.0)]
    asked += [("preserve", 0.8), ("preserve", 1.0)]
    asked += [("null", 0.8), ("null", 1.0)]
    asked += [(name, 1.0) for name in ("yielding", "attention", "small", "classes")]
    return [single(study, units, *one) for one in asked if one[0] not in without]


def single(study: Study, units: Sequence[Unit], recipe: str, strength: float) -> Single:
    """One point of that curve."""
    shown, rest = [], []
    for side, schedule in (("content", fixed(0, strength)), ("style", fixed(strength, 0))):
        for unit in {concept_of(unit, side): unit for unit in units}.values():
            found = study.readings(Fusion("alone", recipe, schedule), unit, (side, "none"))
            shown.append(found[side][side])
            rest.append((found[side]["words"] + found["none"]["words"]) / 2)
    return Single(recipe, strength, tuple(shown), tuple(rest))


def tuned(study: Study, units: Sequence[Unit], without: Sequence[str] = ()) -> Iterator[Fusion]:
    """Every method of the study with nothing left open, one after another.

    Args:
        study: of few pictures.
        units: tuning units.
        without: recipes whose adapters are left out.
    """
    yield Fusion("no adapter", both=())
    yield Fusion("plain sum")
    yield Fusion("prompt gate", gate=True)
    yield best_gated(study, units, "gate + schedule", "qr")
    yield best_everywhere(study, units, "separate passes", separate_schedules(), separate=True)
    separate = best_gated(study, units, "gate + separate passes", "qr", separate=True)
    yield separate
    yield from MERGE
    if "lora" not in without:
        yield Fusion("plain LoRA, equal rank", "lora")
        yield replace(separate, name="plain LoRA, gate + separate passes", adapters="lora")
    if "null" not in without:
        yield Fusion("soft null space, plain sum", "null")
        yield replace(MERGE[-1], name=QUIET_PASSES, adapters="null")
        yield best_gated(study, units, "soft null space, gate + separate passes", "null", separate=True)
    yield best_everywhere(study, units, REFERENCE, fixed_factors())
    yield best_everywhere(study, units, "content first", both_schedules())
    if "preserve" not in without:
        yield Fusion("preserve, plain sum", "preserve")
        yield replace(separate, name="preserve, gate + separate passes", adapters="preserve")
    for joint, name in ((OPTIMIZER, "LoRA-Optimizer, QR-LoRA"), (LEARNT, "learnt merge")):
        if joint in study.joints:
            yield Fusion(name, joint=joint)
    if "lora" not in without:
        yield from own_choices(study, units, "lora8" not in without)


def own_choices(study: Study, units: Sequence[Unit], equal_parameters: bool) -> Iterator[Fusion]:
    """Plain LoRA at a learning rate and with factors of its own, by the rules by which QR-LoRA got them.

    Args:
        equal_parameters: also half the rank, at that rate and with those factors.
    """
    rate = best_rate(study, units)
    adapters, name = at_rate(RECIPES["lora"], rate).name, "plain LoRA, own rate"
    yield Fusion(name, adapters)
    yield best_everywhere(study, units, f"{name} and fixed factors", fixed_factors(), adapters=adapters)
    gated = best_gated(study, units, f"{name}, gate + separate passes", adapters, separate=True)
    yield gated
    if OPTIMIZER in study.joints:
        yield Fusion(f"LoRA-Optimizer, {name}", adapters, joint=OPTIMIZER)
    if equal_parameters:
        half = at_rate(RECIPES["lora8"], rate).name
        yield Fusion("plain LoRA, equal parameters", half)
        yield replace(gated, name="plain LoRA, equal parameters, gate + separate passes", adapters=half)


def best_rate(study: Study, units: Sequence[Unit]) -> float:
    """The learning rate at which plain LoRA's contents and styles alone are read right most, on words of training.

    Where several are equal, that of fewer steps.
    """

    def reached(rate: float) -> tuple[float, float]:
        recipe = at_rate(RECIPES["lora"], rate)
        made = [one for *_, one in trained(study, units, [recipe.name], ("content", "style"))]
        found = statistics.fmean(one.fidelity for one in made), -statistics.fmean(one.steps for one in made)
        log.info("%s: read right %.3f after %.0f steps", recipe.name, found[0], -found[1])
        return found

    return max(LORA_RATES, key=reached)
