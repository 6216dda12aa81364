"""A similarity report as one picture: every layer in network order, distributions, and a map of the network.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and every kind of layer has a marker of its own
besides.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .figures import GRID, figure_image, figure_png, new_figure
from .heat_maps import draw_heat_maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]

SIZE = (16.0, 23.0)
# part, stream -> label, colour, marker
KINDS = {
    ("attention", "image"): ("attention, image", "#0072B2", "o"),
    ("attention", "text"): ("attention, text", "#E69F00", "s"),
    ("feed_forward", "image"): ("feed-forward, image", "#009E73", "^"),
    ("feed_forward", "text"): ("feed-forward, text", "#CC79A7", "D"),
    ("attention", "both"): ("attention, single block", "#56B4E9", "v"),
    ("feed_forward", "both"): ("feed-forward, single block", "#D55E00", "P"),
    ("modulation", "image"): ("modulation, image", "#000000", "x"),
    ("modulation", "text"): ("modulation, text", "#000000", "+"),
    ("modulation", "both"): ("modulation, single block", "#000000", "1"),
}
COSINES = (
    ("update", "the whole updates Q \u0394R  (1: the same change, 0: unrelated, -1: opposite)"),
    ("delta_r", "\u0394R"),
    ("q", "Q"),
    ("r", "R"),
)
SIDE_A, SIDE_B = "#0072B2", "#D55E00"
BAND = "#BDBDBD"
# Left and right edges of the two columns of axes, in shares of the figure's width
_LINES, _SIDE = (0.07, 0.72), (0.77, 0.97)


def similarity_png(report: Report, *, fixed_scale: bool = True) -> bytes:
    """The picture as a PNG file, 1600 x 2300 pixels. Arguments and errors as in `similarity_figure`."""
    return figure_png(similarity_figure(report, fixed_scale=fixed_scale))


def similarity_image(report: Report, *, fixed_scale: bool = True) -> Image.Image:
    """The same as an RGB image."""
    return figure_image(similarity_figure(report, fixed_scale=fixed_scale))


def similarity_figure(report: Report, *, fixed_scale: bool = True) -> "Figure":
    """Draw a report.

    Args:
        report: what `qrlora_core.similarity_report` gives, or its JSON read back.
        fixed_scale: cosines from -1 to 1 on every axis, so that two pictures can be compared; otherwise each axis fits
            its values.

    Raises:
        PlotsUnavailableError: matplotlib is not installed.
    """
    with new_figure(SIZE) as figure:
        _head(figure, report)
        bottom = 0.825
        for key, title in COSINES:
            _cosine_row(figure, report, key, title, bottom, fixed_scale)
            bottom -= 0.135
        _angle_row(figure, report, 0.315, fixed_scale)
        _norm_row(figure, report, 0.205)
        draw_heat_maps(figure, report, fixed_scale)
    return figure


def _head(figure: "Figure", report: Report) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    a, b = report["a"], report["b"]
    figure.text(0.02, 0.985, f"A   {_short(a['name'])}", fontsize=15, va="top", color=SIDE_A, fontweight="bold")
    figure.text(0.02, 0.972, f"B   {_short(b['name'])}", fontsize=15, va="top", color=SIDE_B, fontweight="bold")
    figure.text(0.98, 0.985, "\n".join(head_lines(report)), fontsize=11, va="top", ha="right", linespacing=1.35)
    present = [kind for kind in KINDS if any((e["part"], e["stream"]) == kind for e in report["layers"])]
    handles: list[Any] = [
        Line2D([], [], color=KINDS[kind][1], marker=KINDS[kind][2], linestyle="none", label=KINDS[kind][0])
        for kind in present
    ]
    handles.append(Patch(color=BAND, label="chance: 95 % of random matrices stay in this band"))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.01, 0.957), ncols=4, frameon=False, fontsize=10)


def head_lines(report: Report) -> list[str]:
    """The whole comparison in three short lines."""
    layers, total = report["layers"], report["total"]
    same = sum(entry["same_basis"] for entry in layers)
    basis = f"one basis in {same} of them" if same else "different bases"
    basis = "one basis in all of them" if same == len(layers) else basis
    cosine, energy = total["cosine_update"], total["energy_ratio"]
    return [
        f"{len(layers)} layers in both, {basis}",
        "all updates together: " + ("cosine not known" if cosine is None else f"cosine {cosine:+.4f}"),
        "energy B / A: " + ("not known" if energy is None else f"{energy:#.3g}"),
    ]


def _cosine_row(figure: "Figure", report: Report, key: str, title: str, bottom: float, fixed: bool) -> None:
    layers = report["layers"]
    values = _column([entry["cosine"][key] for entry in layers])
    bands = _column([entry["null_band"][key] for entry in layers])
    axes = _line_axes(figure, layers, bottom, 0.09)
    axes.set_title(f"cosine of {title}", loc="left", fontsize=12)
    axes.set_ylabel("cosine similarity")
    side = _side_axes(figure, bottom, 0.09, _numbers(report["summary"][key]))
    if not np.isfinite(values).any():
        why = "not defined: not in both files, or the ranks differ"
        axes.text(0.5, 0.5, why, ha="center", transform=axes.transAxes)
        axes.set_yticks([])
        side.set_axis_off()
        return
    limit = _limits(values, bands, fixed)
    places = np.arange(len(layers))
    _step_fill(axes, -bands, bands, color=BAND)
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.plot(places, values, color="#999999", linewidth=0.8)
    _markers(axes, layers, values)
    axes.set_ylim(*limit)
    band = float(np.nanmedian(bands))
    side.axhspan(-band, band, color=BAND, linewidth=0)
    edges = np.linspace(*limit, 41).tolist()
    side.hist(values[np.isfinite(values)], bins=edges, orientation="horizontal", color="#444444")
    _whole_numbers(side.xaxis)
    side.set_xlabel("layers", fontsize=9, labelpad=1)
    side.axhline(report["summary"][key]["mean"], color=SIDE_B, linewidth=1.4, label="mean")
    side.axhline(report["summary"][key]["median"], color=SIDE_A, linewidth=1.4, linestyle="--", label="median")
    side.legend(loc="best", fontsize=8, frameon=False)
    side.set_ylim(*limit)


def _angle_row(figure: "Figure", report: Report, bottom: float, fixed: bool) -> None:
    layers = report["layers"]
    axes = _line_axes(figure, layers, bottom, 0.07)
    title = "principal angles between the spans of Q  (0\u00b0: the same span, 90\u00b0: nothing in common)"
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_ylabel("degrees")
    places = np.arange(len(layers))
    low, mean, high = (_column([entry["angles"][key] for entry in layers]) for key in ("min", "mean", "max"))
    _step_fill(axes, low, high, color="#56B4E9", alpha=0.5, label="smallest to largest")
    axes.plot(places, mean, color="#000000", linewidth=1.2, drawstyle="steps-mid", label="mean")
    if fixed or float(high.max()) < 1e-3 or float(high.max()) > 60:  # below that, rounding
        axes.set_ylim(-3, 93)
        axes.set_yticks([0, 30, 60, 90])
    else:
        axes.set_ylim(0, 1.1 * float(high.max()))
    axes.legend(loc="center right", fontsize=8, frameon=False)
    side = _side_axes(figure, bottom, 0.07, "opposite signs in \u0394R (chance: 0.5)")
    signs = _column([entry["sign_conflict"] for entry in layers])
    if np.isfinite(signs).any():
        spread = max(0.05, float(np.nanmax(np.abs(signs - 0.5))) * 1.1)
        edges = np.linspace(0.5 - spread, 0.5 + spread, 31)
        side.hist(signs[np.isfinite(signs)], bins=edges.tolist(), color="#444444")
        side.axvline(0.5, color=SIDE_B, linewidth=1.4)
        side.set_xlabel("share of the entries", fontsize=9)
        side.set_ylabel("layers", fontsize=9)
        _whole_numbers(side.yaxis)
    else:
        side.text(0.5, 0.5, "not defined: bases differ", ha="center", transform=side.transAxes)
        side.set_xticks([])
        side.set_yticks([])


def _norm_row(figure: "Figure", report: Report, bottom: float) -> None:
    layers = report["layers"]
    axes = _line_axes(figure, layers, bottom, 0.07)
    axes.set_title("size of the updates per layer, Frobenius norm of \u0394W", loc="left", fontsize=12)
    axes.set_ylabel("norm")
    places = np.arange(len(layers))
    size = 4.5 if len(layers) < 60 else 2.5
    for side, colour, marker in (("a", SIDE_A, "o"), ("b", SIDE_B, "x")):
        values = _column([entry["norms"][f"update_{side}"] for entry in layers])
        axes.plot(places, values, color=colour, marker=marker, markersize=size, linewidth=0.9, label=side.upper())
    positive = [v for e in layers for v in (e["norms"]["update_a"], e["norms"]["update_b"]) if v]
    if positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", fontsize=9, frameon=False, ncols=2)
    ratio = _column([entry["energy_ratio"] for entry in layers])
    side_axes = _side_axes(figure, bottom, 0.07, "energy B / A per layer, squared norms")
    shown = ratio[np.isfinite(ratio) & (ratio > 0)]
    if shown.size:
        spread = max(2.0, float(np.exp(np.abs(np.log(shown)).max())) * 1.1)
        side_axes.hist(shown, bins=np.geomspace(1 / spread, spread, 31).tolist(), color="#444444")
        side_axes.axvline(1, color=SIDE_B, linewidth=1.4)
        side_axes.set_xscale("log")
        reach = max(1, int(math.log2(spread)))
        ticks = [2.0**power for power in range(-reach, reach + 1, max(1, reach // 2))]
        side_axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        side_axes.minorticks_off()
        side_axes.set_xlabel("ratio (1: equal)", fontsize=9)
        side_axes.set_ylabel("layers", fontsize=9)
        _whole_numbers(side_axes.yaxis)
    else:
        side_axes.text(0.5, 0.5, "not defined", ha="center", transform=side_axes.transAxes)
        side_axes.set_xticks([])
        side_axes.set_yticks([])


def _line_axes(figure: "Figure", layers: Sequence[Report], bottom: float, height: float) -> "Axes":
    """Axes over all layers: stripes for blocks, their numbers below, a line between double and single blocks."""
    axes = figure.add_axes((_LINES[0], bottom, _LINES[1] - _LINES[0], height))
    blocks = [(entry["block"], entry["number"]) for entry in layers]
    starts = [index for index, block in enumerate(blocks) if index == 0 or block != blocks[index - 1]]
    ends = [*starts[1:], len(blocks)]
    for index, (start, end) in enumerate(zip(starts, ends)):
        if index % 2:
            axes.axvspan(start - 0.5, end - 0.5, color="#F2F2F2", linewidth=0, zorder=0)
        if index and blocks[start][0] != blocks[start - 1][0]:
            axes.axvline(start - 0.5, color="#000000", linewidth=1.2, linestyle="--")
    ticks, room = [], -1e9
    for start, end in zip(starts, ends):
        middle = (start + end - 1) / 2
        if middle - room >= len(blocks) / 32:
            ticks.append((middle, f"{blocks[start][0][0]}{blocks[start][1]}"))
            room = middle
    axes.set_xticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=9)
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.set_xlabel("block, in network order (d: double, s: single)", fontsize=9)
    axes.grid(axis="y", color=GRID)
    return axes


def _side_axes(figure: "Figure", bottom: float, height: float, title: str) -> "Axes":
    axes = figure.add_axes((_SIDE[0], bottom, _SIDE[1] - _SIDE[0], height))
    axes.set_title(title, fontsize=9, loc="left", pad=3)
    return axes


def _whole_numbers(axis: Any) -> None:
    """Counts have no halves."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(4, integer=True))


def _step_fill(axes: "Axes", low: np.ndarray[Any, Any], high: np.ndarray[Any, Any], **style: Any) -> None:
    """Fill between two rows of numbers, every layer as wide as its place, the first and the last one too."""
    places = np.concatenate([[-0.5], np.arange(len(low)), [len(low) - 0.5]])
    low, high = (np.concatenate([row[:1], row, row[-1:]]) for row in (low, high))
    axes.fill_between(places, low, high, step="mid", linewidth=0, **style)


def _markers(axes: "Axes", layers: Sequence[Report], values: np.ndarray[Any, Any]) -> None:
    size = 30 if len(layers) < 60 else 14
    for (part, stream), (_, colour, marker) in KINDS.items():
        chosen = [i for i, entry in enumerate(layers) if (entry["part"], entry["stream"]) == (part, stream)]
        if chosen:
            axes.scatter(chosen, values[chosen], color=colour, marker=marker, s=size, linewidth=1, zorder=3)


def _limits(values: np.ndarray[Any, Any], bands: np.ndarray[Any, Any], fixed: bool) -> tuple[float, float]:
    if fixed:
        return -1.05, 1.05
    both = np.concatenate([values, bands, -bands])
    low, high = float(np.nanmin(both)), float(np.nanmax(both))
    margin = 0.06 * max(high - low, 1e-6)
    return low - margin, high + margin


def _numbers(summary: Report | None) -> str:
    if summary is None:
        return ""
    outside = summary["outside_null_band"]
    beyond = "" if outside is None else f"\n{100 * outside:.0f} % of layers beyond chance"
    return (
        f"mean {summary['mean']:.4f}  median {summary['median']:.4f}  std {summary['std']:.4f}\n"
        f"min {summary['min']:.4f}  max {summary['max']:.4f}{beyond}"
    )


def _column(values: Sequence[float | None]) -> np.ndarray[Any, Any]:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _short(name: str, limit: int = 70) -> str:
    return name if len(name) <= limit else f"{name[: limit // 2]}...{name[-limit // 2 :]}"
