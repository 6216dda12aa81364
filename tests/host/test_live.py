"""Live application in a real ComfyUI: equal to patching, nearer to the truth on few bits, and gone without a trace."""

import pytest


def test_live_equals_patched(live_probe):
    found = dict(live_probe["equal_to_patched"])
    assert found.pop("off") == found.pop("strength") == found.pop("two nodes") == 0
    assert len(found) == 9 and all(value < 2e-3 for value in found.values()), found  # of the effect; float32 rounding


STORAGES = ["fp32", "bf16", "fp8_e4m3fn", "fp8_e5m2", "scaled_fp8", "mxfp8", "nvfp4", "int8", "int8_convrot"]


@pytest.mark.parametrize("kind", STORAGES)
def test_every_storage_gives_the_exact_update(live_probe, kind):
    if kind not in live_probe["storages"]:
        pytest.skip("this host does not load that format")
    found = live_probe["storages"][kind]
    assert found["effect"] > 1e-3
    rounding = 1e-6
    if kind.startswith("int8"):  # the host multiplies in int8: activations are rounded, with or without an adapter
        rounding = 1e-6 + 1.2 * found["base"]
    else:
        assert found["base"] < 1e-6
    assert found["live"] < rounding
    if kind not in ("fp32", "bf16"):  # a patch rounds the weight once more, and that costs a sixth of the effect
        assert found["patch"] > (1.5 if kind.startswith("int8") else 100) * found["live"]
        assert "live" in found["auto"] and "quantised" in found["auto"]
    else:
        assert "patched" in found["auto"]


def test_nothing_is_left_behind(live_probe):
    found = live_probe["leaves_nothing"]
    assert found["while loaded"] == found["modules"] == found["after turning"] == found["after a clone"] == 9
    assert found["base again"] == found["after the base"] == found["after unloading"] == found["forwards"] == 0
    assert found["turned"] < 1e-5 and found["clone"] == 0
    assert found["raised"] and found["table after an error"] == 0 and found["after an error"] == 0
    assert found["weights untouched"]


def test_turning_alpha_loads_nothing(live_probe):
    found = live_probe["turning_alpha"]
    assert found["same factors"] and found["loads"] == [] and found["patches"] == 0 and found["uuid"]
    assert found["counted"][0] == found["counted"][1] > 0 and found["additional"] == 1, "the host counts the factors"
    assert found["factors freed"]


def test_composes(live_probe):
    found = dict(live_probe["composes"])
    assert found.pop("low vram hooks") == 9 and found.pop("low vram hooks after") == 0
    assert found.pop("hooks after bypass", 0) == 0
    assert found.pop("stock before") < 2e-3 and found.pop("stock after") < 2e-3
    assert all(value < 1e-5 for value in found.values()), found


def test_a_compiled_model(live_probe):
    """Live mode runs it uncompiled: no stale strengths, nothing compiled anew; patch mode and compiling go together."""
    found = dict(live_probe["compiles"])
    if not found:
        pytest.skip("this host has no compile node")
    assert found.pop("effect") > 1e-3 and found.pop("graphs") > 0 and found.pop("compiled anew") == 0
    assert all(value < 1e-6 for value in found.values()), found


HOW_TO_GGUF = """ComfyUI-GGUF is not there: clone github.com/city96/ComfyUI-GGUF into ComfyUI's custom_nodes, or name
its folder in COMFYUI_GGUF, and install its package gguf into ComfyUI's Python"""


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0"])
def test_gguf_by_its_real_loader(live_probe, kind):
    if not live_probe["gguf_files"]:
        pytest.skip(HOW_TO_GGUF)
    found = live_probe["gguf_files"][kind]
    assert "live" in found["auto"] and "quantised" in found["auto"]
    assert found["effect"] > 1e-3 and found["stored"] > 1e-5, "the file holds rounded weights"
    assert found["base"] < 1e-5 and found["live"] < 1e-5, "the weights as they are read, plus the exact update"
    assert found["hooks"] == 9 and found["hooks after"] == 0
    assert "apply without a residual" in found["residual"] or "does not belong" in found["residual"]


def test_memory_that_runs_out(live_probe):
    found = dict(live_probe["memory_ends"])
    assert found.pop("table") == 0
    raised = [name for name in found if name.endswith("raised")]
    assert len(raised) == 6 and all(found.pop(name) for name in raised)
    assert all(value < 1e-6 for value in found.values()), found


def test_auto_where_the_model_does_not_fit(live_probe):
    found = live_probe["fits"]
    assert found["small"] == "the model does not fit on the card" and found["large"] == ""
    assert "patched" in found["processor"]


def test_refusals_say_what_to_do(live_probe):
    found = live_probe["refused"]
    assert "disconnect the residual" in found["residual"] and "disconnect" in found["residual and schedule"]
    assert "needs live mode" in found["patch and schedule"] and "transformer_blocks.7" in found["foreign layer"]
    assert "patched" in found["auto keeps the residual"] and "live" in found["auto follows the schedule"]


def test_schedules_are_followed(live_probe):
    found = live_probe["schedules"]
    euler = {round(sigma, 4): factors[0] for sigma, factors in found["seen"]}
    assert list(euler.values()) == [0.8, 0.8, 0.16, 0.0], "0.8 x the schedule at 0, 1/4, 1/2 and 3/4 of the steps"
    assert all(factors[1] == 1.0 for _, factors in found["seen"]), "the other adapter keeps its strength"
    assert len(found["heun"]) > len(found["seen"]), "samplers that evaluate twice are followed at both"
    assert found["early"] < 1e-5 < 1e-3 < found["early differs"], "first step with, second step without"


def test_each_prompt_by_its_own_text(live_probe):
    found = dict(live_probe["gates"])
    assert found.pop("neither is the base") == found.pop("told for the graph") == 0
    assert found.pop("positive only") < 1e-3 and found.pop("negative only") < 1e-3
    assert all(value < 1e-5 for value in found.values()), found


def test_predictions_are_composed_where_adapters_have_passes_of_their_own(live_probe):
    found = live_probe["passes"]
    for name in ("composed", "beside others", "with guidance"):
        assert found[name] < 1e-4, name
    assert found["not the sum of weights"] > 1e-3
    assert found["cached"] == found["lazily cached"] == 0, "no pass is answered with the result of another"
    runs, off, off_patched = found["boldly cached"]
    assert runs % 3 == 0 and 0 < runs < 24, "a step is skipped with all of its passes, or not at all"
    assert off < 1.1 * off_patched, "skipping costs as much as on a patched model"
    assert found["evaluations"] == 6, "two steps: the model, the style, the content"
    assert found["control"] == [[2, 2, 2], 2]


def test_the_nodes_for_acting_by_prompt(live_probe):
    found = live_probe["by_prompt_nodes"]
    assert found["effect"] > 1e-3
    for name in ("both by prompt", "plain by prompt", "content by prompt", "content first", "told"):
        assert found[name] < 1e-5, name
    assert found["content in its pass"] < 1e-5 and found["plain in passes"] == 0 and found["both in passes"] > 1e-3
    assert found["inserted"] == "<c> a dog again" and "stay off" in found["prompt a cat"]
    assert "where the prompt holds <s>" in found["merge by prompt []"]
    assert "has no trigger: it acts on every prompt" in found["untold"]
