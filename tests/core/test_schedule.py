"""Strengths over the sampling, and by the prompt: what the text says, and what is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qrlora_core as core
from tests.core.test_merge import NAMES, make, of


def test_points_and_jumps():
    schedule = core.parse_schedule("0: 1, 0.25: 1; 0.5: 0.2\n0.75: 0.2, 0.75: 0")
    expected = {0: 1, 0.1: 1, 0.25: 1, 0.375: 0.6, 0.5: 0.2, 0.7499: 0.2, 0.75: 0, 1: 0}
    assert {place: pytest.approx(schedule.factor(place)) for place in expected} == expected
    assert core.parse_schedule("0.5: 2").factor(0) == core.parse_schedule("0.5: 2").factor(1) == 2


def test_sigma_falls():
    schedule = core.parse_schedule("1: 0, 0.6: 0, 0.2: 1", "sigma")
    assert [schedule.factor(sigma) for sigma in (1.0, 0.7, 0.6)] == [0, 0, 0]
    assert schedule.factor(0.4) == pytest.approx(0.5) and schedule.factor(0.1) == 1
    style, content = core.content_first(0.5)
    assert [(style.factor(s), content.factor(s)) for s in (1.0, 0.51, 0.5, 0.0)] == [(0, 1), (0, 1), (1, 0), (1, 0)]


@pytest.mark.parametrize(
    "text,points",
    [
        ("0: 1, 0,5: 0", ((0, 1), (0.5, 0))),
        ("0,3: 1; 0,6: 0,25", ((0.3, 1), (0.6, 0.25))),
        ("0:1,1:0", ((0, 1), (1, 0))),  # as it always was
    ],
)
def test_decimal_commas_are_understood(text, points):
    assert core.parse_schedule(text).points == points


@pytest.mark.parametrize(
    "text,over,words",
    [
        ("", "steps", "empty"),
        ("0.5", "steps", "not a point"),
        ("0: 1: 2", "steps", "not a point"),
        ("0: much", "steps", "not a number"),
        ("0: nan", "steps", "out of range"),
        ("0: 5", "steps", "out of range"),
        ("1.5: 1", "steps", "outside of 0"),
        ("0.5: 1, 0.2: 0", "steps", "must rise"),
        ("0.2: 1, 0.5: 0", "sigma", "must fall"),
        ("-1: 1", "sigma", "out of range"),
        ("1e999: 1", "sigma", "out of range"),
        ("0: 1," * 2000, "steps", "too many"),
        ("0: 1," * 200, "steps", "too many"),
    ],
)
def test_texts_that_are_refused(text, over, words):
    with pytest.raises(core.SettingError, match=words):
        core.parse_schedule(text, over)


@settings(max_examples=200, deadline=500)
@given(st.text(alphabet="0123456789.:,;- e\nnaif+", max_size=60), st.sampled_from(["steps", "sigma"]))
def test_any_text_is_read_or_refused(text, over):
    try:
        schedule = core.parse_schedule(text, over)
    except core.SettingError:
        return
    assert all(abs(schedule.factor(place / 10)) <= 4 for place in range(11))
    assert core.parse_schedule(str(schedule).removeprefix("sigma "), over).points[0][1] == pytest.approx(
        schedule.points[0][1], rel=1e-5
    )


def test_presets_can_be_read():
    assert set(core.PRESETS) >= {"constant", "early", "late", "fade in", "fade out"}
    for text in core.PRESETS.values():
        core.parse_schedule(text)


def test_a_constant_schedule_is_a_strength():
    recipe = of(make(1)).scheduled(core.parse_schedule(core.PRESETS["constant"]))
    assert not recipe.needs_live
    half = of(make(1)).scheduled(core.parse_schedule("0: 0.5, 1: 0.5"))
    assert half.terms[0].strength == 0.5 and not half.terms[0].schedules


def test_what_moves_cannot_be_saved_as_one_pair():
    moving = of(make(1)).scheduled(core.parse_schedule("0: 1, 1: 0"))
    merged = core.merge(moving, 0.5, of(make(2)), 1.0)
    assert merged.needs_live and core.merge_report(merged).rank == 3
    for act in (core.merged_adapter, lambda recipe: core.layer_sum(recipe, NAMES[0])):
        with pytest.raises(core.SettingError, match="live mode"):
            act(merged)
    assert "[0: 1, 1: 0]" in str(merged.terms[0])


@pytest.mark.parametrize(
    "prompt,trigger,held",
    [
        ("a <c> dog", "<c>", True),
        ("a <C> dog", "<c>", True),
        ("a (<c>:1.2) dog", "<c>", True),
        ("a ((<c>)) dog in [<s>:0.5] style", "<s>", True),
        ("a \\(<c>\\) dog", "<c>", True),
        ("a dog", "<c>", False),
        ("sksdog", "sks", False),
        ("a sks dog", "sks", True),
        ("a SKS, dog", "sks", True),
        ("asks", "sks", False),
        ("(sks:1.3) dog", "sks", True),
        ("ink  wash\nstyle", "ink wash", True),
        ("ink and wash", "ink wash", False),
        ("", "<c>", False),
        ("a <c> dog", "", False),
        ("a photo of \u732b", "\u732b", True),
    ],
)
def test_a_trigger_is_a_word_of_its_own(prompt, trigger, held):
    assert core.holds(prompt, trigger) is held


def test_gates_by_case():
    style, content = core.style_gate(("<s>",), ("<c>",), 0.5), core.content_gate(("<c>",), ("<s>",), 0.5)
    assert style.schedule("a cat") is False and content.schedule("a <s> cat") is False
    alone = style.schedule("a cat in <s> style")
    assert [alone.factor(sigma) for sigma in (1.0, 0.6, 0.4)] == [0.5, 0.5, 1.0]
    both = "a <c> dog in <s> style"
    assert [style.schedule(both).factor(s) for s in (0.9, 0.1)] == [0, 1]
    assert [content.schedule(both).factor(s) for s in (0.9, 0.1)] == [1, 0]
    assert [content.schedule("a <c> dog").factor(s) for s in (0.9, 0.1)] == [1, 0]
    assert core.style_gate(("<s>",), ("<c>",), None).schedule(both) is None, "at full strength throughout"


def test_triggers_of_a_file_and_of_the_person():
    plain = make(1)
    layers = {name: plain.layer(name) for name in NAMES}
    told = core.Adapter.from_tensors("t", layers, 3, metadata={"qrlora.trigger": "<s>, ink", "other": "x"})
    assert core.triggers_of(told) == ("<s>", "ink") and core.triggers_of(told, "mine") == ("mine",)
    assert core.triggers_of(plain) == ()
    recipe = of(told).gated(lambda adapter: core.style_gate(core.triggers_of(adapter), (), None))
    assert recipe.needs_live and "where the prompt holds <s> or ink" in str(recipe.terms[0])
    twice = core.merge(recipe, 1.0, of(told), 1.0)
    assert len(twice.terms) == 2, "a gated term and a free one are two"


def test_no_file_makes_a_prompt_be_searched_for_ever():
    stated = core.Adapter.from_tensors(
        "many",
        {name: make(1).layer(name) for name in NAMES},
        3.0,
        metadata={"qrlora.trigger": ",".join(f"t{index}" for index in range(200_000))},
    )
    assert len(core.triggers_of(stated)) == 100
    with pytest.raises(core.SettingError, match="150 triggers are given, 100 are the most"):
        core.triggers_of(stated, ",".join(map(str, range(150))))
    with pytest.raises(core.SettingError, match="10000 are the most"):
        core.triggers_of(stated, "x" * 20_000)
