"""What is judged by pairs that came later: nothing is chosen anew, but for one method that came later itself."""

import itertools
import logging
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from .fusions import Fusion, Schedule, Stage, content_first, fixed, half_then_full
from .learn import RECIPES, at_rate
from .measures import h
from .protocol import Unit
from .store import Study
from .tuning import MERGE, QUIET_PASSES, REFERENCE

log = logging.getLogger(__name__)

# what `tuned` chose on the tuning units: alpha, beta; plain LoRA's rate, its alpha and beta summed and with passes
BEST_FIXED = (0.8, 0.8)
LORA_RATE, LORA_FIXED, LORA_PASSES = 3e-3, (0.6, 0.6), (1.2, 2.5)


def led_schedules() -> list[Schedule]:
    """Candidates for predictions that are composed: the content leads from noise to a sigma, with less of the style."""
    every = itertools.product((0.6, 0.75), (2.0, 2.5, 3.0), (0.3, 0.5, 0.7), (1.5, 2.0, 2.5), (1.0, 1.2))
    return [(Stage(down_to, high, less), Stage(0, low, full)) for down_to, high, less, low, full in every]


def judged_last(study: Study, units: Sequence[Unit], without: Collection[str] = ()) -> Iterator[Fusion]:
    """Methods with what was chosen on tuning units, and one that came later.

    Args:
        study: of few pictures.
        units: what the later one is chosen on; it is left out where there are none.
        without: recipes whose adapters are left out.

    Yields:
        Methods with nothing left open.
    """
    yield Fusion("no adapter", both=())
    yield Fusion("plain sum")
    yield Fusion(REFERENCE, both=fixed(*BEST_FIXED))
    yield Fusion("prompt gate", gate=True)
    yield Fusion("content first", both=content_first(0.5))
    yield from MERGE
    if "lora" not in without:
        lora = at_rate(RECIPES["lora"], LORA_RATE).name
        yield Fusion("plain LoRA, own rate", lora)
        yield Fusion("plain LoRA, own rate and fixed factors", lora, fixed(*LORA_FIXED))
        yield Fusion("plain LoRA, own rate, gate + separate passes", lora, fixed(*LORA_PASSES), True, separate=True)
    if "null" not in without:
        yield replace(MERGE[-1], name=QUIET_PASSES, adapters="null")
    if units:
        yield led_by_content(study, units)


def led_by_content(study: Study, units: Sequence[Unit]) -> Fusion:
    """Separate passes in which the content leads: the schedule with the highest H, and the best for a style alone."""
    fusion = Fusion("gate + separate passes, content leads", gate=True, separate=True)

    def both(candidate: Fusion) -> float:
        shown = statistics.fmean(h(study.readings(candidate, unit, ["both"])["both"]) for unit in units)
        log.info("%s both %s: H %.3f", candidate.name, candidate.both, shown)
        return shown

    def style(candidate: Fusion) -> float:
        right = statistics.fmean(study.readings(candidate, unit, ["style"])["style"]["right"] for unit in units)
        log.info("%s style %s: all right %.3f", candidate.name, candidate.style, right)
        return right

    fusion = max((replace(fusion, both=one) for one in led_schedules()), key=both)
    alone = [half_then_full(*one) for one in itertools.product((0.4, 0.5, 0.6, 0.75), (0.3, 0.5, 0.7))]
    return max((replace(fusion, style=one) for one in alone), key=style)
