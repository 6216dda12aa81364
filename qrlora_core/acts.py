"""The ways in which a merge of two acts, by the names that a person chooses from."""

from collections.abc import Callable
from typing import NamedTuple

from .adapter import Adapter
from .errors import SettingError
from .gate import Gate, content_gate, content_pass_gate, style_gate, style_pass_gate, triggers_of
from .merge import OnMismatch, merge
from .recipe import MergeRecipe

GateMaker = Callable[[tuple[str, ...], tuple[str, ...], float | None, str | None], Gate]


class Act(NamedTuple):
    """One way.

    Attributes:
        by_prompt: each adapter acts only on prompts that hold its trigger.
        content_first: where both are asked for, content acts above a sigma and style below it.
        one_pass_each: predictions are added instead of weights, see `passes`.
    """

    by_prompt: bool
    content_first: bool
    one_pass_each: bool


ACTS = {
    "always": Act(False, False, False),
    "by prompt": Act(True, False, False),
    "by prompt, content first": Act(True, True, False),
    "by prompt, one pass each": Act(True, False, True),
    "always, one pass each": Act(False, False, True),
}


class Triggers(NamedTuple):
    """Words that call style and content, separated by commas; "" for those that the files state."""

    style: str = ""
    content: str = ""


AS_STATED = Triggers()


def merge_acting(
    style: MergeRecipe,
    alpha: float,
    content: MergeRecipe,
    beta: float,
    *,
    act: str = "always",
    switch: float = 0.5,
    triggers: Triggers = AS_STATED,
    prompt: str | None = None,
    on_basis_mismatch: OnMismatch = "stack",
) -> MergeRecipe:
    """`alpha * style + beta * content`, acting in one of the ACTS.

    Args:
        style, content, alpha, beta, on_basis_mismatch: see `merge`.
        act: a name of ACTS.
        switch: sigma from which on style acts, for content first.
        triggers: an adapter without any keeps acting on every prompt.
        prompt: see `Gate`.

    Raises:
        SettingError: there is no such way.
        QRLoRAError: see `merge`.
    """
    if act not in ACTS:
        raise SettingError(f"act is {act!r}; it is one of {', '.join(ACTS)}")
    way = ACTS[act]
    if way.by_prompt:
        moment = switch if way.content_first else None
        words = triggers_of_both(style, content, triggers)
        of_style, of_content = (style_pass_gate, content_pass_gate) if way.one_pass_each else (style_gate, content_gate)
        style = style.gated(_gates(of_style, triggers.style, words[1], moment, prompt))
        content = content.gated(_gates(of_content, triggers.content, words[0], moment, prompt))
    if way.one_pass_each:
        style, content = style.in_own_pass(), content.in_own_pass()
    return merge(style, alpha, content, beta, on_basis_mismatch)


def triggers_of_both(
    style: MergeRecipe, content: MergeRecipe, given: Triggers
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every trigger of the style's adapters once, and of the content's."""
    return _triggers(style, given.style), _triggers(content, given.content)


def _triggers(recipe: MergeRecipe, given: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for adapter in recipe.adapters for word in triggers_of(adapter, given)))


def _gates(
    make: GateMaker, given: str, rivals: tuple[str, ...], switch: float | None, prompt: str | None
) -> Callable[[Adapter], Gate | None]:
    """The gate of each adapter; one without a trigger keeps acting everywhere, and the report says so."""

    def gate_of(adapter: Adapter) -> Gate | None:
        words = triggers_of(adapter, given)
        return make(words, rivals, switch, prompt) if words else None

    return gate_of
