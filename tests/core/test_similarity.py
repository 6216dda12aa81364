"""Similarity: the published tool's numbers on its own adapters, and the mathematics against full matrices."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import qrlora_core as core
from demo.small_flux import GOLDEN
from tests.core.test_merge import NAMES, change, make, of

PUBLISHED = {"delta_r": "delta_r", "q": "q", "r": "base_r"}


@pytest.fixture(scope="module")
def report():
    return core.similarity_report(
        *(core.open_adapter(GOLDEN / f"official_{n}.safetensors") for n in ("style", "content"))
    )


def published_cosines(key):
    """What the published tool computes, from the files' own tensors in float64: layer -> cosine."""
    style, content = (load_file(GOLDEN / f"official_{name}.safetensors") for name in ("style", "content"))
    found = {}
    for name in style:
        if name.endswith(f".lora.{key}.weight"):
            one, two = (file[name].astype(np.float64).ravel() for file in (style, content))
            layer = name.removeprefix("transformer.").removesuffix(f".lora.{key}.weight")
            found[layer] = one @ two / (np.linalg.norm(one) * np.linalg.norm(two))
    return found


@pytest.mark.parametrize("quantity", PUBLISHED)
def test_numbers_equal_the_published_tools(report, quantity):
    wanted = published_cosines(PUBLISHED[quantity])
    found = {entry["name"]: entry["cosine"][quantity] for entry in report["layers"]}
    assert found.keys() == wanted.keys() and len(found) == 15
    assert all(found[name] == pytest.approx(wanted[name], abs=1e-12) for name in wanted)
    values, summary = np.array(list(wanted.values())), report["summary"][quantity]
    for name in ("mean", "std", "min", "max", "median"):
        assert summary[name] == pytest.approx(getattr(np, name)(values), abs=1e-12), name
    assert wanted[summary["max_layer"]] == pytest.approx(values.max(), abs=1e-12)


def test_golden_facts(report):
    assert report["schema"] == "qr-lora/similarity" and report["version"] == 1
    assert report["same_basis"] and report["a"]["basis_fingerprint"] == report["b"]["basis_fingerprint"]
    assert not report["only_in_a"] and not report["only_in_b"]
    for entry in report["layers"]:
        assert entry["angles"]["max"] < 1e-4 and entry["span_overlap"] == pytest.approx(1)
        assert entry["cosine"]["update"] == pytest.approx(entry["cosine"]["delta_r"], abs=1e-6)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@given(st.integers(0, 2), st.sampled_from(["delta_r", "qr"]), st.sampled_from([2, 3]), st.sampled_from([1.0, 4.0]))
def test_updates_against_full_matrices(basis_seed, method, rank, alpha):
    one, two = make(1, alpha=alpha), make(9, rank=rank, basis_seed=basis_seed, method=method)
    report = core.similarity_report(one, two)
    inner = size_one = size_two = 0.0
    for entry in report["layers"]:
        full = [change(adapter, entry["name"]) for adapter in (one, two)]
        inner += float((full[0] * full[1]).sum())
        norms = [float(matrix.norm()) for matrix in full]
        size_one, size_two = size_one + norms[0] ** 2, size_two + norms[1] ** 2
        assert entry["norms"]["update_a"] == pytest.approx(norms[0], rel=1e-5)
        assert entry["norms"]["update_b"] == pytest.approx(norms[1], rel=1e-5)
        assert entry["energy_ratio"] == pytest.approx((norms[1] / norms[0]) ** 2, rel=1e-5)
        wanted = float((full[0] * full[1]).sum()) / (norms[0] * norms[1])
        assert entry["cosine"]["update"] == pytest.approx(wanted, abs=1e-5)
        assert (entry["cosine"]["q"] is None) == (rank != 3)  # shapes that differ have no cosine
    assert report["total"]["cosine_update"] == pytest.approx(inner / math.sqrt(size_one * size_two), abs=1e-5)
    assert report["total"]["energy_ratio"] == pytest.approx(size_two / size_one, rel=1e-5)


def turned(degrees):
    """Two adapters whose spans have exactly these principal angles."""
    count, out = len(degrees), 12
    frame = torch.linalg.qr(torch.randn(out, out, dtype=torch.float64)).Q
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    first, second = frame[:, :count], frame[:, count : 2 * count]
    rotated = first * angles.cos() + second * angles.sin()
    mix = torch.linalg.qr(torch.randn(count, count, dtype=torch.float64)).Q  # the angles do not depend on the columns
    down = torch.randn(count, 10)
    return (
        core.Adapter.from_tensors("turned", {NAMES[0]: core.AdapterLayer(q.float(), down)}, count)
        for q in (first, rotated @ mix)
    )


def test_principal_angles():
    entry = core.similarity_report(*turned([1.0, 30.0, 90.0]))["layers"][0]
    assert entry["angles"]["min"] == pytest.approx(1, abs=1e-3)
    assert entry["angles"]["mean"] == pytest.approx(121 / 3, abs=1e-3)
    assert entry["angles"]["max"] == pytest.approx(90, abs=1e-3)
    squares = [math.cos(math.radians(angle)) ** 2 for angle in (1, 30, 90)]
    assert entry["span_overlap"] == pytest.approx(sum(squares) / 3, abs=1e-6)
    assert not entry["same_basis"] and entry["sign_conflict"] is None


def test_a_q_that_is_not_orthonormal_is_compared_by_its_span():
    one, two = turned([0.0, 40.0])
    layer = one.layer(NAMES[0])
    doubled = core.AdapterLayer(torch.cat([layer.up, 3 * layer.up], dim=1), torch.cat([layer.down, layer.down]))
    stacked = core.Adapter.from_tensors("stacked", {NAMES[0]: doubled}, 2)
    entry = core.similarity_report(stacked, two)["layers"][0]
    assert entry["angles"]["max"] == pytest.approx(40, abs=1e-2) and entry["angles"]["min"] < 0.1


# on different bases the band of the updates takes dR as full
@pytest.mark.parametrize("same,triangular", [(True, True), (True, False), (False, False)])
def test_the_null_band_holds_95_percent_of_random_adapters(same, triangular):
    torch.manual_seed(0)
    out, width, rank, count = 40, 30, 6, 400
    names = [f"transformer_blocks.{index}.attn.to_q" for index in range(count)]

    def random(seed):
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for index, name in enumerate(names):
            torch.manual_seed(index if same else 10000 * seed + index)
            q = torch.linalg.qr(torch.randn(out, rank)).Q
            down = torch.randn(rank, width, generator=generator)
            layers[name] = core.AdapterLayer(q, torch.triu(down) if triangular else down)
        return core.Adapter.from_tensors("random", layers, rank)

    report = core.similarity_report(random(1), random(2))
    for quantity in ("delta_r", "update"):
        assert 0.02 < report["summary"][quantity]["outside_null_band"] < 0.09, quantity
    assert report["same_basis"] == same
    if same:
        assert report["summary"]["sign_conflict"]["mean"] == pytest.approx(0.5, abs=0.01)
        assert report["layers"][0]["null_band"]["update"] == pytest.approx(1.96 / math.sqrt(rank * width), rel=1e-3)


def test_signs_and_zeros():
    adapter = make(1)
    opposite = core.merged_adapter(of(adapter).scaled(-2.0))
    report = core.similarity_report(adapter, opposite)
    assert all(entry["sign_conflict"] == 1 and entry["cosine"]["update"] == -1 for entry in report["layers"])
    assert report["total"]["energy_ratio"] == pytest.approx(4)
    nothing = core.merged_adapter(of(adapter).scaled(0.0))
    report = core.similarity_report(adapter, nothing)
    assert report["summary"]["delta_r"] is None and report["total"]["cosine_update"] is None
    assert report["layers"][0]["energy_ratio"] == 0 and report["layers"][0]["sign_conflict"] is None


def test_a_full_qr_file_is_compared_by_what_it_holds(golden):
    """Only the trained Q' and R' are there: its update is not known, and nothing is made up."""
    style, full = (core.open_adapter(golden / f"official_{name}.safetensors") for name in ("style", "qr"))
    report = core.similarity_report(style, full)
    assert report["summary"]["delta_r"] is None and report["summary"]["update"] is None
    assert report["b"]["basis_fingerprint"] is None and report["total"]["update_norm_b"] is None
    assert report["summary"]["q"]["min"] > 0.99 and report["summary"]["r"]["min"] > 0.99


def test_layers_that_one_lacks_are_listed():
    one, two = make(1), make(2, names=NAMES[:1] + ("transformer_blocks.5.attn.to_k",))
    report = core.similarity_report(one, two)
    assert report["only_in_a"] == [NAMES[1]] and report["only_in_b"] == ["transformer_blocks.5.attn.to_k"]
    with pytest.raises(core.TargetError, match="no layer in common"):
        core.similarity_report(make(1, names=NAMES[:1]), make(2, names=NAMES[1:]))
    with pytest.raises(core.TargetError, match="different models"):
        core.similarity_report(make(1), make(2, width=11))


def test_layers_are_read_once_each_and_let_go():
    one, two, reads = make(1), make(2), []
    for adapter in (one, two):
        adapter.basis_fingerprint  # noqa: B018  cached: it reads every Q
        read = adapter._read
        adapter._read = lambda name, read=read, who=adapter.name: reads.append((who, name)) or read(name)
    seen = []
    core.similarity_report(one, two, progress=lambda names: (seen.append(name) or name for name in names))
    assert seen == list(NAMES) and sorted(reads) == sorted((who, name) for who in ("a1", "a2") for name in NAMES)
