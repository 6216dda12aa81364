"""What campaigns have found, each made by hand once more, so that it stays found."""

import io
import json
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import qrlora_core as core
from qrlora_core.storage import TensorFile
from tests.core.test_merge import NAMES, make
from tests.hostile import readers
from train import events
from train.data.captions import DatasetError
from train.data.pictures import read_picture
from train.errors import TrainError
from train.model.source import BaseModel

STEP = {"step": 1, "steps": 3, "loss": 0.5, "smoothed_loss": 0.5, "lr": 1e-4, "seconds": 1, "eta": 2, "peak_memory": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base model's tensors, with scaled fp8."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    path.write_bytes(list(readers._models())[1])
    file = TensorFile(path, skip_other=True)
    return {key: file.tensor(key) for key in file.specs}


def test_a_published_adapter_that_says_qr_is_refused(tmp_path):
    """It was read as Q' and R', which takes the weight's core away."""
    layers = {}
    for name in NAMES:
        up, down, _ = make(1).layer(name)
        layers[name] = core.AdapterLayer(up, down, core.Basis(up, torch.ones(3, 10)))
    path = core.save_adapter(
        core.Adapter.from_tensors("a", layers, 3.0), tmp_path / "a.safetensors", format="published"
    )
    file = TensorFile(path)
    tensors = {key: file.tensor(key) for key in file.specs}
    save_file(tensors, path, metadata={**file.metadata, "qrlora.method": "qr"})
    with pytest.raises(core.FileFormatError, match="its metadata say method qr; it is damaged"):
        core.open_adapter(path)


def test_a_png_cannot_ask_for_four_gigabytes(tmp_path):
    """The length of a chunk was allocated before anybody saw that the file ends."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (1, 2, 3)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    place = content.index(b"IDAT") - 4
    content[place : place + 4] = b"\x7f\xff\xff\xf0"
    path = tmp_path / "a.png"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read_picture(path)  # the pixels are whole, only the length is not
    except DatasetError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50e6


ODD = ["[[1]]", '{"a": [16]}', '"16"', "[16, 56, null]", "[1e400]", f"[{'9' * 400}]"]


@pytest.mark.parametrize("value", ODD)
def test_a_model_folder_with_odd_positions(tmp_path, model, value):
    save_file(model, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text(f'{{"axes_dims_rope": {value}}}')
    with pytest.raises(TrainError) as caught:
        BaseModel(tmp_path)
    assert caught.value.reason == "model"


@pytest.mark.parametrize("names", [{"a": ["m"]}, {"a": {}}, {"a": "x" * 300}, {"a": "../m.safetensors"}, {"a": None}])
def test_a_model_folder_whose_index_names_no_files(tmp_path, model, names):
    save_file(model, tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(TrainError, match="which m.safetensors.index.json names"):
        BaseModel(tmp_path)


@pytest.mark.parametrize(
    "key,shape",
    [
        ("double_blocks.0.img_attn.qkv.weight", (768,)),
        ("double_blocks.0.img_attn.qkv.weight", (384, 1, 2)),
        ("vector_in.in_layer.weight", (128 * 64,)),
        ("img_in.weight", (128, 8, 8)),
    ],
)
def test_weights_that_are_no_matrix(tmp_path, model, key, shape):
    save_file({**model, key: model[key].reshape(shape)}, tmp_path / "m.safetensors")
    with pytest.raises(TrainError):
        BaseModel(tmp_path / "m.safetensors").targets()


@pytest.mark.parametrize(
    "key,rows",
    [
        ("double_blocks.0.img_attn.proj.weight", 0),
        ("double_blocks.0.img_attn.qkv.weight", 2),
        ("single_blocks.0.linear1.weight", 4),  # q, k and v had none, and were mixed by ConvRot or trained
    ],
)
def test_a_weight_of_too_few_rows(tmp_path, model, key, rows):
    weight = model[key].repeat(2, 1)[:rows].clone()
    save_file({**model, key: weight}, tmp_path / "m.safetensors")
    with pytest.raises(TrainError, match="does not hold .*: get the file again") as caught:
        BaseModel(tmp_path / "m.safetensors")
    assert caught.value.reason == "model"


def test_a_large_picture_of_16_bits_takes_no_arrays_of_floats(tmp_path):
    """It took 24 bytes for a pixel and four seconds for 84 million."""
    path = tmp_path / "a.tif"
    levels = np.linspace(0, 65535, 4_000_000).astype(np.uint16).reshape(2000, 2000)
    Image.fromarray(levels).save(path)
    tracemalloc.start()  # numpy's arrays are counted, Pillow's are not
    try:
        picture = read_picture(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert np.array_equal(np.asarray(picture)[..., 0], np.rint(levels * np.float32(255 / 65535)))
    assert peak < 13 * levels.size


@pytest.mark.parametrize(
    "change",
    [
        {"step": 10**400},
        {"peak_memory": -(10**30)},
        {"loss": 10**400},
        {"extra": json.loads("[" * 200 + "]" * 200)},
        {"time": 10**400},
    ],
    ids=lambda change: next(iter(change)),
)
def test_events_that_no_curve_can_show(change):
    line = json.dumps({"v": 1, "event": "step", "time": 1.0, **STEP, **change})
    with pytest.raises(events.EventError):
        events.parse(line)


def test_an_events_file_that_is_not_text(tmp_path):
    (tmp_path / "e").write_bytes(b"\xff\xfe\n")
    with pytest.raises(events.EventError, match="not UTF-8"):
        events.read_events(tmp_path / "e")


@pytest.mark.parametrize("table", [{"9" * 5000: {"sha256": "0"}}, {"pid": 5, "created": 10**400}, {"pid": 10**30}])
def test_run_folders_that_vouch_for_nonsense(tmp_path, table):
    run = readers.runs.RunFolder(tmp_path)
    for name in ("result.json", "trainer.json"):
        (tmp_path / name).write_text(json.dumps(table))
    assert run.results() == {} and run.earlier_trainer() is None


@pytest.mark.parametrize("value", ["~nobody-here/python", "a\0b", "x" * 5000])
def test_owners_files_that_name_no_file(tmp_path, monkeypatch, value):
    path = tmp_path / "qrlora.json"
    path.write_text(json.dumps({"python": value}))
    monkeypatch.setenv(readers.owner.VARIABLE, str(path))
    with pytest.raises(Exception, match="which is not a file") as caught:
        readers.owner.owner()
    assert readers.is_refusal(caught.value) and len(str(caught.value)) < 500


def test_names_of_megabytes_do_not_fill_the_message(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({f"{NAMES[0]}.residual.weight": torch.ones(2, 2), "x" * 200_000: torch.ones(1)}, path)
    with pytest.raises(core.FileFormatError, match="do not belong") as caught:
        core.Residual(path)
    assert len(str(caught.value)) < 7000


def test_deep_json_in_a_header(tmp_path):
    path = tmp_path / "a.safetensors"
    header = b'{"a":' + b"[" * 60_000 + b"]" * 60_000 + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(core.FileFormatError):
        core.model_fingerprint(path)


def test_losses_that_no_axis_has_room_for():
    steps = [{"step": step, "loss": loss, "smoothed_loss": loss} for step, loss in enumerate((1.0, 1e308, -1e308, 2.0))]
    assert readers.drawn.loss_curve(steps, "loss").shape == (1, 540, 960, 3)


@pytest.mark.parametrize(
    "tensors",
    [
        {"lokr_w1": (2000, 2000), "lokr_w2": (2000, 2000)},
        {"hada_w1_a": (100_000, 1), "hada_w1_b": (1, 100_000), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
    ],
    ids=["LoKr", "LoHa"],
)
def test_a_small_lora_that_stands_for_terabytes(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    module = "lora_unet_double_blocks_0_img_attn_proj"
    save_file({f"{module}.{key}": torch.ones(shape) for key, shape in tensors.items()}, path)
    with pytest.raises(core.FileFormatError, match="larger matrix than any model has"):
        core.open_lora(path, rank=2)


def test_a_lora_whose_factor_is_a_number(tmp_path):
    path, name = tmp_path / "a.safetensors", f"transformer.{NAMES[0]}"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.tensor(1.0)}, path)
    with pytest.raises(core.FileFormatError):
        core.open_lora(path)
