"""The seam to the host without a host: what drop-downs list and how often they read, and identities of encoders."""

import importlib
import json
import os
import struct
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from tests.nodes import stub_host
from tests.nodes.pack import NAME, ROOT, load


@pytest.fixture
def host(tmp_path, monkeypatch):
    """`nodes.host` over a stub of ComfyUI, with modules of its own for each test."""
    stub = stub_host.install(monkeypatch, tmp_path)
    room = types.ModuleType(f"{NAME}.nodes.host")
    room.__path__ = [str(ROOT / "nodes" / "host")]
    for name in [name for name in sys.modules if name.startswith(f"{NAME}.nodes.host")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, room.__name__, room)
    load("training.locks")  # the packages above
    stub.module = lambda name: importlib.import_module(f"{NAME}.nodes.host.{name}")
    yield stub
    for name in [name for name in sys.modules if name.startswith(f"{NAME}.nodes.host")]:
        del sys.modules[name]


def write(path, *keys):
    """A safetensors file of zeros with these keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {key: {"dtype": "F32", "shape": [1], "data_offsets": [4 * at, 4 * at + 4]} for at, key in enumerate(keys)}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * len(keys)))
    old = time.time() - 60
    os.utime(path, (old, old))
    return path


@pytest.fixture
def opened(host, monkeypatch):
    """Names of the files whose headers were read."""
    folders, names = host.module("folders"), []
    real = folders.TensorFile
    monkeypatch.setattr(folders, "TensorFile", lambda path: names.append(path.name) or real(path))
    return names


def test_a_list_reads_each_header_once(host, opened):
    """The host asks for the lists of both nodes, for every node of a graph, for every prompt and every page."""
    folders, models = host.module("folders"), host.base / "models" / "qrlora"
    for number in range(20):
        write(models / f"{number:02}.safetensors", "transformer.x.lora_A.weight")
    write(models / "deep" / "residual.safetensors", "x.residual.weight")
    (models / "broken.safetensors").write_bytes(b"no")
    for _ in range(10):
        adapters, residuals = folders.file_names(residuals=False), folders.file_names(residuals=True)
    assert len(adapters) == 21 and residuals == ["broken.safetensors", str(Path("deep", "residual.safetensors"))]
    assert sorted(opened) == sorted({*opened}) and len(opened) == 22
    write(models / "new.safetensors", "y.residual.weight")
    assert "new.safetensors" in folders.file_names(residuals=True) and opened.count("00.safetensors") == 1


def test_what_extra_model_paths_lists_stays_in_front(host):
    folders = host.module("folders")
    host.folder_names_and_paths["qrlora"] = (["/mnt/shared/qrlora"], set())
    folders.register_folders()
    paths = host.get_folder_paths("qrlora")
    assert paths[0] == "/mnt/shared/qrlora" and str(host.base / "models" / "qrlora") in paths
    assert folders.save_folder() == Path("/mnt/shared/qrlora")


def test_datasets_are_folders_with_pictures_two_levels_deep(host):
    datasets, root = host.module("datasets"), host.base / "input"
    for name in ("a/1.png", "b/c/1.JPG", "b/c/d/1.png", "empty/x.txt", ".hidden/1.png", "b/.cache/1.png", "1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert datasets.dataset_names() == ["none", "a", "b/c"]
    assert datasets.dataset_folder("b/c/d") == root / "b" / "c" / "d", "deeper ones may be named"
    for name in ("../models", "absent", "/etc", "a/../../models"):
        with pytest.raises(host.module("folders").PathError):
            datasets.dataset_folder(name)
    (root / "empty" / "1.webp").touch()
    assert "empty" in datasets.dataset_names(), "the folder has changed"


def test_a_crowded_folder_is_looked_at_once(host, monkeypatch):
    """It may hold a hundred thousand files, and the host asks for the list at every prompt and page."""
    datasets, root = host.module("datasets"), host.base / "input"
    crowded = root / "crowded"
    crowded.mkdir()
    for number in range(100):
        (crowded / f"{number}.dat").touch()
    old = time.time() - 60
    for folder in (root, crowded):
        os.utime(folder, (old, old))
    looked, real = [], os.scandir
    monkeypatch.setattr(datasets.os, "scandir", lambda folder: looked.append(folder) or real(folder))
    for _ in range(100):
        assert datasets.dataset_names() == ["none"]
    assert looked == [root, crowded]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_what_is_listed_may_lie_on_another_disk(host, tmp_path_factory):
    """A model or a dataset that its owner linked into the folder is not refused after it was offered."""
    folders, datasets = host.module("folders"), host.module("datasets")
    other = tmp_path_factory.mktemp("other disk")
    write(other / "flux.safetensors", "x")
    (other / "set").mkdir()
    (other / "set" / "1.png").touch()
    (host.base / "models" / "diffusion_models" / "linked.safetensors").symlink_to(other / "flux.safetensors")
    (host.base / "input" / "linked").symlink_to(other / "set", target_is_directory=True)
    assert "linked.safetensors" in folders.model_names() and "linked" in datasets.dataset_names()
    assert folders.model_file("linked.safetensors").read_bytes() == (other / "flux.safetensors").read_bytes()
    assert (datasets.dataset_folder("linked") / "1.png").is_file()
    with pytest.raises(folders.PathError):
        folders.model_file("../qrlora/x.safetensors")


class Packed(torch.nn.Linear):
    """As ComfyUI-GGUF keeps a weight: bytes as the parameter, a placeholder in the state dict, and one too many."""

    def __init__(self, data):
        super().__init__(4, 4, bias=False)
        self.weight = torch.nn.Parameter(data, requires_grad=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = torch.zeros_like(self.weight, device="meta")
        destination[prefix + "temp.weight"] = torch.empty(4, 4, device="meta")


def holder(model):
    patcher = types.SimpleNamespace(model=model, backup={}, patches={})
    return types.SimpleNamespace(patcher=patcher, layer_idx=None, tokenizer_options={})


def test_packed_encoders_are_told_apart_by_their_bytes(host):
    encoders = host.module("encoders")
    data = torch.arange(64, dtype=torch.uint8)
    same = [encoders.weights_identity(holder(torch.nn.Sequential(Packed(data.clone())))) for _ in range(2)]
    other = encoders.weights_identity(holder(torch.nn.Sequential(Packed(data + 1))))
    assert same[0] == same[1] != other


def test_an_encoder_that_is_not_in_memory_is_an_error(host):
    encoders = host.module("encoders")
    with pytest.raises(encoders.EncodeError, match=r"0\.weight of this CLIP or VAE is not in memory"):
        encoders.weights_identity(holder(torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta"))))


def test_a_restored_weight_is_widened_while_sampling_keeps_its_memory(host, caplog):
    """On a card: what the work takes for a moment, what the wider weight takes for good, and what a step needs."""
    restore = host.module("restore")
    comfy = sys.modules["comfy"]
    stored = torch.zeros(8, 8).to(torch.float8_e4m3fn)
    growth, sampling = 64, 100_000
    enough = 64 * (4 + 4 + 4) + growth + sampling
    free, wider = [enough], {}
    comfy.model_management.is_device_cpu = lambda device: False
    comfy.model_management.minimum_inference_memory = lambda: sampling
    comfy.model_management.get_free_memory = lambda device: free[0]
    comfy.model_management.cast_to_device = lambda tensor, device, dtype, copy: tensor.to(device, dtype, copy=copy)
    comfy.model_patcher.get_key_weight = lambda model, key: (stored, None, None)
    comfy.lora.calculate_weight = lambda queue, weight, key: weight + 0.3
    comfy.utils.set_attr_param = lambda model, key, weight: wider.update({key: weight})
    model = types.SimpleNamespace(manual_cast_dtype=torch.bfloat16, model_loaded_weight_memory=0)
    backup = {"w": types.SimpleNamespace(weight=stored, inplace_update=False)}
    patcher = types.SimpleNamespace(model=model, backup=backup)
    restore._widen(patcher, {"w": []})
    assert torch.equal(wider.pop("w"), torch.full((8, 8), 0.3, dtype=torch.bfloat16))
    assert model.model_loaded_weight_memory == growth and not caplog.records
    free[0] -= 1
    restore._widen(patcher, {"w": []})
    assert not wider and model.model_loaded_weight_memory == growth
    assert "too little VRAM to keep all restored weights wider" in caplog.text


def test_what_is_remembered_of_a_residual_leaves_the_card(host, monkeypatch):
    """R of the base weight is computed where the model runs, and kept for as long as the model is loaded."""
    application = host.module("application")
    core = importlib.import_module(f"{NAME}.qrlora_core")
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    basis = core.decompose(weight, 4)
    update = core.AdapterLayer(basis.q, torch.ones(4, 24))
    recipe = core.MergeRecipe.of(core.Adapter.from_tensors("a", {"x": update}, 4))
    residual = types.SimpleNamespace(weight=lambda name: core.residual_weight(weight, basis, 1.0))

    class OnTheCard:
        """A tensor of which nothing but a copy in RAM is of use."""

        def cpu(self):
            return basis.r

    monkeypatch.setattr(application, "own_weight", lambda model, place: (weight, torch.float32))
    monkeypatch.setattr(application, "load_device", lambda model: torch.device("cpu"))
    monkeypatch.setattr(application, "base_r", lambda base, q: OnTheCard())
    restored = application._match_layer(None, recipe, None, residual, "x")
    assert restored.basis.r is basis.r and restored.basis.q.device.type == "cpu"
