"""The two curves over strength: points are at their values, gaps and single values are drawn."""

import pytest

from qrlora_plots.strengths import DRIFT, SHOWN, strengths_image

REPORT = {"strengths": [0.5, 1.0, 1.5], "shown": [0.4, 1.0, 1.3], "drift": [0.1, 0.2, None]}


def rows_of(image, column, colour):
    return [row for row in range(36, image.height - 50) if image.getpixel((column, row)) == colour]


def column_of(image, strength, last):
    return round(52 + (image.width - 24 - 52) * strength / last)


def test_points_are_at_their_values():
    image = strengths_image(REPORT, 900)
    at = {name: rows_of(image, column_of(image, 1.0, 1.5), colour) for name, colour in (("s", SHOWN), ("d", DRIFT))}
    shown, drift = (sum(rows) / len(rows) for rows in at.values())
    per_unit = (300 - 46 - 44) / (1.3 * 1.05)
    assert drift - shown == pytest.approx(0.8 * per_unit, abs=2)
    end = column_of(image, 1.5, 1.5)
    assert rows_of(image, end, SHOWN) and not rows_of(image, end, DRIFT), "not defined there"


@pytest.mark.parametrize(
    "change",
    [
        {"shown": [None] * 3, "drift": [None] * 3},
        {"shown": [-0.5, -1.0, 0.2]},
        {"strengths": [1.0], "shown": [1.0], "drift": [7.0]},
        {"strengths": [], "shown": [], "drift": []},
    ],
)
def test_whatever_was_measured_is_drawn(change):
    assert strengths_image({**REPORT, **change}, 100).size == (360, 300)
