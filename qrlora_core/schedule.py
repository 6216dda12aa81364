"""A strength over the sampling, as data: points on a line from the first step to the last, or over sigma."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from .blocks import parse_factor
from .errors import SettingError
from .written import split_points

Over = Literal["steps", "sigma"]

# The whole sampling runs from 0 to 1; two points at one place are a jump.
PRESETS = {
    "constant": "0: 1",
    "early": "0: 1, 0.5: 1, 0.5: 0",
    "late": "0: 0, 0.5: 0, 0.5: 1",
    "fade in": "0: 0, 1: 1",
    "fade out": "0: 1, 1: 0",
    "middle": "0: 0, 0.25: 0, 0.4: 1, 0.6: 1, 0.75: 0",
}
MAX_POINTS = 100
_LONGEST = 4000
_POINT = re.compile(r"([^:]{1,40}):([^:]{1,40})")
_CONTENT_FIRST = re.compile(r"content first(?: ([-+.\w]{1,40}))?", re.IGNORECASE)
_SIDE = re.compile(r"(?:(style|content)\s*:\s*)?(.*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A factor that follows the sampling, linear between its points and constant outside of them.

    Attributes:
        points: (place, factor) in the order of the sampling; two of one place are a jump, from the first's factor to
            the second's, which holds from that place on.
        over: "steps": a place is the part of the sampling that is done, 0 at the first step and 1 at the end. "sigma":
            a place is the noise level, 1 pure noise and 0 the picture, for models whose sigma runs so.
    """

    points: tuple[tuple[float, float], ...]
    over: Over = "steps"

    def factor(self, place: float) -> float:
        """The factor at a place; sigma falls while the steps rise, so either is followed in its own direction."""
        sign = -1.0 if self.over == "sigma" else 1.0
        where = sign * place
        before = None
        for position, value in self.points:
            if sign * position > where:
                if before is None:
                    return value
                start, first = before
                share = (where - start) / (sign * position - start)
                return first + share * (value - first)
            before = (sign * position, value)
        return self.points[-1][1]

    @property
    def constant(self) -> float | None:
        """The factor, when it is the same everywhere."""
        factors = {value for _, value in self.points}
        return factors.pop() if len(factors) == 1 else None

    def __str__(self) -> str:
        text = ", ".join(f"{position:g}: {value:g}" for position, value in self.points)
        return f"{'sigma ' if self.over == 'sigma' else ''}{text}"


def parse_schedule(text: str, over: Over = "steps") -> Schedule:
    """Read "0: 1, 0.3: 1, 0.6: 0": places and factors, separated by commas, semicolons or lines.

    A decimal comma is understood ("0,5: 1"), because every part has a colon.

    Args:
        text: the points. For "steps" they rise from 0 to 1, for "sigma" they fall.
        over: what a place is.

    Raises:
        SettingError: nothing is there, a part cannot be read or is out of range, or the places go back.
    """
    if len(text) > _LONGEST:
        raise SettingError(f"schedule: {len(text)} letters are too many; write a few points as in '0: 1, 0.5: 0'")
    points: list[tuple[float, float]] = []
    for part in split_points(text, _POINT.fullmatch):
        match = _POINT.fullmatch(part)
        if not match:
            raise SettingError(f"schedule: {part!r} is not a point; write a place and a factor, as in '0.5: 1'")
        place = parse_factor(match[1], f"schedule: {part!r}") if over == "steps" else _sigma(match[1], part)
        if over == "steps" and not 0 <= place <= 1:
            raise SettingError(f"schedule: in {part!r} the place {place:g} is outside of 0 (first step) to 1 (the end)")
        points.append((place, parse_factor(match[2], f"schedule: {part!r}")))
    if not points:
        raise SettingError("schedule is empty; write points as in '0: 1, 0.3: 1, 0.6: 0'")
    if len(points) > MAX_POINTS:
        raise SettingError(f"schedule: {len(points)} points are too many, {MAX_POINTS} are allowed")
    sign = 1 if over == "steps" else -1
    for (place_before, _), (place_after, _) in pairwise(points):
        if sign * place_after < sign * place_before:
            way = "rise" if over == "steps" else "fall, as sigma does in sampling"
            raise SettingError(f"schedule: places must {way}; {place_after:g} comes after {place_before:g}")
    return Schedule(tuple(points), over)


def content_first(switch: float = 0.5) -> tuple[Schedule, Schedule]:
    """Schedules for style and content: the content while sigma is above `switch`, then the style.

    Raises:
        SettingError: `switch` is not between 0 and 1.
    """
    if not 0 < switch < 1:
        raise SettingError(f"the switch between content and style is {switch:g}; use a sigma between 0 and 1")
    style = Schedule(((1.0, 0.0), (switch, 0.0), (switch, 1.0), (0.0, 1.0)), "sigma")
    content = Schedule(((1.0, 1.0), (switch, 1.0), (switch, 0.0), (0.0, 0.0)), "sigma")
    return style, content


@dataclass(frozen=True, slots=True)
class SchedulePair:
    """A schedule for each side of a merge, as one line of a list says it; None: that side is constant."""

    label: str
    style: Schedule | None
    content: Schedule | None


def parse_schedule_pairs(text: str, what: str = "schedules") -> tuple[SchedulePair, ...]:
    """Read a list of schedules, one in each line; what occurs twice counts once.

    A line is a preset ("fade in", "constant"), points ("0: 1, 0.5: 0", over sigma as "sigma 1: 1, 0.5: 0"), or
    "content first", also with its sigma ("content first 0.4"). Both sides follow it, or the one that it names:
    "style: late", "style: late | content: early".

    Raises:
        SettingError: nothing is there, or a line cannot be read; the message shows it.
    """
    if len(text) > _LONGEST:
        raise SettingError(f"{what}: {len(text)} letters are too many; write one schedule in each line")
    lines = dict.fromkeys(" ".join(line.split()) for line in text.splitlines() if line.strip())
    if not lines:
        raise SettingError(f"{what} is empty; write one in each line, as in 'content first' or 'style: late'")
    return tuple(_pair(line, f"{what}: {line!r:.80}") for line in lines)


def _pair(line: str, where: str) -> SchedulePair:
    label = line.replace(",", ";")  # a comma would end it in the label of a picture
    switched = _CONTENT_FIRST.fullmatch(line)
    if switched:
        with _errors_naming(where):
            style, content = content_first(parse_factor(switched[1], where) if switched[1] else 0.5)
        return SchedulePair(label, style, content)
    sides: dict[str, Schedule | None] = {}
    for part in line.split("|"):
        side, written = _SIDE.fullmatch(part.strip()).groups()  # type: ignore[union-attr]  # it matches anything
        name = (side or "both").lower()
        if name in sides or (len(sides) == 1 and "both" in (name, *sides)):
            raise SettingError(f"{where} says one side twice; write 'style: late | content: early'")
        sides[name] = _named(written, where)
    return SchedulePair(label, sides.get("style", sides.get("both")), sides.get("content", sides.get("both")))


def _named(text: str, where: str) -> Schedule | None:
    """A preset or points; None where they are 1 throughout."""
    preset = PRESETS.get(text.lower())
    over: Over = "sigma" if preset is None and text.lower().startswith("sigma ") else "steps"
    if preset is None and not any(letter.isdigit() for letter in text):
        raise SettingError(f"{where}: there is no schedule {text!r}; use one of {', '.join(PRESETS)}, or points")
    with _errors_naming(where):
        schedule = parse_schedule(preset or (text[len("sigma ") :] if over == "sigma" else text), over)
    return None if schedule.constant == 1 else schedule


@contextmanager
def _errors_naming(where: str) -> Iterator[None]:
    """Raise the SettingErrors of the block again, with the line of the list in front."""
    try:
        yield
    except SettingError as error:
        raise SettingError(f"{where}: {str(error).removeprefix(where + ': ').removeprefix('schedule: ')}") from None


def _sigma(text: str, part: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise SettingError(f"schedule: in {part!r} {text.strip()!r} is not a number") from None
    if not 0 <= value <= 1000:  # false for NaN too
        raise SettingError(f"schedule: in {part!r} the sigma {text.strip()} is out of range; use 0 to 1000")
    return value
