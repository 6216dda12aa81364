"""The balance picture: settings are where their numbers say, and the chosen one is marked."""

import sys

import pytest

import qrlora_core as core
from qrlora_plots import PlotsUnavailableError, balance_figure, balance_image
from qrlora_plots.balance import ACTS, STRIPS, place
from tests.core.test_balance import GRID, points

pytest.importorskip("matplotlib")


def report(choice="balanced", content=(0.0, 1.0, 0.0), acts=tuple(core.ACTS)):
    found = points([1.0, 0.0, 0.0], list(content))
    measured = core.cells(found, GRID, GRID, acts)
    chosen = core.proposal(measured, choice)
    return core.balance_report(measured, chosen, choice, found, core.four_prompts("", ["<s>"], ["<c>"]))


def axes_of(figure, label):
    return next(axes for axes in figure.axes if axes.get_label() == label)


def test_every_act_has_a_colour():
    assert ACTS.keys() == core.ACTS.keys()
    assert STRIPS.keys() == {name for name, act in core.ACTS.items() if act.by_prompt}
    cells = report()["cells"]
    assert all(place(cell) == cell["drift"] for cell in cells if cell["act"] not in STRIPS)


def test_settings_are_at_their_places():
    told = report()
    figure, image = balance_figure(told), balance_image(told)
    axes = axes_of(figure, "frontiers")
    assert image.size == (1600, 800)
    assert {line.get_label() for line in axes.get_lines()} == set(core.ACTS)
    for line in axes.get_lines():
        best = [cell for cell in told["cells"] if cell["act"] == line.get_label() and cell["frontier"]]
        best.sort(key=lambda cell: cell["drift"])
        assert list(line.get_xdata()) == [place(cell) for cell in best]
        assert list(line.get_ydata()) == [cell["shown"] for cell in best]
    column, row = axes.transData.transform((place(told["chosen"]), told["chosen"]["shown"]))
    assert image.getpixel((round(column), round(image.height - 1 - row))) == (0, 0, 0), "the star"


def test_a_picture_is_drawn_once(monkeypatch):
    from matplotlib.figure import Figure

    drawn, real = [], Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda figure, renderer: (drawn.append(figure), real(figure, renderer)))
    balance_image(report(acts=("always",)))
    assert len(drawn) == 1


def test_the_grid_is_that_of_the_chosen_act():
    told = report("style", acts=("always",))
    axes = axes_of(balance_figure(told), "style")
    shown = {(text.get_position(), text.get_text()) for text in axes.texts}
    for cell in told["cells"]:
        assert ((GRID.index(cell["beta"]), GRID.index(cell["alpha"])), f"{cell['style']:.2f}") in shown
    (frame,) = axes.get_lines()
    assert (frame.get_xdata()[0], frame.get_ydata()[0]) == (
        GRID.index(told["chosen"]["beta"]),
        GRID.index(told["chosen"]["alpha"]),
    )


@pytest.mark.parametrize("act", core.ACTS)
def test_factors_by_hand_that_the_grid_has_not(act):
    found = points([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], more=[(0.9, 1.1), (0.9, 0.0), (0.0, 1.1)])
    measured, hand = (core.cells(found, *factors, [act]) for factors in ((GRID, GRID), ([0.9], [1.1])))
    chosen = core.proposal(hand, "balanced")
    told = core.balance_report(measured, chosen, "by hand", found, core.four_prompts("", ["<s>"], ["<c>"]))
    axes = axes_of(balance_figure(told), "content")
    (frame,) = axes.get_lines()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.5", "1", "1.1", "1.5"]
    assert (frame.get_xdata()[0], frame.get_ydata()[0]) == (2, 1)
    assert f"{chosen.content:.2f}" in {text.get_text() for text in axes.texts if text.get_position() == (2, 1)}


def test_an_adapter_that_does_nothing_is_drawn():
    assert balance_image(report(content=(0.0, 0.0, 0.0))).size == (1600, 800)


@pytest.mark.parametrize(
    "text", ["\ud800", "\0", "a\nb\r\x1b[31m", "$x", "%s{0}${HOME}`id`$(id)", "x" * 100_000, "\u202e"]
)
def test_whatever_the_prompts_hold_is_drawn(text):
    told = report()
    told["prompts"] = dict.fromkeys(told["prompts"], text)
    assert balance_image(told).size == (1600, 800)


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotsUnavailableError, match="pip install matplotlib"):
        balance_figure(report())
