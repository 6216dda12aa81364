"""The subcommands basis, residual, merge, export and similarity, as they are called, against the core and the
published files."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from demo.small_flux import GOLDEN, own_weight
from qrlora_core import (
    Adapter,
    AdapterLayer,
    MergeRecipe,
    Residual,
    base_r,
    decompose,
    merge,
    merged_adapter,
    open_adapter,
    open_basis,
    save_adapter,
)
from qrlora_plots import PlotsUnavailableError
from train.cli import main
from train.model.source import BaseModel

BASE = GOLDEN / "base_bfl.safetensors"
STYLE, CONTENT, FULL = (GOLDEN / f"official_{name}.safetensors" for name in ("style", "content", "qr"))


def run(*arguments):
    return main([str(argument) for argument in arguments])


def assert_same_adapter(first, second, tolerance=0.0):
    assert first.layers.keys() == second.layers.keys()
    for name in first.layers:
        one, two = (adapter.layer(name) for adapter in (first, second))
        scale = [adapter.layers[name].scaling for adapter in (first, second)]
        for a, b in ((one.up, two.up), (one.down * scale[0], two.down * scale[1])):
            assert a.shape == b.shape and float((a.float() - b.float()).abs().max()) <= tolerance, name


def change_of(adapter, name):
    up, down, alpha = adapter.update(name)
    return alpha / up.shape[1] * (up.double() @ down.double())


@pytest.mark.parametrize("dtype, published", [("float32", "fp32"), ("float16", "fp16")])
def test_residual_is_the_published_one(tmp_path, dtype, published):
    """With the adapter's own Q; the published script rounds to float16 either way."""
    path = tmp_path / "r.safetensors"
    assert run("residual", "--model", BASE, "--adapter", STYLE, "--dtype", dtype, "--output", path) == 0
    ours, theirs = Residual(path), Residual(GOLDEN / f"official_residual_{published}.safetensors")
    assert ours.layers.keys() == theirs.layers.keys()
    assert {str(spec.dtype) for spec in ours.layers.values()} == {f"torch.{dtype}"}
    style = open_adapter(STYLE)
    for name in ours.layers:
        difference = float((ours.weight(name).float() - theirs.weight(name).float()).abs().max())
        assert difference < 1e-3, "half a unit of float16 below 1"
        q = style.layer(name).up
        exact = own_weight(name, style) - q @ base_r(own_weight(name, style), q)
        assert float((ours.weight(name).float() - exact).abs().max()) < (2e-6 if dtype == "float32" else 5e-4)


def test_residual_without_an_adapter_decomposes(tmp_path):
    path = tmp_path / "r.safetensors"
    assert run("residual", "--model", BASE, "--rank", 4, "--targets", "attn.to_q", "--output", path) == 0
    ours, source = Residual(path), BaseModel(BASE)
    assert len(ours.layers) == 2
    for name in ours.layers:
        weight = source.weight(name)
        basis = decompose(weight, 4, method="exact")
        torch.testing.assert_close(ours.weight(name), weight - basis.q @ basis.r, rtol=1e-4, atol=1e-5)


def test_residual_of_a_full_qr_file_is_refused(tmp_path, caplog):
    """Its Q is the trained one: W - Q' Q'^T W would belong to no adapter."""
    assert run("residual", "--model", BASE, "--adapter", FULL, "--output", tmp_path / "r.safetensors") == 1
    assert "a full-QR file holds the trained Q" in caplog.text
    assert not list(tmp_path.iterdir())


def foreign_adapter(path, orthonormal):
    """Another adapter of the same layers on a random basis."""
    layers, generator = {}, torch.Generator().manual_seed(0)
    for name, info in open_adapter(STYLE).layers.items():
        q = torch.randn(info.shape[0], 4, generator=generator)
        q = torch.linalg.qr(q).Q if orthonormal else q
        layers[name] = AdapterLayer(q, torch.randn(4, info.shape[1], generator=generator))
    return save_adapter(Adapter.from_tensors("other", layers, 4.0), path)


def test_residual_of_a_merge_of_two_bases(tmp_path):
    """Its joint basis is orthonormal, so the residual is what every other is: W - scaling * Q Q^T W."""
    other = foreign_adapter(tmp_path / "other.safetensors", orthonormal=True)
    joint, path = tmp_path / "joint.safetensors", tmp_path / "r.safetensors"
    assert run("merge", "--style", other, "--content", CONTENT, "--output", joint) == 0
    assert open_adapter(joint).rank == 12
    assert run("residual", "--model", BASE, "--adapter", joint, "--output", path) == 0
    residual, merged, source = Residual(path), open_adapter(joint), BaseModel(BASE)
    for name in residual.layers:
        weight, q = source.weight(name), merged.layer(name).up.float()
        expected = weight - merged.layers[name].scaling * q @ (q.T @ weight)
        torch.testing.assert_close(residual.weight(name), expected, rtol=1e-4, atol=1e-5)


def test_residual_of_a_basis_that_is_not_orthonormal_is_refused(tmp_path, caplog):
    other = foreign_adapter(tmp_path / "other.safetensors", orthonormal=False)
    assert run("residual", "--model", BASE, "--adapter", other, "--output", tmp_path / "r.safetensors") == 1
    assert "not orthonormal" in caplog.text and not (tmp_path / "r.safetensors").exists()


@pytest.mark.parametrize("format", ["portable", "published"])
def test_merge_equals_the_core(tmp_path, format):
    path = tmp_path / "m.safetensors"
    more = ("--format", format, *(("--model", BASE) if format == "published" else ()))
    arguments = ("--style", STYLE, "--alpha", 0.9, "--content", CONTENT, "--beta", -0.5)
    assert run("merge", *arguments, "--output", path, *more) == 0
    style, content = (MergeRecipe.of(open_adapter(one)) for one in (STYLE, CONTENT))
    expected = merged_adapter(merge(style, 0.9, content, -0.5))
    written = open_adapter(path)
    assert_same_adapter(written, expected, 1e-7)
    assert written.metadata["qrlora.format"] == format
    assert run("merge", *arguments, "--on-basis-mismatch", "raise", "--output", tmp_path / "n.safetensors") == 0


def test_merge_of_different_bases(tmp_path, caplog):
    style = open_adapter(STYLE)
    layers = {}
    for name in style.layers:
        layer = style.layer(name)
        turned = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
        layers[name] = AdapterLayer(layer.up @ turned, layer.down)
    other = save_adapter(Adapter.from_tensors("other", layers, 8.0), tmp_path / "other.safetensors")
    arguments = ("merge", "--style", STYLE, "--content", other)
    assert run(*arguments, "--on-basis-mismatch", "raise", "--output", tmp_path / "a.safetensors") == 1
    assert "different bases" in caplog.text and not (tmp_path / "a.safetensors").exists()
    assert run(*arguments, "--output", tmp_path / "b.safetensors") == 0
    assert run(*arguments, "--on-basis-mismatch", "align", "--output", tmp_path / "c.safetensors") == 0
    stacked, aligned = open_adapter(tmp_path / "b.safetensors"), open_adapter(tmp_path / "c.safetensors")
    assert (stacked.rank, aligned.rank) == (8, 8)  # one span: the joint basis needs no more columns
    for name in style.layers:  # and aligning loses nothing
        expected = change_of(style, name) + change_of(open_adapter(other), name)
        for found in (stacked, aligned):
            assert float((change_of(found, name) - expected).norm() / expected.norm()) < 1e-5


def test_export_to_both_formats_and_back(tmp_path):
    portable, published = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert run("export", "--adapter", STYLE, "--output", portable) == 0
    assert run("export", "--adapter", portable, "--format", "published", "--model", BASE, "--output", published) == 0
    assert_same_adapter(open_adapter(portable), open_adapter(STYLE))
    assert_same_adapter(open_adapter(published), open_adapter(STYLE))
    ours, theirs = load_file(published), load_file(STYLE)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)


def test_export_scales(tmp_path):
    assert run("export", "--adapter", STYLE, "--strength", 0.25, "--output", tmp_path / "a.safetensors") == 0
    quarter, whole = open_adapter(tmp_path / "a.safetensors"), open_adapter(STYLE)
    for name in whole.layers:
        torch.testing.assert_close(change_of(quarter, name), 0.25 * change_of(whole, name), rtol=1e-5, atol=1e-9)


def test_export_of_a_published_full_qr_file(tmp_path, caplog):
    """Its LoRA is Q'R' - QR, with Q and R of the base model: without that model it cannot be made."""
    path = tmp_path / "a.safetensors"
    assert run("export", "--adapter", FULL, "--output", path) == 1
    assert "name that with --model" in caplog.text and not path.exists()
    assert run("export", "--adapter", FULL, "--model", BASE, "--output", path) == 0
    made, full, start = open_adapter(path), open_adapter(FULL), open_adapter(GOLDEN / "official_qr_step0.safetensors")
    for name in full.layers:
        trained, initial = full.layer(name), start.layer(name)
        expected = trained.up.double() @ trained.down.double() - initial.up.double() @ initial.down.double()
        assert made.layers[name].rank == 16
        assert float((change_of(made, name) - expected).norm() / expected.norm()) < 1e-3
    again = tmp_path / "b.safetensors"
    assert run("export", "--adapter", FULL, "--format", "published", "--output", again) == 0
    assert_same_adapter(open_adapter(again), full)


def test_export_as_published_needs_the_base_r(tmp_path, caplog):
    layers = {name: open_adapter(STYLE).layer(name)._replace(initial=None) for name in open_adapter(STYLE).layers}
    bare = save_adapter(Adapter.from_tensors("bare", layers, 8.0), tmp_path / "bare.safetensors")
    assert run("export", "--adapter", bare, "--format", "published", "--output", tmp_path / "a.safetensors") == 1
    assert "base R" in caplog.text and not (tmp_path / "a.safetensors").exists()


def test_basis_is_the_file_that_fit_looks_for(tmp_path):
    from train.model.basis import basis_path

    assert run("basis", "--model", BASE, "--rank", 4, "--decomposition", "exact", "--output", tmp_path) == 0
    source = BaseModel(BASE)
    path = basis_path(tmp_path, source, source.targets(), 4, "exact")
    assert [path] == list(tmp_path.iterdir())
    readers, metadata = open_basis(path)
    assert metadata["qrlora.base_fingerprint"] == source.fingerprint and len(readers) == 15
    for name, read in readers.items():
        q, r = read()
        expected = decompose(source.weight(name), 4, method="exact")
        torch.testing.assert_close(q, expected.q)
        torch.testing.assert_close(r, expected.r)
    before = path.stat().st_mtime_ns
    assert run("basis", "--model", BASE, "--rank", 4, "--decomposition", "exact", "--output", tmp_path) == 0
    assert path.stat().st_mtime_ns == before, "a second call decomposes nothing"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("residual", "--model", BASE, "--rank", 200), "rank 200 does not fit"),
        (("residual", "--model", BASE, "--targets", "attn.to_w"), "matches no layer; did you mean"),
        (("residual", "--model", "missing.safetensors"), "does not exist; nothing is downloaded"),
        (("basis", "--model", BASE, "--rank", 200), "rank 200 does not fit"),
        (("merge", "--style", BASE, "--content", CONTENT), "base_bfl.safetensors"),
        (("merge", "--style", "missing.safetensors", "--content", CONTENT), "missing.safetensors"),
        (("export", "--adapter", GOLDEN / "official_residual_fp16.safetensors"), "residual"),
        (
            ("export", "--adapter", STYLE, "--format", "published", "--model", STYLE),
            "not a FLUX.1, FLUX.2, Qwen-Image, Z-Image, Krea 2, SD3.5 or SDXL transformer",
        ),
    ],
)
def test_refused(tmp_path, caplog, arguments, message):
    assert run(*arguments, "--output", tmp_path / "out.safetensors") == 1
    assert message in caplog.text and "Traceback" not in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "arguments",
    [
        ("residual", "--model", BASE),
        ("merge", "--style", STYLE, "--content", CONTENT),
        ("export", "--adapter", STYLE),
    ],
    ids=lambda arguments: arguments[0],
)
def test_nothing_is_overwritten(tmp_path, caplog, arguments):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"mine")
    assert run(*arguments, "--output", path) == 1
    assert "exists already" in caplog.text and path.read_bytes() == b"mine"


def test_an_adapter_of_another_model(tmp_path, caplog):
    name = "transformer_blocks.0.attn.to_q"
    layer = AdapterLayer(torch.eye(32)[:, :4], torch.ones(4, 32))
    small = save_adapter(Adapter.from_tensors("small", {name: layer}, 4.0), tmp_path / "small.safetensors")
    assert run("residual", "--model", BASE, "--adapter", small, "--output", tmp_path / "r.safetensors") == 1
    assert f"{name} is (128, 128) in base_bfl.safetensors, the adapter has (32, 32)" in caplog.text
    foreign = AdapterLayer(open_adapter(STYLE).layer(name).up, torch.ones(8, 128))
    foreign = foreign._replace(initial=decompose(torch.randn(128, 128), 8))
    wrong = save_adapter(
        Adapter.from_tensors("wrong", {name: foreign._replace(up=foreign.initial.q)}, 8.0),
        tmp_path / "wrong.safetensors",
        format="published",
    )
    assert run("residual", "--model", BASE, "--adapter", wrong, "--output", tmp_path / "r.safetensors") == 1
    assert "was made for another base model" in caplog.text


def test_similarity_writes_numbers_and_a_picture(tmp_path, caplog):
    caplog.set_level("INFO")
    assert run("similarity", STYLE, CONTENT, "--output", tmp_path / "s.json", "--fixed-scale") == 0
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["schema"] == "qr-lora/similarity" and len(report["layers"]) == 15 and report["same_basis"]
    style, content = open_adapter(STYLE), open_adapter(CONTENT)
    entry = report["layers"][0]
    one, two = (adapter.layer(entry["name"]).down.double().flatten() for adapter in (style, content))
    assert entry["cosine"]["delta_r"] == pytest.approx(float(one @ two / one.norm() / two.norm()), abs=1e-9)
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == (1600, 2300)
    assert "15 layers in both" in caplog.text


def test_similarity_without_matplotlib(tmp_path, caplog, monkeypatch):
    def missing(*_, **__):
        raise PlotsUnavailableError("plots need matplotlib; run: python -m pip install matplotlib")

    monkeypatch.setattr("train.similarity.similarity_png", missing)
    assert run("similarity", STYLE, CONTENT, "--output", tmp_path / "s.json") == 0
    assert "-m pip install matplotlib" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_similarity_refuses(tmp_path, caplog):
    assert run("similarity", STYLE, CONTENT, "--output", tmp_path / "s.png") == 1
    assert "--output is a .json file" in caplog.text
    (tmp_path / "s.png").write_bytes(b"mine")
    assert run("similarity", STYLE, CONTENT, "--output", tmp_path / "s.json") == 1
    assert "s.png exists already" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]
    assert run("similarity", STYLE, tmp_path / "none.safetensors", "--output", tmp_path / "t.json") == 1
