"""Grids of alpha, beta and schedules: lists written by a person, and one merge for every combination of them."""

from decimal import Decimal
from typing import NamedTuple

from .acts import merge_acting
from .blocks import parse_decimal, require_short, shortened
from .errors import SettingError
from .merge import OnMismatch
from .recipe import MergeRecipe
from .schedule import Schedule, SchedulePair, parse_schedule_pairs
from .written import split_numbers

MAX_COMBINATIONS = 100


class SweepCell(NamedTuple):
    """One picture of a grid: its factors, its label ("alpha=0.6, beta=1"), the merge, and its schedule's line."""

    alpha: float
    beta: float
    label: str
    recipe: MergeRecipe
    schedule: str = ""


def parse_scales(text: str, what: str) -> tuple[float, ...]:
    """Read "0.6, 0.8, 1.0", or "0:1:0.25" for first, last and step, or both together. What occurs twice counts once.

    Decimal commas are read where they can be told from separators, see `split_numbers`.

    Args:
        text: numbers from -4 to 4, separated by commas, semicolons or lines.
        what: how to call the text in messages.

    Raises:
        SettingError: nothing is there, a part cannot be read, or it gives too many numbers; the message shows it.
    """
    require_short(text, what)
    values: list[Decimal] = []
    for part in split_numbers(text, what, _is_number):
        values += _expanded(part, what)
        if len(values) > MAX_COMBINATIONS:
            part = shortened(part)
            raise SettingError(f"{what}: {part!r} gives more than {MAX_COMBINATIONS} numbers; take a larger step")
    if not values:
        raise SettingError(f"{what} is empty; write numbers as in '0.6, 0.8, 1.0' or first:last:step as in '0:1:0.25'")
    return tuple(float(value) for value in dict.fromkeys(values))


def sweep(
    style: MergeRecipe,
    alphas: str,
    content: MergeRecipe,
    betas: str,
    on_basis_mismatch: OnMismatch = "stack",
    act: str = "always",
    schedules: str = "",
) -> tuple[SweepCell, ...]:
    """Every combination of an alpha, a beta and a schedule; schedules change fastest, alphas slowest.

    Args:
        style, content: what to merge.
        alphas, betas: see `parse_scales`.
        on_basis_mismatch: see `merge`.
        act: how both act, see `merge_acting`.
        schedules: see `parse_schedule_pairs`; empty: constant strengths, and no schedule in the labels.

    Raises:
        SettingError: a list cannot be read, there are more than MAX_COMBINATIONS pictures, or `act` is no such way.
        BasisMismatchError, TargetError: see `merge`.
    """
    rows, columns = parse_scales(alphas, "alphas"), parse_scales(betas, "betas")
    pairs = parse_schedule_pairs(schedules) if schedules.strip() else (SchedulePair("", None, None),)
    count = len(rows) * len(columns) * len(pairs)
    if count > MAX_COMBINATIONS:
        listed = f"{len(rows)} alphas x {len(columns)} betas" + (f" x {len(pairs)} schedules" if schedules else "")
        raise SettingError(
            f"{listed} are {count} pictures, more than {MAX_COMBINATIONS}; make the lists shorter, or run them in parts"
        )

    def cell(alpha: float, beta: float, pair: SchedulePair) -> SweepCell:
        sides = (_scheduled(style, pair.style), alpha, _scheduled(content, pair.content), beta)
        merged = merge_acting(*sides, act=act, on_basis_mismatch=on_basis_mismatch)
        return SweepCell(alpha, beta, cell_label(alpha, beta, pair.label), merged, pair.label)

    return tuple(cell(alpha, beta, pair) for alpha in rows for beta in columns for pair in pairs)


def cell_label(alpha: float, beta: float, schedule: str = "") -> str:
    """The label of one picture, which a contact sheet reads its axes from."""
    return f"alpha={alpha:.10g}, beta={beta:.10g}" + (f", schedule={schedule}" if schedule else "")


def _scheduled(recipe: MergeRecipe, schedule: Schedule | None) -> MergeRecipe:
    return recipe if schedule is None else recipe.scheduled(schedule)


def _expanded(part: str, what: str) -> list[Decimal]:
    """One number, or all of a range. Decimals, so that 0:1:0.1 has 0.3 in it and ends at 1."""
    pieces, part = part.split(":"), shortened(part)
    if len(pieces) not in (1, 3):
        raise SettingError(f"{what}: {part!r} is not a range; write first:last:step, as in '0:1:0.25'")
    numbers = [_decimal(piece, part, what) for piece in pieces]
    if len(numbers) == 1:
        return numbers
    first, last, step = numbers
    if step == 0 or (last - first) * step < 0:
        raise SettingError(f"{what}: in {part!r} the step {step} does not lead from {first} to {last}")
    count = int((last - first) / step) + 1
    if count > MAX_COMBINATIONS:
        raise SettingError(f"{what}: {part!r} gives {count} numbers, more than {MAX_COMBINATIONS}; take a larger step")
    return [first + index * step for index in range(count)]


def _is_number(part: str) -> bool:
    """Whether a part is a factor, or a range."""
    try:
        return bool(_expanded(part, ""))
    except SettingError:
        return False


def _decimal(piece: str, part: str, what: str) -> Decimal:
    shown = shortened(piece.strip())
    return parse_decimal(piece, f"{what}: {shown!r}" + ("" if shown == part else f" in {part!r}"))
