"""Small models of every family in a real ComfyUI: what they compute by this pack, the stock loader and diffusers."""

import pytest

FAMILIES = ("FLUX.1", "FLUX.2", "Chroma", "Z-Image", "Qwen-Image", "Krea 2", "SD3.5", "SDXL")
CLOSE = 1e-5  # relative to what the LoRA changes in the output
KINDS = {
    "FLUX.1": {"double", "single"},
    "FLUX.2": {"double", "single"},
    "Chroma": {"double", "single"},
    "Z-Image": {"single", "noise_refiner", "context_refiner"},
    "Qwen-Image": {"double"},
    "Krea 2": {"single", "text_layerwise", "text_refiner"},
    "SD3.5": {"double"},
    "SDXL": {"input", "middle", "output"},
}
IN_DIFFUSERS = ("Chroma", "Krea 2", "SD3.5", "SDXL")  # FLUX.1: tests/golden; the others: tests/train/test_families.py


@pytest.fixture(scope="module")
def forward(run_probe):
    return run_probe("forward_probe.py")


@pytest.fixture(scope="module")
def in_diffusers(run_probe):
    return run_probe("diffusers_probe.py")


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_stock_loader(forward, family):
    """One file in the weights and beside them, two files merged against two loaders, the merge exported."""
    one = forward[family]
    assert "error" not in one, one["error"]
    assert one["size"] > 0.1 and one["layers"] >= one["published"] >= 14
    for way in ("patch", "live", "merge", "export"):
        assert one[way] is not None and one[way] < CLOSE, way


@pytest.mark.parametrize("family", FAMILIES)
def test_a_residual_is_saved_loaded_and_restored(forward, family):
    """Row by row it is W - Q R; the model it restores, with and without an adapter, is the one that it was made of."""
    one = forward[family]
    assert one["rows"] < 1e-6 and one["restored"] < CLOSE
    assert one["residual"] is not None and one["residual"] < CLOSE
    assert one["adapter"] is not None and one["adapter"] < CLOSE, "what Save wrote, by the stock loader"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_block_has_a_strength_that_acts(forward, family):
    kinds = forward[family]["kinds"]
    assert kinds.keys() == KINDS[family]
    assert all(changed > 1e-3 for changed in kinds.values()), kinds


@pytest.mark.parametrize("family", IN_DIFFUSERS)
def test_comfyui_and_diffusers_compute_the_same(in_diffusers, family):
    """With the weights of diffusers' model put into ComfyUI's layout by the family's table."""
    one = in_diffusers[family]
    assert "error" not in one, one["error"]
    assert one["gap"] < CLOSE and one["by table"] > 30 and one["size"] > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_similarity_and_sweeps_know_every_layer(forward, family):
    """All layers are compared, by kinds of blocks; the cells of a sweep are the merges that they name."""
    one = forward[family]
    assert one["compared"] == one["layers"] and set(one["kinds compared"]) == KINDS[family]
    assert one["with itself"] == pytest.approx(1) and one["with another"] < 0.5
    assert one["sweep"] is not None and one["sweep"] < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_is_what_apply_is(forward, family):
    assert forward[family]["hook"] is not None and forward[family]["hook"] < CLOSE


@pytest.mark.parametrize("family", ["any other"])
def test_a_model_of_no_family(forward, family):
    """Known by ComfyUI's map of LoRA names alone."""
    one = forward["AuraFlow"]
    assert "error" not in one, one["error"]
    assert one["layers"] > 20 and "of no family that is known here" in one["told"]
    for way in ("patch", "live", "merge", "export", "hook", "sweep", "residual"):
        assert one[way] is not None and one[way] < CLOSE, way
    assert one["compared"] == one["layers"] and one["with itself"] == pytest.approx(1)
