"""Strength per block, part and stream: what it multiplies, that all routes respect it, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qrlora_core as core
from tests.core.test_merge import change, make, of

NAMES = tuple(target.name for target in core.flux_targets(3, 2, 8))
RANGES = (core.BlockRange(0, 1, 0.25), core.BlockRange(2, 2, 2.0))


@pytest.mark.parametrize(
    "name,kind",
    [
        ("transformer_blocks.7.attn.to_q", ("double", 7, "attn.to_q", "attention", "image")),
        ("transformer_blocks.0.attn.to_add_out", ("double", 0, "attn.to_add_out", "attention", "text")),
        ("transformer_blocks.0.ff_context.net.2", ("double", 0, "ff_context.net.2", "feed_forward", "text")),
        ("transformer_blocks.0.ff.net.0.proj", ("double", 0, "ff.net.0.proj", "feed_forward", "image")),
        ("transformer_blocks.0.norm1_context.linear", ("double", 0, "norm1_context.linear", "modulation", "text")),
        ("single_transformer_blocks.37.attn.to_v", ("single", 37, "attn.to_v", "attention", "both")),
        ("single_transformer_blocks.1.proj_mlp", ("single", 1, "proj_mlp", "feed_forward", "both")),
        ("single_transformer_blocks.1.proj_out", ("single", 1, "proj_out", "feed_forward", "both")),
    ],
)
def test_layer_kinds(name, kind):
    assert core.layer_kind(name) == kind


def test_factors_multiply():
    scale = core.BlockScale(
        double=0.5, single=3, attention=0.1, feed_forward=0.2, image=7, text=11, double_ranges=RANGES
    )
    assert scale.factor("transformer_blocks.1.attn.to_q") == pytest.approx(0.5 * 0.1 * 7 * 0.25)
    assert scale.factor("transformer_blocks.2.ff_context.net.2") == pytest.approx(0.5 * 0.2 * 11 * 2)
    assert scale.factor("single_transformer_blocks.1.attn.to_k") == pytest.approx(3 * 0.1)  # no stream, no range


@given(st.floats(-4, 4), st.floats(-4, 4), st.sampled_from(["delta_r", "qr"]))
def test_every_layer_gets_its_factor(double, text, method):
    names = ("transformer_blocks.0.attn.to_q", "transformer_blocks.2.attn.to_add_out", NAMES[-1])
    adapter = make(3, names=names, method=method)
    scale = core.BlockScale(double=double, text=text)
    merged = core.merged_adapter(of(adapter).scaled(0.5).block_scaled(scale))
    for name in names:
        wanted = 0.5 * scale.factor(name) * change(adapter, name)
        if name not in merged.layers:
            assert 0.5 * scale.factor(name) == 0
            continue
        assert torch.allclose(change(merged, name), wanted, atol=1e-4), name


def test_scales_stack_and_survive_merging():
    one, two = make(1), make(2, basis_seed=1)
    halved = of(one).block_scaled(core.BlockScale(attention=0.5)).block_scaled(core.BlockScale(single=0.5))
    merged = core.merge(halved, 2.0, of(two), 1.0)
    for name, factor in (("transformer_blocks.0.attn.to_q", 1.0), ("single_transformer_blocks.3.attn.to_v", 0.5)):
        wanted = factor * change(one, name) + change(two, name)
        assert torch.allclose(change(merged, name), wanted, atol=1e-5)
    assert "[attention 0.5] [single 0.5]" in core.merged_adapter(merged).name


def test_a_factor_of_zero_leaves_the_layer_out():
    one, two = make(1), make(2, basis_seed=1)
    only_double = of(one).block_scaled(core.BlockScale(single=0))
    only_single = of(two).block_scaled(core.BlockScale(double=0))
    assert list(core.merged_adapter(only_double).layers) == ["transformer_blocks.0.attn.to_q"]
    merged = core.merge(only_double, 1.0, only_single, 1.0)
    report = core.merge_report(merged)  # two bases, but never in one layer
    assert (report.layers, report.shared, report.joint, report.off, report.rank) == (2, 2, 0, 0, 3)
    report = core.merge_report(only_double)
    assert (report.layers, report.shared, report.off) == (2, 1, 1)
    nothing = core.merged_adapter(of(one).block_scaled(core.BlockScale(attention=0)))
    assert all(change(nothing, name).abs().max() == 0 for name in nothing.layers) and len(nothing.layers) == 2


def test_a_scale_of_ones_is_the_adapter_itself():
    adapter = make(1)
    assert core.merged_adapter(of(adapter).block_scaled(core.BlockScale())) is adapter


def test_saved_and_exported_files_hold_the_factors(tmp_path):
    recipe = of(make(1)).block_scaled(core.BlockScale(double=0.5, single_ranges=core.parse_ranges("3: -1", "x")))
    path = core.save_adapter(core.merged_adapter(recipe), tmp_path / "scaled.safetensors")
    for name in recipe.layer_names:
        assert torch.allclose(change(core.open_adapter(path), name), change(recipe, name), atol=1e-6)


def test_nothing_is_read_before_the_merge():
    adapter = make(1)
    adapter._read = None  # reading would fail
    assert core.merge(of(adapter).block_scaled(core.BlockScale(double=0.5)), 1.0, of(adapter), 1.0).terms


@pytest.mark.parametrize(
    "text,ranges",
    [
        ("0-9: 1.0, 10-18: 0.5", ((0, 9, 1.0), (10, 18, 0.5))),
        (" 3 : -.5 ;\n7-7:2 ", ((3, 3, -0.5), (7, 7, 2.0))),
        ("", ()),
        (" , ", ()),
        ("0-9: 0,5, 10-18: 1", ((0, 9, 0.5), (10, 18, 1.0))),
        ("7: 0,5", ((7, 7, 0.5),)),
        ("0: 0,5: 1", ((0, 0, 0.0), (5, 5, 1.0))),  # as it always was
    ],
)
def test_ranges(text, ranges):
    assert core.parse_ranges(text, "double_ranges") == ranges


@pytest.mark.parametrize(
    "text,words",
    [
        ("0-9", "'0-9' is not a block range"),
        ("0-9: 1, x: 2", "'x: 2' is not a block range"),
        ("0-9: much", "'0-9: much': 'much' is not a number"),
        ("0-9: nan", "out of range"),
        ("0-9: 5", "'0-9: 5': '5' is out of range; use -4 to 4"),
        ("9-0: 1", "'9-0: 1' ends before it begins"),
        ("0-9: 1, 9-12: 0.5", "'9-12: 0.5' and '0-9: 1' share blocks"),
        ("-1: 1", "'-1: 1' is not a block range"),
    ],
)
def test_bad_ranges_are_shown(text, words):
    with pytest.raises(core.SettingError, match="double_ranges") as caught:
        core.parse_ranges(text, "double_ranges")
    assert words in str(caught.value)


def test_ranges_of_other_kinds_with_decimal_commas():
    ranges = core.parse_kind_ranges("input 4-5: 0,5, middle: 0", "other_ranges")
    assert ranges == (("input", (4, 5, 0.5)), ("middle", (0, 9999, 0.0)))


def test_a_range_that_goes_on_beyond_the_last_block_is_told():
    names = list(make(1).layers)
    scale = core.BlockScale(double_ranges=core.parse_ranges("0-18: 0.5", "double_ranges"))
    assert scale.beyond(names) == ["0-18: 0.5: the last of the double blocks is 0"]
    assert core.BlockScale(double_ranges=core.parse_ranges("0: 0.5", "double_ranges")).beyond(names) == []
    everywhere = core.parse_kind_ranges("double: 0.5", "other_ranges")
    assert core.BlockScale(other_ranges=everywhere).beyond(names) == []


def test_a_range_of_no_block_is_refused():
    scale = core.BlockScale(double_ranges=core.parse_ranges("0: 1, 10-18: 0.5", "double_ranges"))
    with pytest.raises(core.TargetError, match=r"'10-18: 0.5' matches no block; the adapter has double blocks: 0 to 0"):
        of(make(1)).block_scaled(scale)
