"""Balance: survival, purity, drift and pull in cases that can be worked out by hand, and what is proposed of them."""

import itertools
import json
import math

import pytest
import torch

import qrlora_core as core
from qrlora_core.balance_choice import presence, quiet, score
from qrlora_core.gate import DOUBLED

GRID = (0.5, 1.0, 1.5)
ACTS = tuple(core.ACTS)
BASE = torch.tensor([3.0, 4.0, 0.0])


def points(style, content, drift=None, acts=ACTS, levels=(1.0, 0.6, 0.2), more=()):
    """A model whose predictions are `BASE + alpha * style + beta * content`, on prompts for neither `drift` times it.

    `style` and `content` are changes as lists, or functions of the level.
    """
    found = []
    for level in levels:
        one, other = (torch.tensor(part(level) if callable(part) else part) for part in (style, content))
        scale = dict.fromkeys(core.ASKED, 1.0) | ({} if drift is None else {"none": drift})
        questions = core.needed(GRID, GRID, acts)
        for trial in more:
            questions |= core.needed([trial[0]], [trial[1]], acts)
        effects = {
            (trial, asked): core.products(
                scale[asked] * (trial.alpha * one + trial.beta * other), scale[asked] * one, scale[asked] * other
            )
            for trial, prompts in questions.items()
            for asked in prompts
        }
        found.append(core.Point(level, dict.fromkeys(core.ASKED, float(BASE @ BASE)), effects))
    return found


def cell(measured, act, alpha, beta, switch=None):
    (found,) = [
        one for one in measured if (one.act, one.alpha, one.beta) == (act, alpha, beta) and switch in (None, one.switch)
    ]
    return found


def test_orthogonal_effects_survive_by_their_factor():
    measured = core.cells(points([1.0, 0.0, 0.0], [0.0, 2.0, 0.0]), GRID, GRID, ACTS)
    for alpha, beta in itertools.product(GRID, GRID):
        one = cell(measured, "always", alpha, beta)
        assert (one.style, one.content) == pytest.approx((alpha, beta))
        assert one.style_purity == pytest.approx(alpha / math.hypot(alpha, 2 * beta))
        assert one.content_purity == pytest.approx(2 * beta / math.hypot(alpha, 2 * beta))
        assert one.drift == pytest.approx(math.hypot(alpha, 2 * beta) / (1 + 2))
        assert one.moved == pytest.approx(math.hypot(alpha, 2 * beta) / 5)
        passes = cell(measured, "always, one pass each", alpha, beta)
        assert passes[1:] == pytest.approx(one[1:], nan_ok=True) or passes[4:] == pytest.approx(one[4:])
        gated = cell(measured, "by prompt, one pass each", alpha, beta)
        assert gated.content == pytest.approx(DOUBLED * beta) and gated.drift == gated.moved == 0


def test_effects_that_interfere():
    """The content undoes half of the style: what is left of it says so, and passes of their own do not change that."""
    measured = core.cells(points([1.0, 0.0, 0.0], [-0.5, 1.0, 0.0]), GRID, GRID, ACTS)
    one = cell(measured, "always", 1.0, 1.0)
    assert one.style == pytest.approx(0.5) and one.content == pytest.approx(1 - 0.5 / 1.25)
    assert cell(measured, "always", 1.5, 0.5).style == pytest.approx(1.25)
    assert core.proposal([c for c in measured if c.act == "always"], "style").alpha == 1.5


def test_what_one_adapter_does_to_the_other_inside_of_the_model():
    """Where the sum of two adapters makes less than their effects together, passes of their own are proposed."""
    found = points([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    spoilt = [
        point._replace(
            effects={
                (trial, asked): core.Products(part.style * 0.3, part.content, part.content)
                if trial.alpha and trial.beta
                else part
                for (trial, asked), part in point.effects.items()
            }
        )
        for point in found
    ]
    measured = core.cells(spoilt, GRID, GRID, ("always", "always, one pass each"))
    assert cell(measured, "always", 1.0, 1.0).style == pytest.approx(0.3)
    assert cell(measured, "always, one pass each", 1.0, 1.0).style == pytest.approx(1.0)
    assert core.proposal(measured, "balanced").act == "always, one pass each"


def test_alone_at_full_strength_all_of_it_survives():
    measured = core.cells(points([0.3, -0.1, 2.0], [0.7, 0.2, -1.0], more=[(1.0, 0.0)]), [1.0], [0.0], ["always"])
    assert measured[0].style == pytest.approx(1.0) and measured[0].style_purity == pytest.approx(1.0)


def test_an_adapter_that_does_nothing():
    found = points([1.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    measured = core.cells(found, GRID, GRID, ACTS)
    one = cell(measured, "always", 1.0, 1.5)
    assert one.content is None and one.content_purity is None and one.style == pytest.approx(1)
    assert core.shown(one) == (pytest.approx(1), None) and core.both_shown(one) == pytest.approx(1)
    assert core.pulls(found)[1] is None
    nothing = core.cells(points([0.0] * 3, [0.0] * 3), GRID, GRID, ACTS)
    assert all(one.drift == 0 and core.both_shown(one) == 0 for one in nothing)
    chosen = core.proposal(nothing, "balanced")
    assert (chosen.alpha, chosen.beta) == (1.0, 1.0), "nearest to what the files say"


def test_content_first_counts_each_where_it_acts():
    """The style's effect is of the low levels, so a switch between 1 and .6 keeps all of it."""
    found = points(lambda level: [1.0 - level, 0.0, 0.0], lambda level: [0.0, level, 0.0])
    measured = core.cells(found, GRID, GRID, ["by prompt, content first"])
    assert {one.switch for one in measured} == {0.8, 0.4}
    early = cell(measured, "by prompt, content first", 1.0, 1.0, 0.8)
    assert early.style == pytest.approx(1.0) and early.content == pytest.approx(1.0 / (1 + 0.36 + 0.04))
    late = cell(measured, "by prompt, content first", 1.0, 1.0, 0.4)
    assert late.style == pytest.approx(0.64 / (0.16 + 0.64)) and late.content == pytest.approx(1.36 / 1.4)


def test_one_level_has_no_place_to_switch_at():
    found = points([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], levels=(1.0,))
    measured = core.cells(found, GRID, GRID, ["by prompt, content first"])
    with pytest.raises(core.SettingError, match="raise points to 2 or more, or set act"):
        core.proposal(measured, "balanced")
    assert core.proposal(core.cells(found, GRID, GRID, ACTS), "balanced").act in ACTS, "the other acts compete"


def test_only_what_is_needed_is_asked():
    every = core.needed(GRID, GRID, ACTS)
    assert sum(map(len, every.values())) == 3 * 4 + 2 * 8 + 4, "three whole trials, the grid on two prompts, one alone"
    assert set(core.needed(GRID, GRID, ["by prompt, one pass each"])) == {(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)}
    gated = core.needed(GRID, GRID, ["by prompt"])
    assert gated[core.Trial(0.5, 1.5)] == ("both",), "what acts by the prompt cannot drift"
    assert core.needed([0.0], [0.0], ["always"]).keys() == core.needed([], [], []).keys()


def test_pull_is_what_a_guest_does_beyond_its_likeness():
    found = points([1.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    assert core.pulls(found) == (pytest.approx(1.0), pytest.approx(1.0)), "nothing is lost, nothing counted twice"


def test_presence_and_choices():
    assert presence(1.0, 1.0) == presence(2.0, 1.0) == 1 and presence(-0.5, 0.2) == presence(0.5, -1.0) == 0
    assert presence(0.5, 1.0) == 0.25 and presence(None, None) is None
    plain = core.Cell("always", 1.0, 1.0, None, 0.9, 0.8, 0.7, 0.6, 0.5, 0.01)
    wild = plain._replace(drift=3.0)
    assert quiet(wild) == 0 and score(wild, "balanced") == 0
    assert score(plain, "balanced") == pytest.approx(0.64 * 0.6 * 0.5)
    assert score(plain, "quiet") == pytest.approx(0.64 * 0.6 * 0.125)
    assert score(plain, "content") == pytest.approx(0.64 * 0.6 * math.sqrt(0.81 * 0.7) * 0.5)
    assert score(plain, "style") == pytest.approx(0.81 * 0.7 * math.sqrt(0.64 * 0.6) * 0.5)
    strong = plain._replace(content=1.0, content_purity=0.9, style=0.6, drift=0.5)
    calm = plain._replace(style=0.6, content=0.6, drift=0.05)
    three = [plain, strong, calm]
    picked = {choice: core.proposal(three, choice) for choice in core.CHOICES}
    assert picked["content"] is strong and picked["style"] is plain and picked["quiet"] is calm


def test_the_frontier_is_of_each_act():
    measured = core.cells(points([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]), GRID, GRID, ACTS)
    best = core.frontier(measured)
    assert {one.act for one in best} == set(ACTS)
    for act in ACTS:
        line = [one for one in best if one.act == act]
        assert [one.drift for one in line] == sorted(one.drift for one in line)
        assert [core.both_shown(one) for one in line] == sorted(core.both_shown(one) for one in line)
        for one in (one for one in measured if one.act == act):
            assert any(
                other.drift <= one.drift and core.both_shown(other) >= core.both_shown(one) - 1e-3 for other in line
            )


def test_the_report_is_plain_json():
    found = points([1.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    measured = core.cells(found, GRID, GRID, ACTS)
    prompts = core.four_prompts("", ["<s>"], ["<c>"])
    told = core.balance_report(measured, measured[3], core.BY_HAND, found, prompts)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["chosen"]["alpha"] == measured[3].alpha and set(told["proposals"]) == set(core.CHOICES)
    assert len(told["cells"]) == len(measured) and any(one["frontier"] for one in told["cells"])
    assert told["noise_levels"] == [1.0, 0.6, 0.2] and told["prompts"]["both"] == "a <c> in <s> style"


@pytest.mark.parametrize(
    ("prompt", "style", "content", "wanted"),
    [
        ("", ["<s>"], ["<c>"], ("a <c> in <s> style", "a picture in <s> style", "a picture of a <c>", "a picture")),
        ("", [], ["<c>"], ("a <c>", "a picture", "a picture of a <c>", "a picture")),
        ("", [], [], ("a picture",) * 4),
        ("a <c> dog, <s>", ["<s>"], ["<c>"], ("a <c> dog, <s>", "a dog, <s>", "a <c> dog,", "a dog,")),
        ("a (<C>:1.2) dog", ["<s>"], ["<c>"], ("<s> a (<C>:1.2) dog", "<s> a dog", "a (<C>:1.2) dog", "a dog")),
        ("sks and skss", ["sks"], ["sks"], ("sks and skss", "sks and skss", "sks and skss", "and skss")),
        ("two  words here", ["two words"], [], ("two  words here", "two  words here", "here", "here")),
    ],
)
def test_prompts_are_made_of_the_triggers(prompt, style, content, wanted):
    assert tuple(core.four_prompts(prompt, style, content).values()) == wanted


@pytest.mark.parametrize("prompt", ["<c> dog", "a ((<c>):1.3) dog", "[<C>]", "<c>", "x <c><c> y", "\\(<c>\\) z"])
def test_without_leaves_no_trigger(prompt):
    assert not core.holds(core.without(prompt, ["<c>"]), "<c>")


def test_what_another_noise_would_change_decides_nothing():
    plain = core.Cell("always", 0.8, 1.2, None, 1.0, 1.0, 0.8, 0.8, 0.0, 0.0)
    near = plain._replace(alpha=1.0, beta=1.0, style_purity=0.73)
    nearer_and_worse = near._replace(style_purity=0.71)
    other_act = near._replace(act="always, one pass each")
    assert core.proposal([plain, near, other_act], "balanced") is near
    assert core.proposal([plain, nearer_and_worse, other_act], "balanced") is plain
    equal = other_act._replace(style_purity=0.8)
    assert core.proposal([equal, plain], "balanced") is plain, "with one evaluation instead of three"
