"""Ordinary LoRAs on a small model of each family: this pack and the stock loader change every weight alike."""

import pytest

FAMILIES = ("FLUX.1", "FLUX.2", "Chroma", "Z-Image", "Qwen-Image", "Krea 2", "SD3.5", "SDXL")
DIALECTS = {
    "FLUX.1": {"diffusers", "native", "kohya", "onetrainer", "simpletuner"},
    "FLUX.2": {"diffusers", "native", "kohya", "onetrainer", "simpletuner"},
    "Chroma": {"diffusers", "native", "kohya", "onetrainer", "simpletuner"},
    "Z-Image": {"diffusers", "native", "kohya", "simpletuner"},
    "Qwen-Image": {"diffusers", "native", "kohya", "simpletuner"},
    "Krea 2": {"diffusers", "native", "kohya", "simpletuner"},
    "SD3.5": {"diffusers", "native", "kohya", "onetrainer", "simpletuner", "peft"},
    "SDXL": {"diffusers", "native", "kohya", "simpletuner"},
}
CLOSE = 1e-6  # relative to the change of the weight itself


@pytest.fixture(scope="module")
def found(run_probe):
    return run_probe("lora_probe.py")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dialect_changes_weights_as_the_stock_loader_does(found, family):
    one = found[family]
    assert "error" not in one, one["error"]
    assert one["recognised"] == family
    assert one["dialects"].keys() == DIALECTS[family]
    for dialect, numbers in one["dialects"].items():
        assert numbers["gap"] < CLOSE, dialect
        assert family in numbers["family"].split(" or "), dialect
        assert numbers["known"] == numbers["layers"] >= numbers["modules"] >= numbers["weights"] > 10, dialect


@pytest.mark.parametrize("family", FAMILIES)
def test_two_files_merge_as_two_stock_loaders_add(found, family):
    assert found[family]["merge"] < CLOSE
    assert found[family]["export"] < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_a_family_is_the_hosts_map_row_by_row(found, family):
    one = found[family]
    assert one["rows"] and one["published"] >= 14
    assert one["own weight"] and one["residual"] < 1e-6


def test_names_of_xlabs_and_uso(found):
    """USO's as the host reads them; XLabs' own, without single blocks, which the host passes over in silence."""
    one = found["dialects"]
    assert "error" not in one, one["error"]
    assert one["uso"][0] < CLOSE and one["uso"][1] == 19 * 4 + 38 * 2
    assert one["xlabs"][0] < CLOSE and one["xlabs"][1] == 19 * 4
    assert one["xlabs in the host"] == 0


def test_control_loras_of_bfl(found):
    """Refused, or without what no low-rank change can hold; the rest is what the host makes of it."""
    one = found["dialects"]
    assert one["control"][0] < CLOSE and one["control"][1] == one["control kept"] > 300
    assert one["control left"] == ["bias", "img_in", "weight"], "biases, norms, and the wider input"
    assert "changes of a weight's size, which no" in one["control refused"] and "'leave out'" in one["control refused"]
    assert one["control told"][1:] == [
        "left out: 152 norms",
        "left out: 314 biases",
        "left out: 2 changes of a weight's size",
    ]
