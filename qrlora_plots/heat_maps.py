"""The map of a network in the similarity picture: layer kinds over blocks, a colour for each cosine."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = Mapping[str, Any]


def heat_map_grid(report: Report, block: str, key: str) -> tuple[list[str], list[int], np.ndarray[Any, Any]]:
    """The cosines of all layers of one kind of block.

    Args:
        report: as for `similarity_figure`.
        block: "double" or "single".
        key: which cosine, "update", "delta_r", "q" or "r".

    Returns:
        Layer kinds, block numbers, and cosines (layer kinds, block numbers) from -1 to 1; NaN where there is none.
    """
    entries = [entry for entry in report["layers"] if entry["block"] == block]
    kinds = list(dict.fromkeys(entry["layer"] for entry in entries))
    numbers = sorted({entry["number"] for entry in entries})
    grid = np.full((len(kinds), len(numbers)), np.nan)
    for entry in entries:
        value = entry["cosine"][key]
        if value is not None:
            grid[kinds.index(entry["layer"]), numbers.index(entry["number"])] = value
    return kinds, numbers, grid


def draw_heat_maps(figure: "Figure", report: Report, fixed: bool) -> None:
    """Draw the map of each kind of block at the figure's bottom: cosines of the updates, or of Q where those are not
    known. Colours run from -1 to 1 where the scale is fixed, otherwise over the values.
    """
    key = "update" if report["summary"]["update"] else "q"
    maps = {block: heat_map_grid(report, block, key) for block in ("double", "single")}
    finite = np.concatenate([grid[np.isfinite(grid)] for _, _, grid in maps.values()])
    limit = 1.0 if fixed or not finite.size else max(1e-6, float(np.abs(finite).max()))
    left, bottom, top, picture = 0.12, 0.03, 0.165, None
    shown = [(block, entry) for block, entry in maps.items() if entry[1]]
    width = (0.97 - left - 0.10 * len(shown)) / len(shown)
    for block, (kinds, numbers, grid) in shown:
        height = (top - bottom) * min(1.0, max(0.25, len(kinds) / 12))
        axes = figure.add_axes((left, top - height, width, height), label=f"heat {block}")
        axes.set_facecolor("#F3E9C6")
        picture = axes.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
        step = max(1, len(numbers) // 13)
        axes.set_xticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]], fontsize=9)
        what = "updates" if key == "update" else "Q"
        axes.set_title(f"cosine of {what}: {block} blocks", loc="left", fontsize=12)
        axes.set_xlabel("block")
        left += width + 0.10
    if picture is not None:
        bar = figure.add_axes((0.945, bottom, 0.012, top - bottom))
        figure.colorbar(picture, cax=bar)
        bar.set_title("cosine", fontsize=9)
