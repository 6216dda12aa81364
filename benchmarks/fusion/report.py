"""The study's results as a table, a JSON file and one picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from .fusions import Fusion, Schedule
from .learn import RECIPES, Learned
from .measures import Numbers, difference, gain, interval, mean
from .protocol import SIDES, Unit
from .tuning import Single

Results = Mapping[str, Sequence[Numbers]]  # method -> numbers of the units, in their order
# fields that have intervals, and how a table calls them
COLUMNS = {
    "h": "H",
    "words": "other words",
    "colour": "colour beside both",
    "h_colour": "H there",
    "joint": "all right",
}
GOAL = {"h": 0.9, "words": 0.8}


def table(results: Results, units: Sequence[Unit], columns: Mapping[str, str] = COLUMNS) -> str:
    """One line for each method, with 95 % intervals of a bootstrap over contents and styles."""
    lines = [_line(["method", "content", "style", *columns.values()]), "|---" * (3 + len(columns)) + "|"]
    lines += [_line([name, row(rows, units, columns)]) for name, rows in results.items()]
    return "\n".join(lines)


def row(rows: Sequence[Numbers], units: Sequence[Unit], columns: Mapping[str, str] = COLUMNS) -> str:
    """One method's cells."""
    means = mean(rows)
    intervals = [str(interval([getattr(one, field) for one in rows], units)) for field in columns]
    return " | ".join([f"{means.content:.2f}", f"{means.style:.2f}", *intervals])


def comparison(results: Results, reference: str, units: Sequence[Unit], columns: Mapping[str, str] = COLUMNS) -> str:
    """Paired differences from one method."""
    lines = [_line([f"minus {reference}", *columns.values()]), "|---" * (1 + len(columns)) + "|"]
    for name, rows in results.items():
        if name != reference:
            cells = [str(difference(rows, results[reference], one, units)) for one in columns]
            lines.append(_line([name, *cells]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def fidelity(adapters: Sequence[tuple[str, str, Unit, Learned]]) -> str:
    """Steps of the single adapters and how often they are read right on words of training, by recipe and side."""
    lines = ["| adapters | side | steps | read alone | lowest |", "|---|---|---|---|---|"]
    for recipe in dict.fromkeys(row[0] for row in adapters):
        for side in SIDES:
            made = [one for name, which, _, one in adapters if (name, which) == (recipe, side)]
            steps, shares = [one.steps for one in made], [one.fidelity for one in made]
            means = f"{sum(steps) / len(steps):.0f} | {sum(shares) / len(shares):.2f} | {min(shares):.2f}"
            lines.append(f"| {recipe} (rank {RECIPES[recipe].rank}) | {side} | {means} |")
    return "\n".join(lines)


def curve(rows: Sequence[Single]) -> str:
    """Concept shown against rest unchanged, a line for each adapter and strength.

    And how much more of the rest than plain training at lower strength, and with fewer steps, where those show the
    concept as often.
    """
    plain = {row.strength: row for row in rows if row.name == "qr"}
    fewer = [row for row in rows if row.name.startswith("qr") and row.strength == 1]
    lines = [
        _line(["adapter alone", "strength", "concept shown", "rest unchanged", "over weaker", "over fewer steps"]),
        "|---" * 6 + "|",
    ]
    for row in rows:
        cells = [row.name, f"{row.strength:g}", f"{fmean(row.shown):.2f}", f"{fmean(row.rest):.2f}"]
        for others in (list(plain.values()), fewer):
            own = row.name.startswith("qr")
            cells.append("" if own else str(gain(row.shown, row.rest, [(one.shown, one.rest) for one in others])))
        lines.append(_line(cells))
    return "\n".join(lines)


def in_words(schedule: Schedule) -> str:
    """A schedule, from noise to picture."""
    if not schedule:
        return "none"
    parts = [f"content {one.content:g}, style {one.style:g} to sigma {one.down_to:g}" for one in schedule]
    return "; ".join(parts)


def chosen(fusions: Sequence[Fusion]) -> str:
    """What was chosen on tuning units."""
    lines = ["| method | both triggers | style alone | content alone |", "|---|---|---|---|"]
    for one in fusions:
        alone = [in_words(one.style), in_words(one.content)] if one.gate else ["as both", "as both"]
        lines.append(f"| {one.name} | {' | '.join([in_words(one.both), *alone])} |")
    return "\n".join(lines)


def save(path: Path, units: Sequence[Unit], results: Results, facts: Mapping[str, object]) -> Path:
    """Everything that the tables are made from, as JSON."""
    every = {name: {unit.name: row._asdict() for unit, row in zip(units, rows)} for name, rows in results.items()}
    path.write_text(json.dumps({**facts, "results": every}, indent=1), encoding="utf-8")
    return path


def picture(results: Results, units: Sequence[Unit], path: Path) -> Path:
    """H against other words, a point for each method with its intervals; the goal is the corner at the upper right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.fill_between((GOAL["words"], 1.02), GOAL["h"], 1.02, color="0.9", label="goal")
    for number, (name, rows) in enumerate(results.items()):
        words, h = (interval([getattr(row, field) for row in rows], units) for field in ("words", "h"))
        axes.errorbar(
            words.mean,
            h.mean,
            xerr=[[words.mean - words.low], [words.high - words.mean]],
            yerr=[[h.mean - h.low], [h.high - h.mean]],
            marker="osD^vP*X"[number % 8],
            color=f"C{number % 10}",
            elinewidth=0.6,
            label=name,
        )
    axes.set(
        xlim=(0, 1.02), ylim=(0, 1.02), xlabel="other words right, both adapters on", ylabel="both concepts shown, H"
    )
    figure.legend(fontsize=8, loc="outside right upper")  # as many methods as these leave no room inside
    figure.savefig(path)
    return path
