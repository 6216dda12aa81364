"""The picture of a loss: its lines where its numbers are, on axes that can be read."""

import math

import numpy as np
import pytest

from qrlora_plots import loss_image
from qrlora_plots.loss import decades, number_text, ticks

BLUE, ORANGE = (82, 166, 224), (230, 122, 54)


def events(losses):
    return [{"step": step, "loss": loss, "smoothed_loss": loss} for step, loss in enumerate(losses, 1)]


def pixels(image, color):
    """(rows, columns) of what has nearly this colour in the plot, below the legend."""
    far = np.abs(np.asarray(image, dtype=int)[60:] - np.array(color)).sum(axis=-1)
    return np.nonzero(far < 40)


def test_steps_without_a_smoothed_loss_are_drawn():
    """Events of a run that was cut short, or that were damaged."""
    assert loss_image([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}], "x").getcolors(1 << 20) is not None


def test_a_falling_loss_falls_in_the_picture():
    rows, columns = pixels(loss_image(events([1 - step / 200 for step in range(100)]), "falls"), BLUE)
    left, right = rows[columns < 200].mean(), rows[columns > 850].mean()
    assert right - left > 250, "of 422 pixels"
    assert columns.max() - columns.min() > 800, "it goes over the whole width"


def test_a_loss_that_falls_to_a_tenth_is_straight_when_it_falls_by_the_same_factor():
    image = loss_image(events([math.exp(-step / 30) for step in range(150)]), "log")
    rows, columns = pixels(image, BLUE)
    middle = rows[(columns > 500) & (columns < 520)].mean()
    ends = (rows[columns < 110].mean() + rows[columns > 910].mean()) / 2
    assert abs(middle - ends) < 12


def test_one_peak_does_not_press_the_curve_flat():
    losses = [1 - step / 200 for step in range(100)]
    peak = [{**one, "loss": 1000.0} if one["step"] == 50 else one for one in events(losses)]
    rows, columns = pixels(loss_image(peak, "peak"), BLUE)
    assert rows[columns > 850].mean() - rows[columns < 200].mean() > 200


def test_validation_is_drawn_and_always_inside():
    rows, _ = pixels(loss_image(events([0.5, 0.49, 0.48]), "v", [{"step": 2, "loss": 3.0}]), ORANGE)
    assert len(rows) >= 10


@pytest.mark.parametrize(
    "losses", [[], [0.5], [0.0, 0.0], [float("nan")], [1.0, 1e308, -1e308, float("inf"), 2.0], [-1.0, -2.0]]
)
@pytest.mark.parametrize("title", ["", "K\u00fcche \u8bad\u7ec3 " * 40, "a\nb"])
def test_any_losses_and_titles_make_a_picture(losses, title):
    assert loss_image(events(losses), title).size == (960, 540)


def test_numbers_at_the_axes_are_round():
    assert ticks(0, 1, 6) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(1, 1000, 8) == [200, 400, 600, 800, 1000]
    assert decades(0.02, 3) == [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
    assert decades(1e-4, 1) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert [number_text(value) for value in (0.123456, 12, 0.00012, 0, 123456)] == [
        "0.123",
        "12",
        "1.2e-04",
        "0",
        "1.2e+05",
    ]
