"""LORA_STACK, the list that LoRA stackers, Lora Manager and Efficiency nodes hand on: read it, add to it."""

import types
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..qrlora_core import SettingError

LoraStack = io.Custom("LORA_STACK")
Entry = tuple[str, float, float]


def stack_input(tooltip: str) -> Any:
    """A stack that a node adds its own file to."""
    return LoraStack.Input("lora_stack", optional=True, tooltip=tooltip)


def stack_output(tooltip: str) -> Any:
    return LoraStack.Output(display_name="lora_stack", tooltip=tooltip)


def stack_entries(stack: Any) -> Sequence[Entry]:
    """(name, model strength, CLIP strength) of a stack; entries without a file ("None") are left out.

    Raises:
        SettingError: it is no such list.
    """
    if not isinstance(stack, list | tuple | types.NoneType):
        raise SettingError(f"lora_stack is {type(stack).__name__}, expected a list of (file, strength, strength)")
    entries = []
    for entry in stack or ():
        try:
            name, strength, clip = entry
            checked = (str(name), float(strength), float(clip))
        except (TypeError, ValueError) as error:
            raise SettingError(
                f"lora_stack holds {str(entry)[:80]!r}, expected (file, model strength, CLIP strength)"
            ) from error
        if checked[0] and checked[0] != "None":
            entries.append(checked)
    return entries


def with_file(stack: Any, name: str) -> list[Entry]:
    """A stack with one more file at full strength; ours hold nothing for text encoders."""
    return [*stack_entries(stack), (name, 1.0, 0.0)]
