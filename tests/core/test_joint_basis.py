"""One orthonormal basis for every merge: exact, no wider than needed, whatever was merged, saved and opened before."""

import gc
import os
import weakref

import pytest
import torch

import qrlora_core as core
from qrlora_core.linalg import orthonormality_error
from tests.core.test_merge import NAMES, change, make, of


def error_of(recipe, *expected):
    """Largest relative error of a merge's layers against the sum of single changes in float64."""
    merged = core.merged_adapter(recipe)
    return max(
        float(
            (change(merged, name) - sum(f * change(a, name) for f, a in expected)).norm() / change(merged, name).norm()
        )
        for name in NAMES
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_update_is_written_exactly(dtype):
    torch.manual_seed(0)
    ups = [torch.linalg.qr(torch.randn(40, rank)).Q.to(dtype) for rank in (3, 5, 4)]
    joint = core.joint_basis(ups)
    assert joint.q.shape == (40, 12) and orthonormality_error(joint.q) < 1e-6
    for up, part in zip(ups, joint.parts):
        assert float((joint.q @ part - up.float()).abs().max()) < 1e-6
    if dtype == torch.float32:
        assert torch.equal(joint.q[:, :3], ups[0]), "a basis that is orthonormal keeps its columns"


def test_columns_that_add_nothing_are_dropped():
    torch.manual_seed(0)
    first = torch.linalg.qr(torch.randn(40, 6)).Q
    turned = first[:, :4] @ torch.linalg.qr(torch.randn(4, 4)).Q
    new = torch.linalg.qr(torch.cat([first, torch.randn(40, 1)], 1)).Q[:, 6:]
    joint = core.joint_basis([first, torch.cat([turned, new], 1)])
    assert joint.q.shape == (40, 7)
    nearly = torch.cat([turned, first[:, :1] + 1e-4 * new], 1)
    joint = core.joint_basis([first, nearly])
    assert joint.q.shape == (40, 7), "a small direction is a direction"
    assert float((joint.q @ joint.parts[1] - nearly).abs().max()) < 1e-6


def test_no_basis_is_wider_than_the_weight():
    ups = [torch.linalg.qr(torch.randn(8, 5)).Q for _ in range(3)]
    joint = core.joint_basis(ups)
    assert joint.q.shape == (8, 8)
    assert all(float((joint.q @ part - up).abs().max()) < 1e-6 for up, part in zip(ups, joint.parts))
    assert core.joint_basis([torch.zeros(8, 2)]).q.shape == (8, 1)


def test_a_merge_of_two_bases_is_orthonormal_and_says_what_it_dropped():
    a, b = make(1), make(2, basis_seed=5)
    shared = core.AdapterLayer(
        torch.cat([a.layer(NAMES[0]).up[:, :1], b.layer(NAMES[0]).up[:, :0]], 1), torch.randn(1, 10)
    )
    c = core.Adapter.from_tensors("c", {NAMES[0]: shared}, 1)
    recipe = core.merge(core.merge(of(a), 0.5, of(b), 2.0), 1.0, of(c), 3.0)
    merged, report = core.merged_adapter(recipe), core.merge_report(recipe)
    assert all(orthonormality_error(merged.layer(name).up) < 1e-6 for name in NAMES)
    assert (report.joint, report.rank, report.dropped) == (2, 6, 1)
    assert merged.layers[NAMES[0]].rank == 6
    for name in NAMES:
        up, down, _ = merged.layer(name)
        assert float((up @ down).norm()) == pytest.approx(float(down.norm()), rel=1e-5)


def stacked_file(tmp_path, a, b):
    """A merge as older versions saved it: `[Q1 Q2]`, whose columns are not orthonormal."""
    layers = {
        name: core.AdapterLayer(
            torch.cat([a.layer(name).up, b.layer(name).up], 1), torch.cat([a.layer(name).down, b.layer(name).down])
        )
        for name in NAMES
    }
    adapter = core.Adapter.from_tensors("stacked", layers, 2 * a.rank)
    return core.open_adapter(core.save_adapter(adapter, tmp_path / "stacked.safetensors"))


def test_aligning_onto_a_reopened_merge_of_two_bases_is_exact(tmp_path):
    a, b = make(1), make(2, basis_seed=5)
    anchor = stacked_file(tmp_path, a, b)
    recipe = core.merge(of(anchor), 1.0, of(b), 1.0, "align")
    report = core.merge_report(recipe)
    assert report.aligned == 2 and report.lost_total < 1e-10, "its span holds all of b"
    assert error_of(recipe, (1.0, anchor), (1.0, b)) < 1e-6, "and b is there once, not twice"
    assert core.merged_adapter(recipe).rank == 6


def test_the_loss_is_measured_and_never_clamped():
    q = torch.linalg.qr(torch.randn(20, 4)).Q
    up, down = torch.linalg.qr(torch.randn(20, 3)).Q, torch.randn(3, 9)
    moved, lost = core.linalg.reexpress(q, up, down)
    assert lost == pytest.approx(float((q @ moved - up @ down).norm() ** 2 / (up @ down).norm() ** 2), rel=1e-4)
    twice = torch.cat([q, q], dim=1)  # columns that count everything double
    moved, lost = core.linalg.reexpress(twice, q, torch.randn(4, 9))
    assert lost == pytest.approx(1.0, rel=1e-4), "2 u instead of u is off by all of u"


def test_merges_of_saved_merges_stay_exact(tmp_path):
    a, b, c = make(1), make(2, basis_seed=5), make(3, basis_seed=6, rank=2)
    first = core.merged_adapter(core.merge(of(a), 0.5, of(b), 2.0))
    again = core.open_adapter(core.save_adapter(first, tmp_path / "first.safetensors"))
    recipe = core.merge(of(again), -1.0, core.merge(of(c), 1.0, of(a), 0.25), 2.0)
    assert error_of(recipe, (-0.5, a), (-2.0, b), (2.0, c), (0.5, a)) < 1e-6
    assert core.merged_adapter(recipe).rank == 8, "what a adds is in the saved merge already"


def test_merging_a_merge_with_itself_does_not_grow():
    recipe = core.merge(of(make(1)), 1.0, of(make(2, basis_seed=4)), 0.5)
    for _ in range(40):
        recipe = core.merge(recipe, 0.5, recipe, 0.5)
    assert len(recipe.terms) == 2 and [term.strength for term in recipe.terms] == [1.0, 0.5]
    turned = core.merge(recipe, 1.0, recipe.block_scaled(core.BlockScale(image=0.5)), 1.0)
    assert len(turned.terms) == 4, "another block scale is another term"
    assert not core.merge(recipe, 1.0, recipe, -1.0).active


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_a_factor_that_is_no_number_is_refused(factor):
    with pytest.raises(core.SettingError, match="no usable factor"):
        core.merge(of(make(1)), factor, of(make(2)), 1.0)


def test_a_file_is_read_once_and_shared(tmp_path):
    path = core.save_adapter(make(1), tmp_path / "a.safetensors")
    one, other = core.open_adapter(path), core.open_adapter(path)
    assert one is other
    tensors = one.layer(NAMES[0])
    assert one.layer(NAMES[0]).up is tensors.up
    gone = weakref.ref(one)
    del one, other, tensors
    gc.collect()
    assert gone() is None, "what nobody refers to is freed"


def test_a_sweep_holds_no_copies():
    a, b = make(1), make(2, basis_seed=5)
    for cell in core.sweep(of(a), "0:1:0.25", of(b), "0:1:0.25"):
        found = core.layer_sum(cell.recipe, NAMES[0])
        for product in found.products if found else ():
            assert product.up is a.layer(NAMES[0]).up or product.up is b.layer(NAMES[0]).up
            assert all(down is a.layer(NAMES[0]).down or down is b.layer(NAMES[0]).down for down, _ in product.summands)


@pytest.mark.parametrize("how", ["shorter", "same size", "replaced"])
def test_a_file_that_is_overwritten_is_told_and_faults_nothing(tmp_path, how):
    path = core.save_adapter(make(1), tmp_path / "a.safetensors")
    adapter, size = core.open_adapter(path), path.stat().st_size
    held = adapter.layer(NAMES[0]).up.clone()
    if how == "replaced":
        core.save_adapter(make(9), path, overwrite=True)
    else:
        path.write_bytes(b"\0" * (size if how == "same size" else 100))
    os.utime(path, ns=(1, 1))
    with pytest.raises(core.FileFormatError, match="a.safetensors was changed since it was opened"):
        adapter.layer(NAMES[1])
    assert torch.equal(adapter.layer(NAMES[0]).up, held), "what was read stays"
    if how == "replaced":
        assert torch.equal(core.open_adapter(path).layer(NAMES[0]).down, make(9).layer(NAMES[0]).down)


def test_a_saved_merge_keeps_both_triggers():
    def named(seed, trigger):
        adapter = make(seed)
        return core.Adapter.from_tensors(
            trigger, {n: adapter.layer(n) for n in NAMES}, 3, metadata={"qrlora.trigger": trigger, "other": "x"}
        )

    merged = core.merged_adapter(core.merge(of(named(1, "<s>")), 1.0, of(named(2, "<c>")), 0.5))
    assert merged.metadata == {"qrlora.trigger": "<s>, <c>"}


def test_fewer_columns_are_the_best_of_their_number():
    recipe = core.merge(of(make(1, alpha=6)), 1.0, of(make(2, basis_seed=5)), 0.5)
    whole = core.merged_adapter(recipe)
    small, lost = core.truncated(whole, 2)
    assert small.rank == 2 and 0 < lost < 1
    left_out = total = 0.0
    for name in NAMES:
        values = torch.linalg.svdvals(change(whole, name))
        assert float((change(whole, name) - change(small, name)).norm()) == pytest.approx(
            float(values[2:].norm()), rel=1e-4
        )
        left_out, total = left_out + float(values[2:].square().sum()), total + float(values.square().sum())
    assert lost == pytest.approx(left_out / total, rel=1e-4)
    assert core.truncated(whole, 50).lost < 1e-9
    halves = {name: core.AdapterLayer(*(t.bfloat16() for t in make(1).layer(name)[:2])) for name in NAMES}
    half = core.Adapter.from_tensors("half", halves, 3)
    again = core.truncated(half, 3).adapter
    for name in NAMES:
        torch.testing.assert_close(change(again, name), change(half, name), atol=1e-5, rtol=1e-5)
    with pytest.raises(core.SettingError, match="below 1"):
        core.truncated(whole, 0)


def test_a_file_in_half_the_bits(tmp_path):
    exact = core.save_adapter(make(1, alpha=6), tmp_path / "exact.safetensors")
    path = core.save_adapter(make(1, alpha=6), tmp_path / "half.safetensors", dtype=torch.bfloat16)
    half = core.open_adapter(path)
    assert half.layers[NAMES[0]].dtype == torch.bfloat16 and half.alpha == 6.0
    for name in NAMES:
        one, other = change(core.open_adapter(exact), name), change(half, name)
        assert 1e-5 < float((one - other).norm() / one.norm()) < 5e-3


def test_nothing_connected_is_nothing():
    one = of(make(1))
    assert core.merge(core.NOTHING, 1.0, one, 0.5).terms[0].strength == 0.5
    assert core.merge(one, 1.0, core.NOTHING, 0.5, "align").terms[0].adapter is one.terms[0].adapter
    empty = core.merge(core.NOTHING, 1.0, core.NOTHING, 1.0)
    assert core.merge_report(empty).layers == 0 and not empty.active
    with pytest.raises(core.SettingError, match="no adapter is connected"):
        core.merged_adapter(empty)


def test_what_is_known_of_a_pair_goes_with_either_of_them():
    from qrlora_core import pairs

    gc.collect()
    before = len(pairs._compared)
    a, anchor = make(1), make(2, basis_seed=5)
    core.merged_adapter(core.merge(of(anchor), 1.0, of(a), 1.0, "align"))
    assert len(pairs._compared) > before
    moved = weakref.ref(pairs.moved_update(a, anchor, NAMES[0]))
    assert moved() is not None
    del anchor
    gc.collect()
    assert moved() is None, "the first adapter lives on and keeps nothing of the second"
    assert len(pairs._compared) == before
