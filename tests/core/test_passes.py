"""Adapters in passes of their own: which evaluations of the model a table of factors asks for, and what they count."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qrlora_core as core
from tests.core.test_merge import make, of

factors = st.sampled_from([0.0, 1.0, -0.5, 0.3, 2.0])


def test_one_evaluation_where_at_most_one_pass_acts_fully():
    passes = ("s", "c", None)
    table = ((1.0, 0.0, 0.7), (0.0, 1.0, 0.7), (0.0, 0.0, 0.7))
    assert core.evaluations(passes, table) == (core.Evaluation(table, (1.0, 1.0, 1.0)),)
    assert core.evaluations((None, None), ((0.4, 2.0),)) == (core.Evaluation(((0.4, 2.0),), (1.0,)),)


def test_predictions_are_composed():
    found = core.evaluations(("s", "c", None), ((0.5, 2.0, 0.7),))
    assert found == (
        core.Evaluation(((0.0, 0.0, 0.7),), (-1.5,)),
        core.Evaluation(((1.0, 0.0, 0.7),), (0.5,)),
        core.Evaluation(((0.0, 1.0, 0.7),), (2.0,)),
    )


def test_what_counts_nothing_is_not_asked_for():
    assert len(core.evaluations(("s", "c"), ((0.4, 0.6),))) == 2, "the factors add up to 1: no base"
    assert len(core.evaluations(("s", "c"), ((0.5, 0.0),))) == 2, "the content is off"


def test_terms_of_one_pass_keep_their_proportions():
    found = core.evaluations(("s", "s", "c"), ((0.5, -0.25, 1.0),))
    assert found[1] == core.Evaluation(((1.0, -0.5, 0.0),), (0.5,))


@given(
    st.lists(st.sampled_from(["s", "c", "x", None]), min_size=1, max_size=5).flatmap(
        lambda passes: st.tuples(st.just(passes), st.lists(st.tuples(*[factors] * len(passes)), min_size=1, max_size=3))
    )
)
def test_weights_add_up_and_linear_models_cannot_tell(case):
    """Where a prediction is linear in the factors, composing predictions is the plain sum."""
    passes, table = case
    found = core.evaluations(passes, table)
    effects = torch.randn(len(passes), generator=torch.Generator().manual_seed(len(passes)), dtype=torch.float64)
    for number, row in enumerate(table):
        assert sum(one.weights[number] for one in found) == pytest.approx(1.0)
        predicted = sum(
            one.weights[number] * (3.0 + float(torch.tensor(one.table[number], dtype=torch.float64) @ effects))
            for one in found
        )
        assert predicted == pytest.approx(3.0 + float(torch.tensor(row, dtype=torch.float64) @ effects))


def test_a_merge_with_itself_does_not_grow():
    recipe = core.merge(of(make(1)).in_own_pass(), 1.0, of(make(2)).in_own_pass(), 1.0)
    for _ in range(30):
        recipe = core.merge(recipe, 0.5, recipe, 0.5).in_own_pass()
    assert len(recipe.terms) == 2 and len({term.own_pass for term in recipe.terms}) == 2
    assert [term.strength for term in recipe.terms] == [1.0, 1.0]


def test_passes_are_kept_and_told_apart():
    one, other, third = (of(make(seed)) for seed in (1, 2, 3))
    pair = core.merge(one, 1.0, other, 1.0).in_own_pass()
    recipe = core.merge(pair, 1.0, third.in_own_pass(), 0.5)
    first, second, last = (term.own_pass for term in recipe.terms)
    assert first == second != last
    assert recipe.needs_live and all("in a pass of its own" in str(term) for term in recipe.terms)
    for refused in (core.merged_adapter, lambda found: core.layer_sum(found, found.layer_names[0])):
        with pytest.raises(core.SettingError, match="pass of its own"):
            refused(recipe)


def test_gates_of_passes():
    style, content = (
        make_gate(("<s>",), ("<c>",)) if style else make_gate(("<c>",), ("<s>",))
        for style, make_gate in ((True, core.style_pass_gate), (False, core.content_pass_gate))
    )
    both, one, other, none = "a <c> in <s> style", "a cat in <s> style", "a <c>", "a cat"
    assert [style.schedule(text) for text in (both, other, none)] == [None, False, False]
    assert [style.schedule(one).factor(sigma) for sigma in (1.0, 0.8, 0.7, 0.0)] == [0.5, 0.5, 1.0, 1.0]
    assert [content.schedule(text) for text in (one, other, none)] == [False, None, False]
    assert {content.schedule(both).factor(sigma) for sigma in (1.0, 0.5, 0.0)} == {2.0}
    for gate, text in itertools.product((style, content), (both, one)):
        assert gate.schedule(text) is False or "sigma" in str(gate)
