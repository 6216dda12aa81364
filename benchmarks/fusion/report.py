"""The study's results as a table, a JSON file and one picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .fusions import Fusion, Schedule
from .measures import Numbers, difference, interval, mean
from .protocol import VERSION, Unit

Results = Mapping[str, Sequence[Numbers]]  # method -> numbers of the units, in their order
GOAL = {"h": 0.9, "words": 0.8}


def table(results: Results) -> str:
    """One line for each method, with 95 % intervals of a bootstrap over units."""
    lines = [
        "| method | content | style | H | other words | extra word, both triggers | all right |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        means = mean(rows)
        cells = [f"{means.content:.2f}", f"{means.style:.2f}"]
        cells += [str(interval([getattr(row, field) for row in rows])) for field in ("h", "words", "extra", "joint")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison(results: Results, reference: str) -> str:
    """Paired differences from one method."""
    lines = [
        f"| minus {reference} | H | other words | extra word, both triggers | all right |",
        "|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        if name != reference:
            cells = [str(difference(rows, results[reference], one)) for one in ("h", "words", "extra", "joint")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
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


def save(folder: Path, units: Sequence[Unit], results: Results, facts: Mapping[str, object]) -> Path:
    """`results.json`: everything that the tables are made from."""
    path = folder / "results.json"
    every = {name: {unit.name: row._asdict() for unit, row in zip(units, rows)} for name, rows in results.items()}
    path.write_text(json.dumps({"version": VERSION, **facts, "results": every}, indent=1), encoding="utf-8")
    return path


def picture(results: Results, path: Path) -> Path:
    """H against other words, a point for each method with its intervals; the goal is the corner at the upper right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.fill_between((GOAL["words"], 1.02), GOAL["h"], 1.02, color="0.9", label="goal")
    for number, (name, rows) in enumerate(results.items()):
        words, h = (interval([getattr(row, field) for row in rows]) for field in ("words", "h"))
        spread = [[one.mean - one.low, one.high - one.mean] for one in (words, h)]
        axes.errorbar(
            words.mean,
            h.mean,
            xerr=[[spread[0][0]], [spread[0][1]]],
            yerr=[[spread[1][0]], [spread[1][1]]],
            marker="osD^vP*X"[number % 8],
            color=f"C{number % 10}",
            elinewidth=0.6,
            label=name,
        )
    axes.set(
        xlim=(0, 1.02), ylim=(0, 1.02), xlabel="other words right, both adapters on", ylabel="both concepts shown, H"
    )
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)
    return path
