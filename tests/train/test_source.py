"""One model in every layout it comes in: equal tensors under equal names; what is no FLUX.1 is refused with advice."""

import os

import pytest
import torch
from safetensors.torch import save_file

from demo.small_flux import GOLDEN, base_weights, golden_flux, to_diffusers
from qrlora_core import TargetError, flux_targets
from tests.train.tiny import sparse_flux
from train.errors import TrainError
from train.model.source import BaseModel

SINGLE = GOLDEN / "base_bfl.safetensors"
FUSED = "double_blocks.0.img_attn.qkv"
Q, K, V = (f"transformer_blocks.0.attn.to_{name}" for name in "qkv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden model as diffusers saves it, in several shards with an index."""
    path = tmp_path_factory.mktemp("pipeline")
    golden_flux().save_pretrained(path / "transformer", max_shard_size="1MB")
    assert len(list((path / "transformer").glob("*.safetensors"))) > 2
    return path


def saved(path, changes=(), prefix="", drop=(), **more):
    """The golden base as a ComfyUI file with some tensors changed, renamed or added."""
    state = {key: value for key, value in base_weights().items() if key not in drop} | dict(changes)
    state = {f"{prefix}{key}": value.clone() for key, value in state.items()}
    save_file(state | more, path)
    return path


def assert_same(first, second):
    assert first.specs.keys() == second.specs.keys()
    assert first.config == second.config
    for name in first.specs:
        assert first.specs[name].shape == tuple(first.tensor(name).shape) == tuple(second.tensor(name).shape)
        assert torch.equal(first.tensor(name), second.tensor(name)), name


def test_single_file_and_folder_give_equal_tensors(folder):
    single = BaseModel(SINGLE)
    for path in (folder, folder / "transformer"):
        assert_same(single, BaseModel(path))
    expected = golden_flux().state_dict()
    assert single.specs.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(single.tensor(name), value), name
    assert single.blocks == {"transformer_blocks": 1, "single_transformer_blocks": 1}


def test_config_makes_the_model(folder):
    from diffusers import FluxTransformer2DModel

    for path in (SINGLE, folder):
        FluxTransformer2DModel(**BaseModel(path).config).load_state_dict(
            {name: BaseModel(path).tensor(name) for name in BaseModel(path).specs}
        )


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.", "transformer."])
def test_prefixes_and_a_text_encoder_beside(tmp_path, prefix):
    """A whole checkpoint, whose text encoder has integers and other names."""
    extra = {
        "text_encoders.clip_l.position_ids": torch.arange(77)[None],
        "text_encoders.t5.shared.weight": torch.ones(3, 3),
        "vae.decoder.conv.weight": torch.ones(2, 2),
    }
    assert_same(BaseModel(saved(tmp_path / "all.safetensors", prefix=prefix, **extra)), BaseModel(SINGLE))


def test_fp8_is_read_as_it_is(tmp_path):
    key = f"{FUSED}.weight"
    small = base_weights()[key].to(torch.float8_e4m3fn)
    model = BaseModel(saved(tmp_path / "fp8.safetensors", {key: small}))
    assert model.specs[f"{Q}.weight"].dtype == torch.float8_e4m3fn
    found = torch.cat([model.weight(name).float() for name in (Q, K, V)])
    assert torch.equal(found, small.float())


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (384,), (384, 1)], ids=str)
def test_scaled_fp8(tmp_path, ending, shape):
    """One factor for a fused weight, or one for each of its rows: q, k and v get their own rows'."""
    key, full = f"{FUSED}.weight", base_weights()[f"{FUSED}.weight"]
    rows = full.abs().amax(1, keepdim=True) if 384 in shape else full.abs().max().reshape(1, 1)
    scale = rows / 400
    packed = (full / scale).to(torch.float8_e4m3fn)
    changes = {key: packed, f"{FUSED}.{ending}": scale.reshape(shape), "scaled_fp8": torch.zeros(2)}
    model = BaseModel(saved(tmp_path / "x.safetensors", changes))
    assert model.specs.keys() == BaseModel(SINGLE).specs.keys()
    found = torch.cat([model.weight(name) for name in (Q, K, V)])
    assert found.dtype == torch.float32
    assert torch.equal(found, packed.float() * scale)
    assert float((found - full).norm() / full.norm()) < 0.05
    assert torch.equal(model.tensor(f"{Q}.bias"), BaseModel(SINGLE).tensor(f"{Q}.bias"))


def test_scaled_fp8_under_diffusers_names(tmp_path):
    state = {key: value.contiguous() for key, value in to_diffusers(base_weights()).items()}
    packed = (state[f"{Q}.weight"] * 8).to(torch.float8_e4m3fn)
    state |= {f"{Q}.weight": packed, f"{Q}.weight_scale": torch.tensor(0.125)}
    save_file(state, tmp_path / "x.safetensors")
    model = BaseModel(tmp_path / "x.safetensors")
    assert torch.equal(model.weight(Q), packed.float() * 0.125)
    assert model.targets() == BaseModel(SINGLE).targets()


def canny(path):
    saved(path, {"img_in.weight": torch.ones(128, 128)})


def chroma(path):
    gone = [key for key in base_weights() if "vector_in" in key]
    saved(path, {"distilled_guidance_layer.in_proj.weight": torch.ones(8, 8)}, drop=gone)


def nvfp4(path):
    saved(path, {f"{FUSED}.weight": torch.zeros(384, 64, dtype=torch.uint8)})


def plain(state):
    return lambda path: save_file(state, path)


def truncated(path):
    saved(path)
    os.truncate(path, path.stat().st_size - 100)


REFUSED = {
    "sd.safetensors": (
        plain({"model.diffusion_model.input_blocks.9.0.op.weight": torch.ones(4, 4)}),
        "is not a FLUX.1.* transformer but a Stable Diffusion 1 or 2 model, or SDXL's refiner",
    ),
    "lora.safetensors": (
        plain({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(4, 4)}),
        "but a LoRA",
    ),
    "adapter.safetensors": (
        plain({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 4)}),
        "but a LoRA or an adapter",
    ),
    "empty.safetensors": (plain({}), "begins with nothing"),
    "chroma.safetensors": (chroma, r"but Chroma.*Use FLUX\.1-dev"),
    "canny.safetensors": (canny, r"takes 128 channels.*a Depth or Canny variant.*Train on FLUX\.1-dev"),
    "nvfp4.safetensors": (nvfp4, "img_attn.qkv is stored as uint8, and nothing says how.*Use the bf16 or fp8"),
    "svdq.safetensors": (plain({"transformer_blocks.0.qkv_proj.qweight": torch.ones(4)}), "but one packed by SVDQuant"),
    "cut.safetensors": (truncated, r"cut\.safetensors is not a readable.*truncated"),
    "flux1-dev-Q4_K_S.gguf": (lambda path: path.write_bytes(b"GGUF"), r"not \.gguf\. Use the bf16 or fp8"),
    "flux1-dev.pt": (lambda path: path.write_bytes(b"x"), r"only safetensors.*not \.pt"),
    "missing.safetensors": (lambda path: None, "missing.safetensors' does not exist; nothing is downloaded"),
    "folder": (lambda path: path.mkdir(), "folder' holds no safetensors file"),
    "pixels.safetensors": (lambda path: path.write_bytes(b"\x89PNG"), "not a readable safetensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    make, message = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(TrainError, match=message) as caught:
        BaseModel(tmp_path / name)
    assert caught.value.reason == "model"


def test_a_block_that_is_packed_or_missing(tmp_path):
    """What is missing in one block only is found when another block has it; what is packed is refused wherever."""
    two = {
        key.replace("_blocks.0.", "_blocks.1."): value for key, value in base_weights().items() if "_blocks.0." in key
    }
    gone = "double_blocks.1.img_mlp.0.weight"
    two[gone] = torch.zeros(4, 4, dtype=torch.uint8)
    with pytest.raises(TrainError, match=r"double_blocks\.1\.img_mlp\.0 is stored as uint8"):
        BaseModel(saved(tmp_path / "x.safetensors", two))
    del two[gone]
    with pytest.raises(TrainError, match=r"transformer_blocks\.1\.ff\.net\.0\.proj\.weight is missing"):
        BaseModel(saved(tmp_path / "y.safetensors", two))
    third = {key.replace("_blocks.1.", "_blocks.3."): value for key, value in two.items()}
    with pytest.raises(TrainError, match=r"numbered \[0, 3\]: some are missing"):
        BaseModel(saved(tmp_path / "z.safetensors", third))


def test_a_download_that_broke_off(folder, tmp_path):
    for file in (folder / "transformer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(TrainError, match=rf"lacks {last.name}.*the download is not complete"):
        BaseModel(tmp_path)


def test_a_folder_of_two_models(tmp_path):
    saved(tmp_path / "a.safetensors")
    saved(tmp_path / "b.safetensors")
    with pytest.raises(TrainError, match=r"a\.safetensors and b\.safetensors .* are two models\. Name one file"):
        BaseModel(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"_class_name": "SD3Transformer2DModel"}',
        '{"axes_dims_rope": "xyz"}',
        '{"axes_dims_rope": [16, 56]}',
        '{"axes_dims_rope": [16, 56, 57]}',
    ],
    ids=len,
)
def test_config_of_a_folder_that_is_damaged_or_foreign(tmp_path, text):
    saved(tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        TrainError, match=r"config\.json|positions take (72|129)|SD3Transformer2DModel, expected FluxTransformer2DModel"
    ):
        BaseModel(tmp_path)


def test_default_targets_are_the_published_ones(folder):
    for path in (SINGLE, folder):
        assert BaseModel(path).targets() == flux_targets(1, 1, 128)


def test_the_real_size(tmp_path):
    model = BaseModel(sparse_flux(tmp_path / "flux1-dev.safetensors"))
    assert list(model.blocks.values()) == [19, 38]
    assert model.targets() == flux_targets(19, 38, 3072)
    assert len(model.targets()) == 342
    assert model.config["num_attention_heads"] == 24 and model.config["joint_attention_dim"] == 4096
    assert len(model.fingerprint) == 16 and model.fingerprint == model.fingerprint


def test_own_targets():
    model = BaseModel(SINGLE)
    names = [target.name for target in model.targets(["attn.to_q", "single_transformer_blocks.0.proj_out"])]
    assert names == [Q, "single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"]
    assert model.targets(["proj_mlp"])[0].shape == (512, 128)
    assert [t.name for t in model.targets([f"{Q}.weight"])] == [Q]


@pytest.mark.parametrize("wrong, hint", [("attn.to_w", "attn.to_q"), ("to_out", "to_out"), ("ff.net.1", "ff.net")])
def test_unknown_targets_name_candidates(wrong, hint):
    with pytest.raises(TargetError, match=rf"target '{wrong}' matches no layer.*did you mean.*{hint}"):
        BaseModel(SINGLE).targets([wrong])


def test_norms_are_no_targets():
    with pytest.raises(TargetError):
        BaseModel(SINGLE).targets(["attn.norm_q"])


def test_fingerprint_tells_weights_apart(folder, tmp_path):
    same = tmp_path / "renamed" / "other name.safetensors"
    same.parent.mkdir()
    same.write_bytes(SINGLE.read_bytes())
    assert BaseModel(same).fingerprint == BaseModel(SINGLE).fingerprint
    key = "single_blocks.0.linear2.weight"
    changed = base_weights()[key].clone()
    changed[0, 0] += 1e-3
    assert BaseModel(saved(tmp_path / "a.safetensors", {key: changed})).fingerprint != BaseModel(SINGLE).fingerprint
    assert BaseModel(folder).fingerprint == BaseModel(folder / "transformer").fingerprint
