"""Patched models in a real ComfyUI: rows, order, precision, what is refused."""

import os
from pathlib import Path

import pytest

from tests.host.conftest import HOST

NODES = "LoadResidual LoadDeltaR Merge Apply SaveResidual SaveDeltaR ExportLoRA Train TrainOptions Similarity"
NODES += " ScaleSweep ContactSheet BlockScale CreateHook Schedule Prompt ToyModel ToyAdapter ToyTextEncoder ToyVAE"
NODES += " LoadLoRA FromLoRAStack Balance"


OLDER = ("0.3.64", "0.8.0")  # the oldest that the pack promises to work in, and one between


def older_hosts():
    """Other ComfyUI folders to try: COMFYUI_PATHS_EXTRA, or siblings of the host called ComfyUI-<version>.

    Those of OLDER that are not there are parameters too, skipped with how to get them.
    """
    listed = os.environ.get("COMFYUI_PATHS_EXTRA")
    if listed:
        return [pytest.param(Path(path), id=Path(path).name) for path in listed.split(os.pathsep)]
    beside = HOST.parent if HOST else Path.home()
    there = sorted(path for path in beside.glob("ComfyUI-*") if (path / "main.py").is_file()) if HOST else []
    missing = [version for version in OLDER if beside / f"ComfyUI-{version}" not in there]
    return [pytest.param(path, id=path.name) for path in there] + [
        pytest.param(None, id=f"ComfyUI-{version}", marks=pytest.mark.skip(reason=how_to(version, beside)))
        for version in missing
    ]


def how_to(version, beside):
    source = "https://github.com/Comfy-Org/ComfyUI"
    return f"no older ComfyUI: git clone --depth 1 --branch v{version} {source} {beside / f'ComfyUI-{version}'}"


def test_an_older_host_that_is_missing_is_skipped_with_how_to_get_it(monkeypatch, tmp_path):
    (tmp_path / "ComfyUI-0.8.0").mkdir()
    (tmp_path / "ComfyUI-0.8.0" / "main.py").touch()
    monkeypatch.setitem(older_hosts.__globals__, "HOST", tmp_path / "ComfyUI")
    monkeypatch.delenv("COMFYUI_PATHS_EXTRA", raising=False)
    found = {one.id: one for one in older_hosts()}
    assert found["ComfyUI-0.8.0"].values == (tmp_path / "ComfyUI-0.8.0",) and not found["ComfyUI-0.8.0"].marks
    (skip,) = found["ComfyUI-0.3.64"].marks
    assert "git clone" in skip.kwargs["reason"] and "v0.3.64" in skip.kwargs["reason"]


def test_golden_outputs(probe):
    found = dict(probe["golden_outputs"])
    assert found.pop("effect") > 1e-3
    assert len(found) == 10 and all(value < 1e-4 for value in found.values()), found


def test_only_the_right_rows_change(probe):
    found = probe["rows"]
    assert found["v changed"] > 1e-5 and found["q, k kept"] and found["others kept"]
    assert found["single q, k, v changed False"] > 1e-5 and found["single q, k, v changed True"] > 1e-5
    assert found["mlp rows kept False"] and found["mlp rows kept True"]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("route", ["low_rank", "residual"])
def test_order_with_a_stock_lora_does_not_matter(probe, kind, route):
    found = probe["order"]
    assert found[f"{kind} {route}"] < 1e-5 < 1e-3 < found[f"{kind} {route} effect"]


def test_chained_applies_with_one_residual(probe):
    assert probe["order"]["two applies"] < 1e-4 and probe["order"]["two half qr applies"] < 1e-4


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8_e4m3fn", "fp8_e5m2", "scaled_fp8"])
def test_bases(probe, kind):
    found = probe["quantised"][kind]
    assert found["restored"] and found["zero is nothing"] and found["strength 0 is nothing"]
    assert found["ours"] <= found["stock"] * 1.0001 and found["ours weight"] <= found["stock weight"] * 1.0001
    if kind.startswith("fp8"):  # the residual's precision, on the restored layers
        assert found["residual weight"] < 1e-5 < 1e-2 < found["ours weight"]


def test_the_export_through_the_stock_loader_is_the_same(probe):
    assert probe["same_as_export"] == {"output": True, "weights": True}


def test_low_vram_patches(probe):
    found = probe["low_vram"]
    assert found["low_rank"] < 1e-6 and found["residual"] < 1e-6
    assert found["low_rank bf16"] < 5e-3 and found["residual bf16"] < 5e-3


@pytest.mark.parametrize("route", ["low_rank", "residual"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8_e4m3fn"])
def test_models_that_do_not_fit(probe, kind, route):
    for share in ("0.0", "0.55"):
        found = probe["partial_load"][f"{kind} {route} {share}"]
        assert found["restored"] and found["in place"] + found["by function"] == 9
        assert found["in place"] == 0 or share != "0.0"
        assert found["error"] < 1.01 * found["whole"] + 1e-6


def test_what_is_refused_changes_nothing(probe):
    found = probe["refused"]
    assert found["unchanged"] and found["host table"]
    assert "NaN or Inf" in found["nan"]
    assert "lacks 1 of" in found["foreign layer"] and "transformer_blocks.7.attn.to_q" in found["foreign layer"]
    assert "did you mean 'transformer_blocks.0.attn.to_q'" in found["foreign layer"]
    assert "another shape" in found["wrong shape"]
    assert "swap_scale_shift" in found["rearranged"] and "norm_out.linear" in found["rearranged"]
    assert found["family"] == "FLUX.1" and found["published"]
    for name in ("foreign residual", "foreign R"):
        assert "does not belong to this adapter's basis" in found[name]


def test_our_full_qr_files(probe):
    found = probe["full_qr_portable"]
    assert found["method"] == "qr"
    assert all(found[name] < 1e-4 for name in ("ours", "with residual", "stock"))


def test_cancel_leaves_no_file(probe):
    found = probe["cancelled"]
    assert found["exception"] == "InterruptProcessingException" and found["layers"] == 5 and found["left"]
    assert "carry patches" in found["patched"]


@pytest.mark.parametrize("host", older_hosts())
def test_older_hosts(host, run_probe):
    found = run_probe("probe.py", host)
    assert {name.removeprefix("QRLoRA") for name in found["nodes"]} == set(NODES.split())
    for test in (
        test_our_full_qr_files,
        test_cancel_leaves_no_file,
        test_golden_outputs,
        test_only_the_right_rows_change,
        test_chained_applies_with_one_residual,
    ):
        test(found)
    test_low_vram_patches(found)
    test_what_is_refused_changes_nothing(found)
    test_the_export_through_the_stock_loader_is_the_same(found)
    for kind in found["quantised"]:
        test_bases(found, kind)
    for kind in ("fp32", "bf16", "fp8_e4m3fn"):
        for route in ("low_rank", "residual"):
            test_models_that_do_not_fit(found, kind, route)


def test_nothing_connected_changes_nothing(probe):
    found = probe["nothing_connected"]
    assert found["same"] and "stays as it is" in found["said"] and found["one left"] == 0


def test_exports_in_half_the_bits_and_in_fewer_columns(probe):
    found = probe["exports"]
    assert found["float32"] < 1e-5 < found["bfloat16"] < 1e-2
    assert found["bfloat16 bytes"] < 0.6 * found["float32 bytes"]
    assert found["rank"] < 1 and "of the energy left out" in found["rank said"]


def test_the_basis_of_a_full_qr_file_is_computed_once(probe):
    found = probe["full_qr_basis"]
    assert found["cancelled"] and found["nothing half-written"]
    assert found["kept"] == [found["expected"]], "training would look for just this file"
    assert found["first"] < 1e-4 and found["second"] < 1e-4 and found["damaged"] < 1e-4
    assert found["computed again"] == 0 < found["computed for damaged"]


def test_the_dynamic_loader(probe):
    found = probe["dynamic"]
    if not found:
        pytest.skip("this host has no dynamic loader (ComfyUI 0.33 and newer have)")
    assert found["gathered"], "the host moves a patch's tensors into a block of memory and rebuilds the patch"
    assert found["bytes"][0] >= found["bytes"][1], "every tensor is moved, none is left behind"
    assert found["bf16"] < 5e-3
    assert "--disable-dynamic-vram" in found["cannot reload"]
    assert found["delegate"] == ["ModelPatcherDynamic", "ModelPatcher", False]


def test_a_residual_is_not_read_again_while_sampling(probe):
    found = probe["residual_reads"]
    assert found["at loading"] >= 15 and found["at three uses"] == 0 and found["held after unloading"] == 0
