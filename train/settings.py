"""What a setting is, and how one is read: from a file, from flags, from a widget; types, choices, ranges.

Standard library only, so that a host can check settings without torch. Which settings there are stands in `config`.
"""

import difflib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

Auto = Literal["auto"]
AUTO = "auto"

_LONGEST_SHOWN = 200

Settings = TypeVar("Settings")


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    trajectory: bool = True,
    key: bool = True,
    text: bool = False,
    numbers: bool = False,
) -> Any:
    """One field of a record of settings.

    Args:
        default: its value when none is given, MISSING where one must be.
        help: what it means, as `--help` shows it.
        low, high: the range of a number, both included.
        trajectory: a run that is resumed must have the same.
        key: it is part of what identifies a run.
        numbers: its list may hold whole numbers, which are kept as texts.
        text: it ends in a file or a tokenizer and must be valid Unicode; a path may hold whatever its system gave.
    """
    details = {
        "help": help,
        "low": low,
        "high": high,
        "trajectory": trajectory,
        "key": key,
        "text": text,
        "numbers": numbers,
    }
    metadata = MappingProxyType(details)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def load_settings(path: Path) -> dict[str, Any]:
    """The table in a .toml or .json file.

    Raises:
        ConfigError: another ending, not readable, or not a table.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editor writes a byte order mark
        if path.suffix.lower() == ".json":
            values = json.loads(text)
        elif path.suffix.lower() == ".toml":
            values = _toml()(text)
        else:
            raise ConfigError(f"{path.name}: settings are read from .toml or .json files")
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        # Windows paths are the commonest mistake: TOML and JSON take a backslash for the start of an escape
        hint = "; write backslashes double, or the text in single quotes" if "\\" in str(error) else ""
        hint = hint or ("; write backslashes double" if "escape" in str(error).lower() else "")
        raise ConfigError(f"{path.name} is not valid: {error}{hint}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} holds {type(values).__name__}, expected a table of settings")
    return values


def make_config(kind: type[Settings], *sources: Mapping[str, Any]) -> Settings:
    """A checked record of settings from tables of settings; later ones win.

    Raises:
        ConfigError: a key that `kind` does not have, one that is missing, or a value that does not fit.
    """
    specs = {spec.name: spec for spec in fields(kind)}  # type: ignore[arg-type]  # every record of settings is a dataclass
    values: dict[str, Any] = {}
    for source in sources:
        for key, value in source.items():
            if key not in specs:
                close = difflib.get_close_matches(key[:_LONGEST_SHOWN], specs, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"unknown setting {shown(key)}{hint}")
            values[key] = _converted(specs[key], value)
    missing = [name for name, spec in specs.items() if spec.default is MISSING and name not in values]
    if missing:
        raise ConfigError(f"missing settings: {', '.join(missing)}")
    return kind(**values)


def choices(spec: "Field[Any]") -> tuple[str, ...] | None:
    """The allowed strings of a setting, "auto" first where it is one; None when it is free."""
    if get_origin(spec.type) is Literal:
        return get_args(spec.type)
    if may_be_auto(spec) and plain_type(spec) is str:
        return (AUTO, *(name for part in get_args(spec.type) for name in get_args(part) if name != AUTO))
    return None


def may_be_auto(spec: "Field[Any]") -> bool:
    """Whether a setting may be left to the trainer."""
    return spec.default == AUTO and get_origin(spec.type) is Union


def plain_type(spec: "Field[Any]") -> Any:
    """What a setting's value is when it is not "auto": bool, int, float, str or tuple."""
    kind: Any = spec.type
    if may_be_auto(spec):
        kind = next((part for part in get_args(spec.type) if get_origin(part) is not Literal), str)
    return tuple if get_origin(kind) is tuple else str if get_origin(kind) is Literal else kind


def check(config: Any) -> None:
    """Types, choices and ranges of every field; a value of the wrong type never gets further."""
    for spec in fields(config):
        value, wanted, allowed = getattr(config, spec.name), plain_type(spec), choices(spec)
        if allowed is not None:
            if value not in allowed:
                raise ConfigError(f"{spec.name} is {shown(value)}, expected one of {', '.join(allowed)}")
            continue
        if value == AUTO and may_be_auto(spec):
            continue
        if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
            alternative = " or auto" if may_be_auto(spec) else ""
            raise ConfigError(f"{spec.name} is {shown(value)}, expected {wanted.__name__}{alternative}")
        if isinstance(value, str):
            _check_text(spec, value)
        if isinstance(value, tuple) and not all(isinstance(item, str) and item for item in value):
            raise ConfigError(f"{spec.name} is {shown(value)}, expected a list of names")
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = spec.metadata["low"], spec.metadata["high"]
            if not low <= value <= high:  # NaN is in no range
                raise ConfigError(f"{spec.name} is {shown(value)}, expected {low:g} to {high:g}")


def shown(value: Any) -> str:
    """A value as a message shows it. A number of 5000 digits, as TOML's 0xfff... gives one, cannot be printed."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} of {value.bit_length()} bits" if isinstance(value, int) else "too deep"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"


def _check_text(spec: "Field[Any]", value: str) -> None:
    if "\0" in value or (spec.default is MISSING and not value):
        raise ConfigError(f"{spec.name} is {shown(value)}, expected a path")
    # a text that no tokenizer and no file takes would fail at the end
    if spec.metadata["text"] and any(0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise ConfigError(f"{spec.name} is {shown(value)}, which is not valid Unicode text: retype it")


def _converted(spec: "Field[Any]", value: Any) -> Any:
    """JSON and TOML know no tuples and write 1 for 1.0 and lists of numbers; nothing else is converted."""
    kind = plain_type(spec)
    if kind is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(str(item) if spec.metadata["numbers"] and type(item) is int else item for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):  # the range check says what is wrong with a number of 400 digits
            return float(value)
        return math.inf
    return value


def _toml() -> Any:
    for name in ("tomllib", "tomli"):
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name).loads
    raise ConfigError("TOML needs Python 3.11 or the package tomli; a .json file works everywhere")
