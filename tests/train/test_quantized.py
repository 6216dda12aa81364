"""Quantised base models: read to the numbers that ComfyUI itself computes from them, or refused by name."""

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.small_flux import base_weights
from tests.train.test_source import FUSED, SINGLE, K, Q, V, saved
from train.errors import TrainError
from train.model.source import BaseModel

HOST, HOST_PYTHON = os.environ.get("COMFYUI_PATH"), os.environ.get("COMFYUI_PYTHON")
# runs in ComfyUI's own Python: quantises every block's weights as the host does, and dequantises them again; once for
# all formats
QUANTISE = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
sys.path.insert(0, sys.argv[1])
source, formats = sys.argv[2], json.loads(sys.argv[3])
sys.argv[1:] = []
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
for target, (name, more) in formats.items():
    state, expected = {}, {}
    for key, value in load_file(source).items():
        if value.dim() != 2 or "_blocks." not in key:
            state[key] = value
            continue
        rows = {"per_channel": True} if "convrot" in more else {}
        packed = QuantizedTensor.from_float(value.float(), QUANT_ALGOS[name]["comfy_tensor_layout"], **more, **rows)
        for suffix, tensor in packed.state_dict(key).items():
            state[suffix] = (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor).contiguous()
        config = list(json.dumps({"format": name, **more}).encode())
        state[key.removesuffix("weight") + "comfy_quant"] = torch.tensor(config, dtype=torch.uint8)
        expected[key] = packed.dequantize().contiguous()
    save_file(state, target)
    save_file(expected, target + ".expected")
"""
FORMATS = {
    "fp8": ("float8_e4m3fn", {}, 0.05),
    "fp8_e5m2": ("float8_e5m2", {}, 0.1),
    "mxfp8": ("mxfp8", {}, 0.05),
    "nvfp4": ("nvfp4", {}, 0.15),
    "int8": ("int8_tensorwise", {}, 0.05),
    "int8_convrot": ("int8_tensorwise", {"convrot": True, "convrot_groupsize": 64}, 0.05),
}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A folder with a model in every format, NAME.safetensors."""
    folder = tmp_path_factory.mktemp("quantised")
    targets = {str(folder / f"{name}.safetensors"): one[:2] for name, one in FORMATS.items()}
    command = [HOST_PYTHON, "-c", QUANTISE, HOST, SINGLE, json.dumps(targets)]
    subprocess.run(command, check=True, timeout=300, cwd=folder)
    return folder


@pytest.mark.process
@pytest.mark.skipif(not HOST_PYTHON, reason="no ComfyUI beside")
@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_the_host(quantised, name):
    """Every weight, and the rows of q, k and v of a fused one, bit by bit."""
    tolerance = FORMATS[name][2]
    target = quantised / f"{name}.safetensors"
    model, plain = BaseModel(target), BaseModel(SINGLE)
    expected = load_file(f"{target}.expected")
    assert name.removesuffix("_e5m2") in model.formats
    assert model.specs.keys() == plain.specs.keys() and model.config == plain.config
    assert torch.equal(torch.cat([model.weight(layer) for layer in (Q, K, V)]), expected[f"{FUSED}.weight"])
    linear1 = [f"single_transformer_blocks.0.{layer}" for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert torch.equal(
        torch.cat([model.weight(layer) for layer in linear1]), expected["single_blocks.0.linear1.weight"]
    )
    assert torch.equal(model.weight("transformer_blocks.0.ff.net.2"), expected["double_blocks.0.img_mlp.2.weight"])
    for target in plain.targets():
        weight, exact = model.weight(target.name), plain.weight(target.name)
        assert weight.dtype == torch.float32 and model.stored_dtype(f"{target.name}.weight") is None
        assert float((weight - exact).norm() / exact.norm()) < tolerance
    for key in ("transformer_blocks.0.attn.norm_q.weight", f"{Q}.bias", "proj_out.weight"):
        assert torch.equal(model.tensor(key), plain.tensor(key))


def config_tensor(**config):
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def int8(scale):
    packed = (base_weights()[f"{FUSED}.weight"] / scale).round().clamp(-127, 127).to(torch.int8)
    return {f"{FUSED}.weight": packed, f"{FUSED}.weight_scale": scale}


def test_int8_rows_and_the_headers_own_metadata(tmp_path):
    """Scales of rows; the format is told by the header instead of by a tensor."""
    scale = base_weights()[f"{FUSED}.weight"].abs().amax(1, keepdim=True) / 127
    state = {key: value.clone() for key, value in base_weights().items()} | int8(scale)
    told = {"format_version": "1.0", "layers": {FUSED: {"format": "int8_tensorwise"}}}
    save_file(state, tmp_path / "x.safetensors", metadata={"_quantization_metadata": json.dumps(told)})
    model = BaseModel(tmp_path / "x.safetensors")
    assert model.formats == ["float32", "int8"]
    weight = torch.cat([model.weight(name) for name in (Q, K, V)])
    assert torch.equal(weight, state[f"{FUSED}.weight"].float() * scale)
    assert float((weight - base_weights()[f"{FUSED}.weight"]).abs().max()) <= 0.51 * float(scale.max())


def without(state, *endings):
    return {key: value for key, value in state.items() if not key.endswith(endings)}


SCALE = torch.tensor(0.01)
W4A8 = {**int8(SCALE), f"{FUSED}.weight_s_rel": torch.ones(384, 8), f"{FUSED}.comfy_quant": config_tensor(format="x")}
FP8 = {f"{FUSED}.weight": base_weights()[f"{FUSED}.weight"].to(torch.float8_e4m3fn)}
REFUSED = {
    "nothing says how": (int8(SCALE), r"img_attn\.qkv is stored as int8, and nothing says how"),
    "no scale": (
        {**without(int8(SCALE), "_scale"), f"{FUSED}.comfy_quant": config_tensor(format="int8_tensorwise")},
        "stored as int8_tensorwise and lacks its scales",
    ),
    "another number of scales": (
        {
            **int8(SCALE),
            f"{FUSED}.weight_scale": torch.ones(7),
            f"{FUSED}.comfy_quant": config_tensor(format="int8_tensorwise"),
        },
        "int8 with 7 scales for 384x128",
    ),
    "a factor that fits nothing": ({f"{FUSED}.weight_scale": torch.ones(7)}, "weight_scale of 7 numbers for 384 rows"),
    "block scales without a name": (
        {**FP8, f"{FUSED}.weight_scale": torch.full((512, 4), 120, dtype=torch.uint8)},
        "weight_scale of 2048 numbers for 384 rows",
    ),
    "a group that is no power of four": (
        {
            **int8(SCALE),
            f"{FUSED}.comfy_quant": config_tensor(format="int8_tensorwise", convrot=True, convrot_groupsize=32),
        },
        "mixed in groups of 32 columns",
    ),
    "W4A8": (W4A8, "is stored as W4A8"),
    "W4A4": (
        {**int8(SCALE), f"{FUSED}.comfy_quant": config_tensor(format="convrot_w4a4")},
        "is stored as ConvRot W4A4",
    ),
    "of tomorrow": (
        {**int8(SCALE), f"{FUSED}.comfy_quant": config_tensor(format="int3_magic")},
        "is stored as int3_magic in int8, which is not known",
    ),
    "something beside": (
        {**FP8, f"{FUSED}.block_zero": torch.ones(4)},
        "with block_zero beside it, which is not known",
    ),
    "NF4": (
        {f"{FUSED}.weight": torch.zeros(24576, 1, dtype=torch.uint8), f"{FUSED}.weight.absmax": torch.ones(768)},
        "is stored as NF4 or int8 of bitsandbytes",
    ),
    "no JSON": ({**int8(SCALE), f"{FUSED}.comfy_quant": torch.tensor([123], dtype=torch.uint8)}, "cannot be read"),
    "deep JSON": (
        {**int8(SCALE), f"{FUSED}.comfy_quant": torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)},
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path, name):
    changes, message = REFUSED[name]
    with pytest.raises(TrainError, match=rf"{message}.*Use the bf16 or fp8 safetensors file") as caught:
        BaseModel(saved(tmp_path / "x.safetensors", changes))
    assert caught.value.reason == "model"


def test_a_packed_text_encoder_beside_is_nobodys_business(tmp_path):
    extra = {"text_encoders.t5.layer.weight": torch.zeros(8, 8, dtype=torch.int8)}
    model = BaseModel(saved(tmp_path / "x.safetensors", prefix="model.diffusion_model.", **extra))
    assert model.formats == ["float32"]
