"""What arrives at a node's sockets, looked at in one place before the node runs.

The host compares the types of two ends of a link, and no more: a constant in the place of a link, and whatever comes
out of a wildcard ("Any", switches, reroutes of other packs), reach a node as they are; its ranges let NaN pass.
"""

import functools
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from comfy_api.latest import io

from ..qrlora_core import MergeRecipe, Residual, SettingError
from . import sockets

_SHOWN = 60


class Expected(NamedTuple):
    """What a socket takes: a test, what to call it, and where it comes from."""

    fits: Callable[[Any], bool]
    title: str
    advice: str


def _with(*names: str) -> Callable[[Any], bool]:
    """The host's objects, and those of other packs that behave like them."""
    return lambda value: all(hasattr(value, name) for name in names)


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


_SOCKETS: Mapping[str, Expected] = {
    sockets.DeltaR.io_type: Expected(
        lambda value: isinstance(value, MergeRecipe),
        "a \u0394R adapter or merge",
        "connect Load \u0394R Adapter or Merge \u0394R",
    ),
    sockets.Residual.io_type: Expected(
        lambda value: isinstance(value, Residual), "a residual", "connect Load FLUX Residual"
    ),
    sockets.TrainOptions.io_type: Expected(_with("fit_fields"), "options of training", "connect Train \u0394R Options"),
    "MODEL": Expected(_with("model", "clone"), "a model", "connect a model loader"),
    "CLIP": Expected(
        _with("tokenize", "encode_from_tokens_scheduled"),
        "a text encoder",
        "connect a CLIP loader; some checkpoints hold none",
    ),
    "VAE": Expected(_with("encode", "decode"), "a VAE", "connect Load VAE"),
    "HOOKS": Expected(_with("hooks", "clone"), "hooks", "connect a node that makes hooks"),
    "LORA_STACK": Expected(lambda value: isinstance(value, list | tuple), "a stack of LoRAs", "connect a LoRA stacker"),
    "IMAGE": Expected(
        lambda value: isinstance(value, torch.Tensor) and value.dim() == 4, "pictures", "connect Load Image"
    ),
    "SIGMAS": Expected(
        lambda value: isinstance(value, torch.Tensor) and value.dim() == 1, "sigmas", "connect a scheduler"
    ),
    "STRING": Expected(lambda value: isinstance(value, str), "a text", "connect or write one"),
    "COMBO": Expected(lambda value: isinstance(value, str), "one of the listed words", "choose one"),
    "INT": Expected(lambda value: isinstance(value, Integral), "a whole number", "write one"),
    "FLOAT": Expected(_is_finite, "a finite number", "write one"),
    "BOOLEAN": Expected(lambda value: isinstance(value, Integral), "on or off", "choose one"),
}


class Node(io.ComfyNode):
    """A node whose `execute` sees nothing but what its sockets promise."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        execute = cls.__dict__.get("execute")
        if execute is not None and not hasattr(execute.__func__, "__wrapped__"):  # the host copies classes, methods too
            cls.execute = classmethod(_checked(execute.__func__))


def _checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    remembered: dict[str, Any] = {}

    @functools.wraps(execute)
    def run(cls: Any, *args: Any, **values: Any) -> io.NodeOutput:
        if not remembered:
            schema = cls.define_schema()
            remembered.update(
                {"lists": bool(schema.is_input_list), "inputs": {entry.id: entry for entry in schema.inputs}}
            )
        return execute(cls, *args, **arrived(remembered["inputs"], values, remembered["lists"]))

    return run


def arrived(inputs: Mapping[str, Any], values: Mapping[str, Any], lists: bool = False) -> dict[str, Any]:
    """The values without those optional ones that are empty, which then are what they are by default.

    Args:
        inputs: name -> the schema's input.
        values: what the host passes.
        lists: whether each of them is a list, of what other nodes get one by one.

    Raises:
        SettingError: one is missing or of another kind; the message names the input and what to connect.
    """
    kept = {}
    for name, value in values.items():
        entry = inputs.get(name)
        expected = entry and _SOCKETS.get(entry.get_io_type())
        if entry is None or expected is None:
            kept[name] = value
            continue
        items = list(value) if lists and isinstance(value, list | tuple) else [value]
        if entry.optional and all(item is None for item in items):
            continue
        for item in items:
            if item is None and not entry.optional:
                raise SettingError(f"{name} is empty, expected {expected.title}: {expected.advice}")
            if item is not None and not expected.fits(item):
                raise SettingError(f"{name} is {_shown(item)}, expected {expected.title}: {expected.advice}")
        kept[name] = value
    return kept


def _shown(value: Any) -> str:
    """A value in a few letters, whatever it is."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, str | Real):
        if isinstance(value, Integral) and abs(value) >= 10**_SHOWN:
            return "a number of more digits than any setting has"
        text = ascii(value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"of type {type(value).__name__}"
