"""Acting by the prompt: a term takes part only where a prompt's text holds its trigger."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .adapter import Adapter
from .blocks import LONGEST_TEXT, require_short
from .errors import SettingError
from .schedule import Schedule, content_first

# Attention weights and escapes of ComfyUI's prompt syntax: "(<c>:1.2)", "((dog))", "\\("
_SYNTAX = re.compile(r"\\([()])|[()\[\]{}]|:\s*[+-]?\d+(?:\.\d+)?(?=\s*[)\]}]|$)")
MAX_TRIGGERS = 100
# What did best on the tuning pairs of the study (docs/fusion.md) where predictions are composed
DOUBLED, HALF_UNTIL = 2.0, 0.75
_EMPTY = re.compile(r"[(\[{]\s*(?::\s*[+-]?\d+(?:\.\d+)?)?\s*[)\]}]")  # what is left of "(<c>:1.2)"
_SPACE = re.compile(r"\s+")
_TRIGGER_KEYS = ("qrlora.trigger", "modelspec.trigger_phrase")


@dataclass(frozen=True, slots=True)
class Gate:
    """When a term acts, by the prompt and the sampling.

    Attributes:
        triggers: it acts only on prompts that hold one of them.
        rivals: the triggers of what it is merged with.
        alone: a factor over the sampling for prompts that hold none of the rivals.
        together: the same for prompts that hold one.
        prompt: the text of the positive prompt, for conditionings that do not tell theirs; the negative one is taken
            to hold no trigger then. None: such conditionings are acted on.
    """

    triggers: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    alone: Schedule | None = None
    together: Schedule | None = None
    prompt: str | None = None

    def schedule(self, prompt: str) -> Schedule | bool | None:
        """False: it does not act on this prompt. Otherwise its schedule there, or None for full strength."""
        if not any(holds(prompt, trigger) for trigger in self.triggers):
            return False
        return self.together if any(holds(prompt, rival) for rival in self.rivals) else self.alone

    def __str__(self) -> str:
        text = "where the prompt holds " + " or ".join(self.triggers)
        if self.alone is not None:
            text += f"; alone {self.alone}"
        if self.together is not None:
            text += f"; with {' or '.join(self.rivals)} {self.together}"
        return text


def holds(prompt: str, trigger: str) -> bool:
    """Whether a prompt holds a trigger as a word of its own, whatever its case, weight or brackets.

    "(<C>:1.2)" holds "<c>"; "sksdog" does not hold "sks", and a trigger of several words has to stand there whole.
    """
    text, word = _plain(prompt), _plain(trigger)
    if not word:
        return False
    before = r"(?<!\w)" if word[0].isalnum() else ""
    after = r"(?!\w)" if word[-1].isalnum() else ""
    return re.search(before + re.escape(word) + after, text) is not None


def without(prompt: str, triggers: Iterable[str]) -> str:
    """A prompt without these triggers; brackets and weights that held nothing else go with them.

    Where a trigger stands in a way that only `holds` sees (in brackets word by word), the prompt is taken in lower
    case and without brackets.
    """
    for word in triggers:
        prompt = _removed(prompt, word)
        if holds(prompt, word):
            prompt = _removed(_plain(prompt), word)
    return prompt


def plain_caption(caption: str, trigger: str) -> str | None:
    """A caption without the trigger that it was trained with; None where it holds none."""
    return without(caption, [trigger]) if holds(caption, trigger) else None


def triggers_of(adapter: Adapter, given: str = "") -> tuple[str, ...]:
    """The triggers of an adapter: `given`, separated by commas, or else those that its file states.

    A prompt is searched for every one of them: of what a file states only the first MAX_TRIGGERS count.

    Raises:
        SettingError: `given` holds more than MAX_TRIGGERS, or is longer than any person writes.
    """
    if given.strip():
        require_short(given, "the trigger")
        triggers = _words(given)
        if len(triggers) > MAX_TRIGGERS:
            raise SettingError(f"{len(triggers)} triggers are given, {MAX_TRIGGERS} are the most")
        return triggers
    stated = [adapter.metadata.get(key, "")[:LONGEST_TEXT] for key in _TRIGGER_KEYS]
    return _words(",".join(stated))[:MAX_TRIGGERS]


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def style_gate(
    triggers: tuple[str, ...], rivals: tuple[str, ...], switch: float | None, prompt: str | None = None
) -> Gate:
    """When a style acts: after the content where both are asked for, at half strength first where it is alone.

    Args:
        switch: the sigma between the two, 0 to 1; None: at full strength throughout.
    """
    if switch is None:
        return Gate(triggers, rivals, prompt=prompt)
    alone = Schedule(((1.0, 0.5), (switch, 0.5), (switch, 1.0), (0.0, 1.0)), "sigma")
    return Gate(triggers, rivals, alone, content_first(switch)[0], prompt)


def content_gate(
    triggers: tuple[str, ...], rivals: tuple[str, ...], switch: float | None, prompt: str | None = None
) -> Gate:
    """When a content acts: first, and then the style where both are asked for, or the base where it is alone."""
    if switch is None:
        return Gate(triggers, rivals, prompt=prompt)
    first = content_first(switch)[1]
    return Gate(triggers, rivals, first, first, prompt)


def style_pass_gate(
    triggers: tuple[str, ...], rivals: tuple[str, ...], switch: float | None = None, prompt: str | None = None
) -> Gate:
    """When a style acts that has a pass of its own: at once beside a content; alone at half strength first.

    Args:
        switch: the sigma where half strength ends; None: HALF_UNTIL.
    """
    half = HALF_UNTIL if switch is None else switch
    return Gate(triggers, rivals, style_gate(triggers, rivals, half).alone, None, prompt)


def content_pass_gate(
    triggers: tuple[str, ...], rivals: tuple[str, ...], _switch: float | None = None, prompt: str | None = None
) -> Gate:
    """When a content acts that has a pass of its own: throughout, and doubled beside a style."""
    return Gate(triggers, rivals, None, Schedule(((1.0, DOUBLED), (0.0, DOUBLED)), "sigma"), prompt)


def _removed(prompt: str, trigger: str) -> str:
    word = trigger.strip()
    if not word:
        return prompt
    pattern = r"\s+".join(re.escape(part) for part in word.split())
    before = r"(?<!\w)" if word[0].isalnum() else ""
    after = r"(?!\w)" if word[-1].isalnum() else ""
    text = re.sub(before + pattern + after, "", prompt, flags=re.IGNORECASE)
    while text != (emptied := _EMPTY.sub("", text)):
        text = emptied
    return _SPACE.sub(" ", text).strip()


def _plain(text: str) -> str:
    """Lower case, without weights, brackets and escapes, one space between words."""
    return _SPACE.sub(" ", _SYNTAX.sub(lambda match: match[1] or " ", text.casefold())).strip()
