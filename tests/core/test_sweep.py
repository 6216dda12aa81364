"""Lists of alpha and beta as a person writes them, and the grid they make."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qrlora_core as core
from tests.core.test_merge import NAMES, change, make, of


@pytest.mark.parametrize(
    "text,values",
    [
        ("0.6, 0.8, 1.0", (0.6, 0.8, 1.0)),
        ("0:1:0.25", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("0:1:0.1", tuple(index / 10 for index in range(11))),
        ("1:0:-0.5", (1.0, 0.5, 0.0)),
        ("0:1:0.4", (0.0, 0.4, 0.8)),  # the last one is not stepped over
        ("0.9; 1:1:1\n0.9", (0.9, 1.0)),
        ("-1", (-1.0,)),
    ],
)
def test_lists(text, values):
    assert core.parse_scales(text, "alphas") == values


@given(st.lists(st.integers(-400, 400), min_size=1, max_size=20, unique=True))
def test_any_list_comes_back(hundredths):
    text = ", ".join(f"{value / 100}" for value in hundredths)
    assert core.parse_scales(text, "alphas") == tuple(value / 100 for value in hundredths)


@pytest.mark.parametrize(
    "text,words",
    [
        ("", "alphas is empty"),
        (" , ", "alphas is empty"),
        ("0.6, o.8", "'o.8' is not a number"),
        ("0:x:0.1", "'x' in '0:x:0.1' is not a number"),
        ("0:1", "'0:1' is not a range"),
        ("0:1:0", "the step 0 does not lead from 0 to 1"),
        ("0:1:-0.1", "the step -0.1 does not lead from 0 to 1"),
        ("5", "'5' is out of range; use -4 to 4"),
        ("nan", "out of range"),
        ("1e999", "out of range"),
        ("0:1:1e-9", "'0:1:1e-9' gives 1000000001 numbers"),
        ("0:1:0.02, -1:0:0.02", "more than 100 numbers"),
    ],
)
def test_bad_lists_are_shown(text, words):
    with pytest.raises(core.SettingError, match="alphas") as caught:
        core.parse_scales(text, "alphas")
    assert words in str(caught.value)


def test_the_grid():
    style, content = make(1), make(2)
    cells = core.sweep(of(style), "0.5, 1", of(content), "0:1:0.5")
    assert [(cell.alpha, cell.beta) for cell in cells] == [(a, b) for a in (0.5, 1.0) for b in (0.0, 0.5, 1.0)]
    assert cells[1].label == "alpha=0.5, beta=0.5"
    for cell in cells:
        wanted = cell.alpha * change(style, NAMES[0]) + cell.beta * change(content, NAMES[0])
        assert torch.allclose(change(cell.recipe, NAMES[0]), wanted, atol=1e-5)


def test_too_many_pictures():
    with pytest.raises(core.SettingError, match="11 alphas x 11 betas are 121 pictures, more than 100"):
        core.sweep(of(make(1)), "0:1:0.1", of(make(2)), "0:1:0.1")
