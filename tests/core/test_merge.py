"""Properties of merging: linear, order-free, exact on different bases, and what is saved is what is applied."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qrlora_core as core
from qrlora_core import same_basis

NAMES = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.3.attn.to_v")
factors = st.floats(-4, 4, allow_nan=False).map(lambda value: round(value, 2))


def make(seed, *, rank=3, alpha=None, names=NAMES, basis_seed=0, method="delta_r", out=12, width=10):
    """An adapter with random dR; equal `basis_seed`s give equal bases."""
    layers = {}
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(1000 * basis_seed + index)
        basis = core.decompose(torch.randn(out, width, generator=generator), rank)
        down = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed + index))
        if method == "qr":
            layers[name] = core.AdapterLayer(basis.q + 0.01 * down[:, :1].sum(), basis.r + 0.01 * down, basis)
        else:
            layers[name] = core.AdapterLayer(basis.q, down, basis)
    return core.Adapter.from_tensors(f"a{seed}", layers, alpha or rank, method=method)


def of(adapter):
    return core.MergeRecipe.of(adapter)


def change(recipe_or_adapter, name):
    """The weight change of one layer, in float64."""
    adapter = recipe_or_adapter
    if isinstance(adapter, core.MergeRecipe):
        adapter = core.merged_adapter(adapter)
    up, down, alpha = adapter.update(name)
    return alpha / up.shape[1] * up.double() @ down.double()


@settings(max_examples=40, deadline=None)
@given(factors, factors, st.integers(0, 2), st.sampled_from([1, 3, 6]), st.sampled_from(["delta_r", "qr"]))
def test_merge_is_linear_and_order_free(alpha, beta, basis_seed, rank, method):
    style, content = make(1, alpha=6), make(50, rank=rank, alpha=2, basis_seed=basis_seed, method=method)
    one, other = core.merge(of(style), alpha, of(content), beta), core.merge(of(content), beta, of(style), alpha)
    for name in NAMES:
        expected = alpha * change(style, name) + beta * change(content, name)
        torch.testing.assert_close(change(one, name), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(change(other, name), expected, atol=1e-4, rtol=1e-4)


def test_rank_stays_on_one_basis_and_adds_up_on_two():
    same, different = make(2), make(3, rank=2, basis_seed=7)
    assert core.merged_adapter(core.merge(of(make(1)), 0.5, of(same), 1.0)).rank == 3
    assert core.merged_adapter(core.merge(of(make(1)), 0.5, of(different), 1.0)).rank == 5
    report = core.merge_report(core.merge(of(make(1)), 0.5, of(different), 1.0))
    assert (report.layers, report.shared, report.joint, report.rank) == (2, 0, 2, 5)
    report = core.merge_report(core.merge(of(make(1)), 0.5, of(same), 1.0))
    assert (report.shared, report.joint, report.rank) == (2, 0, 3)


def test_merges_merge_again():
    a, b, c = make(1), make(2), make(3, basis_seed=5)
    recipe = core.merge(core.merge(of(a), 0.5, of(b), 2.0), 3.0, of(c), -1.0)
    for name in NAMES:
        expected = 1.5 * change(a, name) + 6.0 * change(b, name) - change(c, name)
        torch.testing.assert_close(change(recipe, name), expected, atol=1e-4, rtol=1e-4)


def test_different_target_sets():
    a, b = make(1, names=NAMES[:1]), make(2, names=NAMES[1:])
    recipe = core.merge(of(a), 1.0, of(b), 0.5)
    assert recipe.layer_names == NAMES
    torch.testing.assert_close(change(recipe, NAMES[1]), 0.5 * change(b, NAMES[1]), atol=1e-6, rtol=1e-6)


def test_align_reports_what_is_lost():
    a, b = make(1, rank=3), make(2, rank=3, basis_seed=9)
    recipe = core.merge(of(a), 1.0, of(b), 1.0, "align")
    merged, report = core.merged_adapter(recipe), core.merge_report(recipe)
    assert merged.rank == 3 and report.aligned == 2 and 0 < report.lost_total < 1
    for name in NAMES:
        q = a.layer(name).up.double()
        torch.testing.assert_close(
            change(merged, name), change(a, name) + q @ q.T @ change(b, name), atol=1e-4, rtol=1e-4
        )
        lost = 1 - (q @ q.T @ change(b, name)).norm() ** 2 / change(b, name).norm() ** 2
        assert report.lost[name] == pytest.approx(float(lost), abs=1e-5)


def test_align_is_exact_on_the_same_span():
    a = make(1)
    turned = {}
    for name in NAMES:
        q, down, _ = make(2).layer(name)
        turned[name] = core.AdapterLayer(q * torch.tensor([-1.0, 1.0, -1.0]), down)
    b = core.Adapter.from_tensors("flipped", turned, 3)
    report = core.merge_report(core.merge(of(a), 1.0, of(b), 1.0, "align"))
    assert report.aligned == 2 and report.lost_total < 1e-6


def test_align_keeps_the_rank_of_nested_merges():
    """C shares A's basis but was aligned onto B's before: aligning again brings both back to A's."""
    a, b, c = make(1), make(2, basis_seed=5), make(3)
    inner = core.merge(of(b), 0.5, of(c), 2.0, "align")
    outer = core.merge(of(a), 1.0, inner, 3.0, "align")
    assert core.merged_adapter(outer).rank == core.merge_report(outer).rank == 3
    for name in NAMES:
        q = a.layer(name).up.double()
        expected = change(a, name) + q @ q.T @ (1.5 * change(b, name) + 6 * change(c, name))
        torch.testing.assert_close(change(outer, name), expected, atol=1e-4, rtol=1e-4)


def test_raise_accepts_what_was_aligned_onto_its_basis():
    aligned = core.merge(of(make(2)), 1.0, of(make(3, basis_seed=5)), 1.0, "align")
    recipe = core.merge(of(make(1)), 1.0, aligned, 1.0, "raise")
    assert core.merged_adapter(recipe).rank == 3
    with pytest.raises(core.BasisMismatchError, match="different bases"):  # and not what left it
        core.merge(of(make(3, basis_seed=5)), 1.0, aligned, 1.0, "raise")


def test_a_full_qr_adapter_cannot_be_aligned():
    whole = make(1, method="qr", basis_seed=2)
    for first, second in ((make(2), whole), (whole, make(2))):
        with pytest.raises(core.BasisMismatchError, match="only 'stack' is exact"):
            core.merge(of(first), 1.0, of(second), 1.0, "align")


def test_a_single_term_is_saved_as_it_is(tmp_path):
    path = core.save_adapter(make(1, alpha=6), tmp_path / "a.safetensors")
    one = core.open_adapter(path)
    again = core.merged_adapter(core.merge(of(one), 1.0, of(make(2)), 0.0))
    assert again is one
    copy = core.TensorFile(core.save_adapter(again, tmp_path / "b.safetensors"))
    for key in core.TensorFile(path).specs:
        assert torch.equal(copy.tensor(key), core.TensorFile(path).tensor(key))
    assert copy.metadata["modelspec.date"] and "/" not in copy.metadata["modelspec.title"]


def test_raise_names_the_adapters_and_layers():
    with pytest.raises(core.BasisMismatchError, match=r"a1 and a2 .* 2 layers: transformer_blocks.0.attn.to_q"):
        core.merge(of(make(1)), 1.0, of(make(2, basis_seed=4)), 1.0, "raise")
    core.merge(of(make(1)), 1.0, of(make(2)), 1.0, "raise")


def test_other_shapes_are_another_model():
    with pytest.raises(core.TargetError, match=r"different models: transformer_blocks.0.attn.to_q"):
        core.merge(of(make(1)), 1.0, of(make(2, out=24)), 1.0)


def test_zero_strength_takes_no_part():
    a, b = make(1), make(2, basis_seed=3)
    assert core.merged_adapter(core.merge(of(a), 0.0, of(b), 1.0)) is b
    both = core.merge(of(a), 0.0, of(b), 0.0)
    assert not both.active and not change(both, NAMES[0]).any()


def test_a_full_qr_file_needs_its_core():
    layers = {name: layer._replace(initial=None) for name in NAMES for layer in [make(1, method="qr").layer(name)]}
    bare = core.Adapter.from_tensors("bare", layers, 3, method="qr")
    with pytest.raises(core.BasisMismatchError, match="bare holds only the trained"):
        core.merged_adapter(core.merge(of(bare), 0.5, of(make(2)), 1.0))
    with pytest.raises(core.BasisMismatchError, match="bare holds only"):
        bare.update(NAMES[0])
    whole = core.merged_adapter(of(bare), initial_of=lambda one, name: make(1, method="qr").layer(name).initial)
    torch.testing.assert_close(change(whole, NAMES[0]), change(make(1, method="qr"), NAMES[0]), atol=1e-5, rtol=1e-5)


def test_nan_is_found_before_anything_is_applied():
    bad = make(1)
    bad.layer(NAMES[0]).down[1, 2] = float("nan")
    with pytest.raises(core.WeightError, match=r"a1: dR of transformer_blocks.0.attn.to_q holds 1 "):
        core.merged_adapter(core.merge(of(bad), 1.0, of(make(2)), 1.0))


@pytest.mark.parametrize("method", ["delta_r", "delta_r_triangular", "qr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_are_bit_exact(tmp_path, method, dtype):
    source = make(1, alpha=6, method="qr" if method == "qr" else "delta_r")
    layers = {
        name: core.AdapterLayer(up.to(dtype), down.to(dtype), core.Basis(*(t.to(dtype) for t in initial)))
        for name in NAMES
        for up, down, initial in [source.layer(name)]
    }
    adapter = core.Adapter.from_tensors("x", layers, 6, method=method, metadata={"qrlora.trigger": "<c>"})
    read = core.open_adapter(core.save_adapter(adapter, tmp_path / "portable.safetensors"))
    assert (read.method, read.rank, read.alpha) == (method, 3, 6.0)
    assert read.metadata["qrlora.trigger"] == "<c>" and read.metadata["modelspec.sai_model_spec"]
    assert read.basis_fingerprint == adapter.basis_fingerprint
    again = core.open_adapter(core.save_adapter(read, tmp_path / "again.safetensors"))
    for name in NAMES:
        for one in (read, again):
            for mine, theirs in zip(one.update(name)[:2], adapter.update(name)[:2]):
                assert mine.dtype == dtype and torch.equal(mine, theirs)
    published = core.open_adapter(
        core.save_adapter(
            core.Adapter.from_tensors("y", layers, 3, method=method), tmp_path / "p.safetensors", format="published"
        )
    )
    for name in NAMES:
        assert torch.equal(published.layer(name).up, layers[name].up)
        assert torch.equal(published.layer(name).down, layers[name].down)
        if method != "qr":
            assert torch.equal(published.layer(name).initial.r, layers[name].initial.r)


@settings(max_examples=10, deadline=None)
@given(factors, factors, st.integers(0, 1))
def test_what_is_saved_is_what_is_applied(tmp_path_factory, alpha, beta, basis_seed):
    recipe = core.merge(of(make(1, alpha=6)), alpha, of(make(2, rank=2, basis_seed=basis_seed)), beta)
    merged = core.merged_adapter(recipe)
    read = core.open_adapter(core.save_adapter(merged, tmp_path_factory.mktemp("m") / "m.safetensors"))
    for name in NAMES:
        assert all(torch.equal(*pair) for pair in zip(merged.update(name)[:2], read.update(name)[:2]))


def test_scaling_goes_into_published_files(tmp_path):
    adapter = make(1, alpha=6)
    read = core.open_adapter(core.save_adapter(adapter, tmp_path / "p.safetensors", format="published"))
    torch.testing.assert_close(change(read, NAMES[0]), change(adapter, NAMES[0]))
    torch.testing.assert_close(read.layer(NAMES[0]).initial.r, 2 * adapter.layer(NAMES[0]).initial.r)


def test_published_without_base_r_needs_the_model(tmp_path):
    layers = {name: make(1).layer(name)._replace(initial=None) for name in NAMES}
    adapter = core.Adapter.from_tensors("z", layers, 3)
    with pytest.raises(core.BasisMismatchError, match="connect the model"):
        core.save_adapter(adapter, tmp_path / "p.safetensors", format="published")
    assert not list(tmp_path.iterdir())
    path = core.save_adapter(
        adapter, tmp_path / "p.safetensors", format="published", base_r=lambda name: make(1).layer(name).initial.r
    )
    assert core.open_adapter(path).has_initial


def test_same_basis_is_strict():
    q = make(1).layer(NAMES[0]).up
    assert same_basis(q, q.clone()) and not same_basis(q, -q) and not same_basis(q, q[:, :2])
    assert not same_basis(q, q.half().float())


class Cancelled(BaseException):
    """As ComfyUI's Cancel comes."""


def stops_after(count):
    def progress(names):
        for index, name in enumerate(names):
            if index == count:
                raise Cancelled
            yield name

    return progress


def test_everything_that_goes_through_layers_can_be_stopped(tmp_path):
    recipe = core.merge(of(make(1)), 0.9, of(make(2, basis_seed=7)), 1.0)
    work = [
        lambda progress: core.merge_report(recipe, progress),
        lambda progress: core.merged_adapter(recipe, progress=progress),
        lambda progress: core.save_adapter(make(1), tmp_path / "x.safetensors", progress=progress),
        lambda progress: core.truncated(make(1), 1, progress),
        lambda progress: core.similarity_report(make(1), make(2), progress),
    ]
    for one in work:
        seen = []
        with pytest.raises(Cancelled):
            one(stops_after(1))
        assert not list(tmp_path.iterdir())
        one(lambda names, seen=seen: (seen.append(name) or name for name in names))
        assert seen == list(NAMES), one
        for path in tmp_path.iterdir():
            path.unlink()
