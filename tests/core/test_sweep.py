"""Lists of alpha and beta as a person writes them, and the grid they make."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qrlora_core as core
from tests.core.test_merge import NAMES, change, make, of

ROOT = Path(__file__).resolve().parents[2]


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
        ("0,5", (0.5,)),  # 5 is no factor
        ("0,6; 0,8; 1", (0.6, 0.8, 1.0)),
        ("0,6, 0,8, 1,0", (0.6, 0.8, 1.0)),
        ("0:1:0,25", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("0,1", (0.0, 1.0)),  # as it always was
        ("0,1,2", (0.0, 1.0, 2.0)),
        ("0,0.5,1", (0.0, 0.5, 1.0)),
        ("0,2;0,4", (0.2, 0.4)),
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
        ("0,1, 0,2", "not clear which commas separate and which are decimal; write decimals with a point, as in 0.5"),
        ("0,1\n2,3", "not clear which commas"),
        ("0,5, x", "'5' is out of range"),
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


def triggered(adapter, word):
    layers = {name: adapter.layer(name) for name in adapter.layers}
    return core.Adapter.from_tensors(adapter.name, layers, adapter.rank, metadata={"qrlora.trigger": word})


def test_a_grid_that_acts_as_a_merge_does():
    style, content = (triggered(make(seed), word) for seed, word in ((1, "<s>"), (2, "<c>")))
    act = "by prompt, one pass each"
    for cell in core.sweep(of(style), "0.5, 1", of(content), "0, 1", act=act):
        wanted = core.merge_acting(of(style), cell.alpha, of(content), cell.beta, act=act)
        assert list(map(str, cell.recipe.terms)) == list(map(str, wanted.terms))
        assert [term.gate.triggers for term in cell.recipe.terms] == [("<s>",), ("<c>",)]
        assert len({term.own_pass for term in cell.recipe.terms}) == 2
    with pytest.raises(core.SettingError, match="act is 'sometimes'"):
        core.sweep(of(style), "1", of(content), "1", act="sometimes")


def test_a_grid_of_schedules():
    style, content = make(1), make(2)
    lines = "constant\n content first 0.4 \n\nstyle: Late | content: 0: 1, 0.5: 0\nFade in\nconstant"
    cells = core.sweep(of(style), "0.5, 1", of(content), "1", schedules=lines)
    labels = ["constant", "content first 0.4", "style: Late | content: 0: 1; 0.5: 0", "Fade in"]
    assert [cell.label for cell in cells] == [
        f"alpha={a}, beta=1, schedule={one}" for a in ("0.5", "1") for one in labels
    ]
    assert [cell.schedule for cell in cells] == labels * 2
    factors = [
        [[term.strength * (term.schedules[0].factor(place) if term.schedules else 1) for place in (0.1, 0.9)]
         for term in cell.recipe.terms]
        for cell in cells[:4]
    ]  # fmt: skip
    assert factors[0] == [[0.5, 0.5], [1, 1]]
    assert factors[2] == [[0, 0.5], [pytest.approx(0.8), 0]]
    assert factors[3] == [[pytest.approx(0.05), pytest.approx(0.45)], [pytest.approx(0.1), pytest.approx(0.9)]]
    sigmas = [[term.schedules[0].factor(sigma) for sigma in (0.9, 0.41, 0.39)] for term in cells[1].recipe.terms]
    assert [str(term.schedules[0])[:5] for term in cells[1].recipe.terms] == ["sigma"] * 2
    assert sigmas == [[0, 0, 1], [1, 1, 0]]


def test_schedules_over_sigma_and_for_one_side():
    (pair,) = core.parse_schedule_pairs("content: sigma 1: 1, 0.5: 0")
    assert pair.style is None and pair.content == core.parse_schedule("1: 1, 0.5: 0", "sigma")
    assert core.parse_schedule_pairs("0.2: 0.5")[0].style.constant == 0.5  # one factor throughout is a strength


@pytest.mark.parametrize(
    "text,words",
    [
        ("", "schedules is empty"),
        ("fade", "there is no schedule 'fade'; use one of constant, early"),
        ("style: late | style: early", "one side twice"),
        ("late | style: early", "one side twice"),
        ("style: late\n0: 1, 0.5", "'0: 1, 0.5': '0.5' is not a point"),
        ("content first 1.4", "is 1.4; use a sigma between 0 and 1"),
        ("content first soon", "'soon' is not a number"),
        ("style:", "there is no schedule ''"),
        ("0: 9", "out of range"),
        ("x" * 5000, "too many"),
    ],
)
def test_bad_schedules_are_shown(text, words):
    with pytest.raises(core.SettingError, match="schedule") as caught:
        core.parse_schedule_pairs(text)
    assert words in str(caught.value)


@given(st.text(st.sampled_from("0123456789.:,;| \nabcfilmnorstuye"), max_size=60))
def test_any_list_of_schedules_is_read_or_refused(text):
    try:
        pairs = core.parse_schedule_pairs(text)
    except core.SettingError:
        return
    for pair in pairs:
        assert "," not in pair.label
        for side in (pair.style, pair.content):
            assert side is None or math.isfinite(side.factor(0.5))


def test_too_many_pictures():
    with pytest.raises(core.SettingError, match="6 alphas x 6 betas x 3 schedules are 108 pictures"):
        core.sweep(of(make(1)), "0:1:0.2", of(make(2)), "0:1:0.2", schedules="late\nearly\nconstant")
    with pytest.raises(core.SettingError, match="11 alphas x 11 betas are 121 pictures, more than 100"):
        core.sweep(of(make(1)), "0:1:0.1", of(make(2)), "0:1:0.1")


# Each took from seconds to hours, or ended in an error that is none of ours; all while no other thread could run
HOSTILE = [
    "0:1:1e-999999",
    "0:1:1e-99999999999",
    "1e-999999:1:0.5",
    "0e999999999:1:0e-999999999",
    "1e99999999999999999999",
    "1" * 5_000_000,
    "0." + "1" * 9_000,
    "1," * 5_000_000,
    ":" * 5_000,
    "sNaN",
    "\ud800",
    "\u0661e\u0661\u0661\u0661\u0661",
]
LOOK = """
import json, sys, time, qrlora_core as core
for text in json.load(sys.stdin):
    for read in (core.parse_scales, core.parse_ranges, lambda text, what: core.parse_ranges("0-9:" + text, what)):
        start = time.monotonic()
        try:
            read(text, "numbers")
        except core.SettingError as error:
            assert len(str(error)) < 500, len(str(error))
        assert time.monotonic() - start < 1, (text[:20], read)
"""


@pytest.mark.process
@pytest.mark.process
def test_no_text_takes_longer_than_a_second():
    """In a process of its own: what holds the interpreter cannot be timed from within."""
    command = [sys.executable, "-c", LOOK]
    options = {"capture_output": True, "text": True, "timeout": 60, "check": False, "cwd": ROOT}
    done = subprocess.run(command, input=json.dumps(HOSTILE), **options)
    assert done.returncode == 0, done.stderr[-500:]


@given(st.text(st.sampled_from("0123456789.-+eE:,; \n_nNaAiIfF\u0663\ud800"), max_size=60) | st.text(max_size=200))
def test_any_text_is_numbers_in_range_or_our_error(text):
    for read in (core.parse_scales, core.parse_ranges):
        try:
            found = read(text, "numbers")
        except core.SettingError:
            continue
        numbers = found if read is core.parse_scales else [one.factor for one in found]
        assert all(-4 <= number <= 4 for number in numbers) and len(found) <= 100
