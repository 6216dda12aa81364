"""Which factor each term has at one evaluation of the model: by sigma, by the step, and by the prompt."""

import logging
import math
import uuid
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ...qrlora_core import Schedule, Term

log = logging.getLogger(__name__)

# The mark that QR-LoRA Prompt puts into a conditioning: the text that it was made of
PROMPT = "qrlora_prompt"

_PASSES = uuid.UUID("6a1d9b5e-58f3-4c0e-9b63-3f4f0f3c7a11")  # any; it tells our ids from others
_BEYOND_FLOW = 1.5  # the sigma of flow models runs from 1 to 0, that of SDXL from about 15
_SAME = 1e-5

Factors = tuple[float, ...]


class Noise(NamedTuple):
    """Where a sampling is.

    Attributes:
        level: sigma, 1 to 0; for models whose sigma goes beyond 1 (SDXL) it is `sigma / (1 + sigma)`.
        done: the part of the steps that lies behind, 0 to 1.
    """

    level: float
    done: float


def noise_of(sigma: float, course: Sequence[float]) -> Noise:
    """The place of a sigma in a sampling along these falling sigmas; between two of them in proportion.

    Args:
        sigma: of one evaluation.
        course: the sigmas of all steps, the last one included; empty where the host does not say.
    """
    level = sigma / (1.0 + sigma) if max(course, default=sigma) > _BEYOND_FLOW else sigma
    steps = len(course) - 1
    for index, (high, low) in enumerate(pairwise(course)):
        if sigma >= high - _SAME * max(high, 1.0):
            return Noise(level, index / steps)
        if sigma > low:
            return Noise(level, (index + (high - sigma) / (high - low)) / steps)
    return Noise(level, 1.0 if steps > 0 else 0.0)


def ids_of_pass(options: dict[str, Any], table: Sequence[Factors]) -> dict[str, Any]:
    """The host's options of one of several passes of a step, with ids of its own for the conditionings.

    What keeps results by these ids, as the host's EasyCache does, would else answer a pass with another one's result.
    The same terms acting on the same conditioning have the same id at every step.
    """
    keys = options.get("uuids")
    if not keys:
        return options
    rows = table if len(table) == len(keys) else [table[0]] * len(keys)
    acting = ("".join("1" if factor else "0" for factor in row) for row in rows)
    return {**options, "uuids": [uuid.uuid5(_PASSES, f"{key} {terms}") for key, terms in zip(keys, acting)]}


class StepReader:
    """Looks factors up, and remembers which text each conditioning of this sampling was made of."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        self.by_prompt = any(term.gate for term in self.terms)
        self.own_passes = tuple(term.own_pass for term in self.terms)
        self.fixed = not any(term.gate or term.schedules for term in self.terms)
        self._texts: dict[Any, str | None] = {}
        self._course: tuple[Any, tuple[float, ...]] = (None, ())
        self._warned = False

    def note_conditionings(self, conds: Any) -> None:
        """Remember the marks of the host's conditionings: lists of dictionaries, one list for each kind."""
        if self.by_prompt:
            self._texts = {
                entry["uuid"]: entry.get(PROMPT) for kind in conds if kind for entry in kind if "uuid" in entry
            }

    def factors(self, options: dict[str, Any], sigmas: Any) -> tuple[Factors, ...]:
        """The factor of each term: one tuple for the whole batch, or one for each prompt in it.

        Args:
            options: the host's `transformer_options` of this evaluation.
            sigmas: of the batch, all alike.
        """
        if self.fixed:  # no need to wait for the device to tell sigma
            return (tuple(term.strength for term in self.terms),)
        noise = noise_of(float(sigmas.max()), self._sampled(options.get("sample_sigmas")))
        keys = tuple(options.get("uuids") or ())
        if not self.by_prompt or not keys:
            return (tuple(self._factor(term, noise, None, False) for term in self.terms),)
        kinds = tuple(options.get("cond_or_uncond") or ()) + (0,) * len(keys)
        return tuple(
            tuple(self._factor(term, noise, self._texts.get(key), kind == 1) for term in self.terms)
            for key, kind in zip(keys, kinds)
        )

    def _sampled(self, sigmas: Any) -> tuple[float, ...]:
        """The sigmas of all steps as numbers, read off the device once for a sampling."""
        if sigmas is None:
            return ()
        if self._course[0] is not sigmas:
            self._course = (sigmas, tuple(float(sigma) for sigma in sigmas))
        return self._course[1]

    def _factor(self, term: Term, noise: Noise, prompt: str | None, negative: bool) -> float:
        schedules: list[Schedule] = list(term.schedules)
        if term.gate is not None:
            if prompt is None and term.gate.prompt is not None:
                prompt = "" if negative else term.gate.prompt
            if prompt is None:
                self._warn()
            else:
                by_prompt = term.gate.schedule(prompt)
                if by_prompt is False:
                    return 0.0
                if isinstance(by_prompt, Schedule):
                    schedules.append(by_prompt)
        factors = (schedule.factor(noise.level if schedule.over == "sigma" else noise.done) for schedule in schedules)
        return term.strength * math.prod(factors)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "QR-LoRA: a conditioning does not tell its prompt, so adapters act on it as without a gate; encode it "
                "with QR-LoRA Prompt, or connect the text to Merge \u0394R"
            )
