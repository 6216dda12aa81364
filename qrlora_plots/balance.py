"""A balance report as one picture: what shows against what drifts, act by act, and the grid of the chosen act."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from .figures import GRID, figure_image, new_figure
from .text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]

SIZE = (16.0, 8.0)
# act -> colour (Okabe and Ito's), marker
ACTS = {
    "always": ("#0072B2", "o"),
    "always, one pass each": ("#E69F00", "s"),
    "by prompt": ("#009E73", "^"),
    "by prompt, content first": ("#CC79A7", "D"),
    "by prompt, one pass each": ("#D55E00", "P"),
}
_OTHER = ("#000000", "x")
# where those stand that cannot drift, in a strip left of 0
STRIPS = {"by prompt": -0.03, "by prompt, content first": -0.07, "by prompt, one pass each": -0.11}


def balance_image(report: Report) -> Image.Image:
    """The picture, 1600 x 800, RGB. Arguments and errors as in `balance_figure`."""
    return figure_image(balance_figure(report))


def balance_figure(report: Report) -> "Figure":
    """Draw a report.

    Args:
        report: what `qrlora_core.balance_report` gives, or its JSON read back.

    Raises:
        PlotsUnavailableError: matplotlib is not installed.
    """
    with new_figure(SIZE) as figure:
        _frontiers(figure.add_axes((0.06, 0.1, 0.46, 0.78), label="frontiers"), report)
        chosen = report["chosen"]
        same = [cell for cell in report["cells"] if (cell["act"], cell["switch"]) == (chosen["act"], chosen["switch"])]
        for left, key, title in ((0.58, "style", "style"), (0.79, "content", "content")):
            axes = figure.add_axes((left, 0.32, 0.18, 0.42), label=key)
            _grid(axes, same, chosen, key, f"{title}: what of it survives")
        figure.text(0.58, 0.84, f"{chosen['act']}{_at(chosen)}", fontsize=13)
        figure.text(0.58, 0.8, _numbers(chosen), fontsize=10)
        lines = [f"{asked}: {_short(text)}" for asked, text in report["prompts"].items()]
        prompts = "\n".join(["prompts", *lines])
        figure.text(0.58, 0.22, prompts, fontsize=9, va="top", linespacing=1.4, parse_math=False)
    return figure


def _frontiers(axes: "Axes", report: Report) -> None:
    cells = report["cells"]
    for act in dict.fromkeys(cell["act"] for cell in cells):
        of_act = [cell for cell in cells if cell["act"] == act]
        colour, marker = ACTS.get(act, _OTHER)
        axes.scatter(
            [place(cell) for cell in of_act],
            [cell["shown"] for cell in of_act],
            color=colour, marker=marker, s=26, alpha=0.35, linewidth=1, clip_on=False,
        )  # fmt: skip
        best = sorted((cell for cell in of_act if cell["frontier"]), key=lambda cell: cell["drift"])
        drifts, shown = ([number_of(cell) for cell in best] for number_of in (place, lambda cell: cell["shown"]))
        axes.plot(drifts, shown, color=colour, marker=marker, linewidth=1.6, label=act, clip_on=False)
    chosen = report["chosen"]
    axes.scatter([place(chosen)], [chosen["shown"]], marker="*", s=330, color="#000000", zorder=5, clip_on=False)
    axes.annotate(
        f"{report['choice']}: alpha {chosen['alpha']:g}, beta {chosen['beta']:g}",
        (place(chosen), chosen["shown"]), xytext=(14, -16), textcoords="offset points", fontsize=11,
    )  # fmt: skip
    drifting = [cell["drift"] for cell in cells if cell["act"] not in STRIPS]
    left, right = (min(STRIPS.values()) - 0.03 if len(drifting) < len(cells) else 0.0), max([0.2, *drifting]) * 1.08
    axes.set_xlim(left, right)
    if left:
        axes.axvspan(left, 0, color=GRID, alpha=0.5, linewidth=0)
        axes.text(left / 2, 1.0, "by prompt", ha="center", va="top", fontsize=9)
    axes.set_ylim(0, 1.02)
    axes.set_title("what shows against what drifts; lines: settings that none of their act beats", loc="left")
    axes.set_xlabel("drift of a prompt without triggers (1: as much as both adapters change on their own prompts)")
    axes.set_ylabel("presence of the adapter that is worse off")
    axes.grid(color=GRID)
    axes.legend(loc="lower right", fontsize=9, frameon=True)


def place(cell: Report) -> float:
    """Where a setting stands from left to right."""
    return STRIPS[cell["act"]] if cell["act"] in STRIPS else float(cell["drift"])


def _grid(axes: "Axes", cells: Sequence[Report], chosen: Report, key: str, title: str) -> None:
    import numpy as np

    cells = [*cells, chosen]  # one by hand has a row and a column of its own where the grid has no such numbers
    alphas, betas = (sorted({cell[name] for cell in cells}) for name in ("alpha", "beta"))
    table = np.full((len(alphas), len(betas)), np.nan)
    for cell in cells:
        value = cell[key]
        table[alphas.index(cell["alpha"]), betas.index(cell["beta"])] = np.nan if value is None else value
    axes.imshow(table, cmap="cividis", vmin=0, vmax=1.5, aspect="auto", origin="lower")
    for row, column in np.ndindex(*table.shape):
        value = table[row, column]
        colour = "white" if not value > 0.8 else "black"
        axes.text(column, row, "" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", color=colour)
    axes.plot(
        [betas.index(chosen["beta"])], [alphas.index(chosen["alpha"])],
        marker="s", markersize=26, markerfacecolor="none", markeredgecolor="#D55E00", markeredgewidth=2.5,
    )  # fmt: skip
    axes.set_yticks(range(len(alphas)), [f"{value:g}" for value in alphas])
    axes.set_xticks(range(len(betas)), [f"{value:g}" for value in betas])
    axes.set_xlabel("beta (content)")
    if key == "style":
        axes.set_ylabel("alpha (style)")
    axes.set_title(title, loc="left", fontsize=10)


def _at(cell: Report) -> str:
    return "" if cell["switch"] is None else f", style from sigma {cell['switch']:g}"


def _numbers(cell: Report) -> str:
    parts = [
        f"{name} {cell[name]:.2f} of its effect, purity {cell[f'{name}_purity']:.2f}"
        for name in ("style", "content")
        if cell[name] is not None
    ]
    return "; ".join([*parts, f"drift {cell['drift']:.2f}"])


def _short(text: str, limit: int = 70) -> str:
    text = one_line(text)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"
