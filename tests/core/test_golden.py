"""Against what the published code computed on a small FLUX: weights to 1e-5, outputs to 1e-4."""

import pytest
import torch
from safetensors.torch import load_file

import qrlora_core as core
from demo.small_flux import ALPHA_BETA, GOLDEN, golden_flux, golden_output, golden_tensors, own_weight, with_weights


def adapter(name):
    return core.open_adapter(GOLDEN / f"official_{name}.safetensors")


def merged(alpha, beta):
    recipe = core.merge(core.MergeRecipe.of(adapter("style")), alpha, core.MergeRecipe.of(adapter("content")), beta)
    return core.merged_adapter(recipe)


def low_rank_weights(one):
    weights = {}
    for name in one.layers:
        up, down, alpha = one.update(name)
        weights[name] = own_weight(name, one) + alpha / up.shape[1] * up @ down
    return weights


def largest_difference(first, second):
    return float((first - second).abs().max())


def test_base_output():
    assert largest_difference(golden_output(golden_flux()), golden_tensors()["base.out"]) < 1e-5


@pytest.mark.parametrize("alpha,beta", ALPHA_BETA)
def test_low_rank_route(alpha, beta):
    output = golden_output(with_weights(low_rank_weights(merged(alpha, beta))))
    assert largest_difference(output, golden_tensors()[f"merged.{alpha}.{beta}.out"]) < 1e-4
    if (alpha, beta) != (0.0, 0.0):  # the comparison can fail: the merge does change the output
        assert largest_difference(output, golden_tensors()["base.out"]) > 1e-3


def test_low_rank_weights():
    published = load_file(GOLDEN / "official_merged_a0.9_b1.0.safetensors")
    ours = low_rank_weights(merged(0.9, 1.0))
    assert {f"{name}.weight" for name in ours} == published.keys()
    for name, weight in ours.items():
        assert largest_difference(weight, published[f"{name}.weight"]) < 1e-5, name


@pytest.mark.parametrize("alpha,beta", ALPHA_BETA)
@pytest.mark.parametrize("stored,bound", [("fp32", 1e-4), ("fp16", 1e-3)])
def test_residual_route(alpha, beta, stored, bound):
    residual = core.Residual(GOLDEN / f"official_residual_{stored}.safetensors")
    one = merged(alpha, beta)
    weights = {}
    for name in one.layers:
        layer = one.layer(name)
        moved = core.Basis(layer.initial.q, layer.initial.r + layer.down)
        weights[name] = core.restored_weight(residual.weight(name), moved, one.layers[name].scaling)
    if (alpha, beta, stored) == (0.9, 1.0, "fp32"):
        published = load_file(GOLDEN / "official_merged_a0.9_b1.0.safetensors")
        assert max(largest_difference(weights[name], published[f"{name}.weight"]) for name in weights) < 1e-5
    output = golden_output(with_weights(weights))
    assert largest_difference(output, golden_tensors()[f"merged.{alpha}.{beta}.out"]) < bound


@pytest.mark.parametrize("name", ["style", "content"])
@pytest.mark.parametrize("file,output", [("{}", "{}.out3"), ("{}_step0", "{}.out0")])
def test_single_adapters(name, file, output):
    ours = golden_output(with_weights(low_rank_weights(adapter(file.format(name)))))
    assert largest_difference(ours, golden_tensors()[output.format(name)]) < 1e-4


def test_full_qr_before_the_first_step_is_the_base():
    residual, one = core.Residual(GOLDEN / "official_residual_fp32.safetensors"), adapter("qr_step0")
    exact = core.merged_adapter(
        core.MergeRecipe.of(one), initial_of=lambda one, name: core.decompose(own_weight(name, one), one.rank)
    )
    restored = {
        name: core.restored_weight(residual.weight(name), core.Basis(*one.layer(name)[:2]), 1.0) for name in one.layers
    }
    for weights in (low_rank_weights(exact), restored):
        assert largest_difference(golden_output(with_weights(weights)), golden_tensors()["base.out"]) < 1e-4


def test_full_qr_with_residual_through_a_recipe():
    """`core_in_residual` leaves Q'R' alone: W_res takes the place of the weight."""
    residual, whole = core.Residual(GOLDEN / "official_residual_fp32.safetensors"), adapter("qr")
    one = core.merged_adapter(core.MergeRecipe.of(whole), core_in_residual=True)
    weights = {}
    for name in one.layers:
        up, down, alpha = one.update(name)
        weights[name] = residual.weight(name) + alpha / up.shape[1] * up @ down
    assert largest_difference(golden_output(with_weights(weights)), golden_tensors()["qr.out3"]) < 1e-4


def test_full_qr_with_residual():
    residual, one = core.Residual(GOLDEN / "official_residual_fp32.safetensors"), adapter("qr")
    weights = {
        name: core.restored_weight(residual.weight(name), core.Basis(*one.layer(name)[:2]), one.layers[name].scaling)
        for name in one.layers
    }
    assert largest_difference(golden_output(with_weights(weights)), golden_tensors()["qr.out3"]) < 1e-4


def test_full_qr_with_the_basis_recomputed():
    whole = core.merged_adapter(
        core.MergeRecipe.of(adapter("qr")),
        initial_of=lambda one, name: core.decompose(own_weight(name, one), one.layers[name].rank),
    )
    assert whole.rank == 16
    assert largest_difference(golden_output(with_weights(low_rank_weights(whole))), golden_tensors()["qr.out3"]) < 1e-4


@pytest.mark.parametrize("how", ["published basis", "decomposed"])
def test_our_residual_equals_the_published_one(how, tmp_path):
    one = adapter("style")

    def residual_of(name):
        weight = own_weight(name, one)
        basis = one.layer(name).initial if how == "published basis" else core.decompose(weight, one.rank)
        return core.residual_weight(weight, basis, one.layers[name].scaling)

    path = core.write_residual(tmp_path / "residual.safetensors", one.targets, residual_of)
    ours, published = load_file(path), load_file(GOLDEN / "official_residual_fp32.safetensors")
    assert ours.keys() == published.keys()
    for key in ours:
        assert largest_difference(ours[key], published[key]) < 1e-5, key


def test_golden_files_are_told_apart():
    kinds = {path.name: core.file_kind(core.TensorFile(path)) for path in GOLDEN.glob("*.safetensors")}
    assert kinds["official_style.safetensors"] == "delta_r_published"
    assert kinds["official_qr.safetensors"] == kinds["official_qr_step0.safetensors"] == "qr_published"
    assert kinds["official_residual_fp16.safetensors"] == "residual"
    assert kinds["base_bfl.safetensors"] == kinds["official_merged_a0.9_b1.0.safetensors"] == "unknown"


def test_published_scaling_is_one():
    one = adapter("content")
    assert {info.scaling for info in one.layers.values()} == {1.0}
    assert one.basis_fingerprint == adapter("style").basis_fingerprint
    assert torch.equal(one.layer(next(iter(one.layers))).up, one.layer(next(iter(one.layers))).initial.q)
