"""Lists as people write them: separated by commas, and by people whose decimal sign is a comma."""

import re
from collections.abc import Callable

from .errors import SettingError

_SEPARATOR = re.compile(r"[,;\n]")
_DECIMAL = re.compile(r"(?<=\d),(?=\d)")
# Every separator but a comma between two digits
_OTHER = re.compile(r"[;\n]|,(?!\d)|(?<!\d),")
_ADVICE = "write decimals with a point, as in 0.5, or separate by semicolons, as in '0,5; 1'"


def split_points(text: str, is_part: Callable[[str], object]) -> list[str]:
    """The parts of a list whose parts hold more than a number, such as "0: 1, 0,5: 0".

    A comma separates, unless that gives what is no part: then a comma between two digits is a decimal one.

    Args:
        text: parts, separated by commas, semicolons or lines.
        is_part: whether a text has the form of a part.

    Returns:
        Without empty ones; decimal commas are points. Where neither reading serves, as commas separate.
    """
    plain = _parts(_SEPARATOR, text)
    if all(map(is_part, plain)):
        return plain
    decimal = _parts(_OTHER, text)
    return decimal if all(map(is_part, decimal)) else plain


def split_numbers(text: str, what: str, is_part: Callable[[str], object]) -> list[str]:
    """The parts of a list of plain numbers, such as "0.6, 0.8", "0,6; 0,8" or "0,5".

    With a decimal point anywhere commas separate. Otherwise a comma between two digits is a decimal one where
    semicolons separate, or where it can be nothing else: 5 is no factor, so "0,5" is a half. "0,1" is 0 and 1.

    Args:
        text: numbers, separated by commas, semicolons or lines.
        what: how to call the text in messages.
        is_part: whether a text can be one of the numbers.

    Raises:
        SettingError: some commas stand between numbers, some perhaps within, as in "0,1, 0,2".
    """
    plain, decimal = _parts(_SEPARATOR, text), _parts(_OTHER, text)
    if "." in text or not _DECIMAL.search(text) or not all(map(is_part, decimal)):
        return plain
    if ";" in text or not all(map(is_part, plain)):
        return decimal
    if len(decimal) > 1:
        raise SettingError(f"{what}: it is not clear which commas separate and which are decimal; {_ADVICE}")
    return plain


def _parts(separator: re.Pattern[str], text: str) -> list[str]:
    parts = [part.strip() for part in separator.split(text)]
    if separator is _OTHER:
        parts = [_DECIMAL.sub(".", part) for part in parts]
    return [part for part in parts if part]
