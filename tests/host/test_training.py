"""Trained in diffusers, applied in ComfyUI: both compute the same, from a single file and from a diffusers folder."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from demo.server import PACK
from demo.small_flux import GOLDEN, golden_flux, golden_output, golden_tensors
from qrlora_core import Basis, open_adapter
from tests.train.conftest import small_cache
from train.config import FitConfig
from train.model.layer import inject
from train.run.fit import fit
from train.settings import make_config

WORKFLOW = json.loads((PACK / "tests" / "workflows" / "merge_api.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_cache(tmp_path_factory.mktemp("data") / "data.safetensors")


def trained(folder, data, model, method):
    """An adapter of some steps that change the output by more than rounding does."""
    settings = {"model": str(model), "data": str(data), "run_dir": str(folder), "rank": 8, "alpha": 8.0, "steps": 5}
    settings |= {"method": method, "device": "cpu", "precision": "fp32", "base_storage": "fp32", "learning_rate": 1e-2}
    return fit(make_config(FitConfig, settings | {"gradient_accumulation": 1, "gradient_checkpointing": False}))


def diffusers_output(adapter):
    """The golden inputs through diffusers' model with the trained layers in it, not through patched weights."""
    model, scaling = golden_flux(), adapter.alpha / adapter.rank

    def basis_of(name):
        layer = adapter.layer(name)
        return layer.initial if adapter.method == "qr" else Basis(layer.up, None)

    with torch.no_grad():
        targets = adapter.targets
        layers = inject(model, targets, lambda name: with_r(basis_of(name)), adapter.method, scaling)
        for name, layer in layers.items():
            tensors = adapter.layer(name)
            if adapter.method == "qr":
                layer.trained_q.copy_(tensors.up)
                layer.trained_r.copy_(tensors.down)
            else:
                layer.delta_r.copy_(tensors.down)
        return golden_output(model)


def with_r(basis):
    return Basis(basis.q, basis.r if basis.r is not None else torch.zeros(1, 1))


@pytest.mark.parametrize("method", ["delta_r", "delta_r_triangular", "qr"])
@pytest.mark.parametrize("layout", ["single file", "folder"])
def test_trained_here_applied_there(server, data, tmp_path, method, layout):
    model = GOLDEN / "base_bfl.safetensors"
    if layout == "folder":
        model = tmp_path / "pipeline" / "transformer"
        golden_flux().save_pretrained(model)
        model = model.parent
    path = trained(tmp_path / "run", data, model, method)
    name = f"{method} {layout}.safetensors"
    (server.base / "models" / "qrlora" / name).write_bytes(path.read_bytes())
    graph = copy.deepcopy(WORKFLOW)
    graph["2"]["inputs"]["delta_r_name"] = name
    graph["5"]["inputs"]["delta_r"] = ["2", 0]
    server.queue(graph)
    there = load_file(server.base / "output" / "out.safetensors")["out"]
    here = diffusers_output(open_adapter(path))
    assert float((here - golden_tensors()["base.out"]).abs().max()) > 1e-3
    assert float((here - there).abs().max()) < 1e-5
