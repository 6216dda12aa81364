"""Ordinary LoRAs as adapters: every dialect gives the same change under the same names, exactly; nothing is dropped."""

import pytest
import torch
from safetensors.torch import save_file

import qrlora_core as core
from qrlora_core.linalg import orthonormality_error

Q = "transformer_blocks.3.attn.to_{}"
torch.manual_seed(0)
UP, DOWN = torch.randn(24, 4), torch.randn(4, 8)  # a fused q, k, v
WHOLE = {Q.format(part): (UP @ DOWN)[8 * index : 8 * index + 8] for index, part in enumerate("qkv")}
SINGLE_UP = torch.randn(56, 4)


def change(adapter, name):
    up, down, alpha = adapter.update(name)
    return alpha / up.shape[1] * up.float() @ down.float()


def opened(tensors, tmp_path, **settings):
    path = tmp_path / "lora.safetensors"
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    return core.open_lora(path, **settings)


def separate(pattern, ends):
    tensors = {}
    for index, part in enumerate("qkv"):
        base = pattern.format(part)
        tensors[base + ends[0]] = UP[8 * index : 8 * index + 8].clone()
        tensors[base + ends[1]] = DOWN.clone()
    return tensors


KOHYA, PEFT = (".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")
DIALECTS = {
    "kohya": {f"lora_unet_double_blocks_3_img_attn_qkv{end}": half for end, half in zip(KOHYA, (UP, DOWN))},
    "native": {f"diffusion_model.double_blocks.3.img_attn.qkv{end}": half for end, half in zip(PEFT, (UP, DOWN))},
    "BFL": {f"double_blocks.3.img_attn.qkv{end}": half for end, half in zip(PEFT, (UP, DOWN))},
    "XLabs": {
        f"double_blocks.3.processor.qkv_lora1{end}": half for end, half in ((".up.weight", UP), (".down.weight", DOWN))
    },
    "diffusers": separate("transformer." + Q, PEFT),
    "PEFT": separate("base_model.model." + Q, (".lora_B.default.weight", ".lora_A.default.weight")),
    "diffusers of old": separate("transformer." + Q, (".lora.up.weight", ".lora.down.weight")),
    "OneTrainer": separate("lora_transformer_transformer_blocks_3_attn_to_{}", KOHYA),
    "SimpleTuner": separate("lycoris_transformer_blocks_3_attn_to_{}", KOHYA),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_say_the_same(dialect, tmp_path):
    found = opened(DIALECTS[dialect], tmp_path)
    assert found.family.name == "FLUX.1" and not found.left_out and not found.lost
    assert list(found.adapter.layers) == list(WHOLE)
    for name, wanted in WHOLE.items():
        assert torch.allclose(change(found.adapter, name), wanted, atol=1e-5)
        assert orthonormality_error(found.adapter.layer(name).up) < 1e-6


@pytest.mark.parametrize("alpha,factor", [(2.0, 0.5), (0.0, 0.0), (-4.0, -1.0)])
def test_alpha(alpha, factor, tmp_path):
    found = opened(DIALECTS["kohya"] | {"lora_unet_double_blocks_3_img_attn_qkv.alpha": torch.tensor(alpha)}, tmp_path)
    for name, wanted in WHOLE.items():
        assert torch.allclose(change(found.adapter, name), factor * wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_what_is_stored_in_few_bits_is_taken_exactly(dtype, tmp_path):
    stored = {key: value.to(dtype) for key, value in DIALECTS["kohya"].items()}
    found = opened(stored, tmp_path)
    up, down = (value.float() for value in stored.values())
    assert torch.allclose(change(found.adapter, Q.format("k")), (up @ down)[8:16], atol=1e-5)


def test_a_single_blocks_fused_module_with_and_without_its_mlp(tmp_path):
    for base, rows in (("lora_unet_single_blocks_1_linear1", 56), ("single_blocks.1.processor.qkv_lora", 24)):
        ends = KOHYA if rows == 56 else (".up.weight", ".down.weight")
        found = opened({base + ends[0]: SINGLE_UP[:rows], base + ends[1]: DOWN}, tmp_path)
        assert len(found.adapter.layers) == (4 if rows == 56 else 3)
        v = change(found.adapter, "single_transformer_blocks.1.attn.to_v")
        assert torch.allclose(v, (SINGLE_UP @ DOWN)[16:24], atol=1e-5)


def test_columns_that_are_zero_are_dropped(tmp_path):
    up = torch.zeros(24, 12)
    for index in range(3):  # what a trainer of separate q, k, v writes when it fuses them
        up[8 * index : 8 * index + 8, 4 * index : 4 * index + 4] = UP[8 * index : 8 * index + 8]
    down = torch.randn(12, 8)
    base = "lora_unet_double_blocks_3_img_attn_qkv"
    found = opened({base + KOHYA[0]: up, base + KOHYA[1]: down}, tmp_path)
    assert found.adapter.rank == 4
    assert torch.allclose(change(found.adapter, Q.format("k")), (up @ down)[8:16], atol=1e-5)
    zero = opened({base + KOHYA[0]: up * 0, base + KOHYA[1]: down}, tmp_path)
    assert zero.adapter.rank == 1 and change(zero.adapter, Q.format("k")).abs().max() == 0


def test_convolutions_with_a_middle(tmp_path):
    up, middle, down = torch.randn(6, 2, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(2, 5, 1, 1)
    base = "lora_unet_down_blocks_1_resnets_0_conv1"
    found = opened(
        {f"{base}.lora_up.weight": up, f"{base}.lora_mid.weight": middle, f"{base}.lora_down.weight": down}, tmp_path
    )
    wanted = torch.einsum("or,rdhw,di->oihw", up[:, :, 0, 0], middle, down[:, :, 0, 0]).flatten(1)
    assert found.family.name == "SDXL"
    assert torch.allclose(change(found.adapter, "down_blocks.1.resnets.0.conv1"), wanted, atol=1e-5)


def test_native_names_of_a_u_net(tmp_path):
    names = ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", "lora_unet_middle_block_1_proj_in")
    halves = dict(zip(KOHYA, (UP, DOWN)))
    found = opened({name + end: half for name in names for end, half in halves.items()}, tmp_path)
    assert list(found.adapter.layers) == [
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
        "mid_block.attentions.0.proj_in",
    ]


def test_halves_that_change_places(tmp_path):
    up = torch.randn(16, 4)
    found = opened(
        DIALECTS["diffusers"] | {"transformer.norm_out.linear" + end: half for end, half in zip(PEFT, (up, DOWN))},
        tmp_path,
    )
    swapped = change(found.adapter, "diffusion_model.final_layer.adaLN_modulation.1")
    assert torch.allclose(swapped, (up @ DOWN).roll(8, 0), atol=1e-5)


def test_names_that_no_family_knows_stay(tmp_path):
    tensors = {f"diffusion_model.blocks.0.self_attn.q{end}": half for end, half in zip(PEFT, (UP, DOWN))}
    found = opened(tensors, tmp_path)
    assert found.family is None and list(found.adapter.layers) == ["diffusion_model.blocks.0.self_attn.q"]
    assert "no family" in core.lora_text(found)[0]
    path = core.save_adapter(found.adapter, tmp_path / "saved.safetensors")
    assert list(core.open_adapter(path).layers) == list(found.adapter.layers)


def test_text_encoders_are_counted(tmp_path):
    text = {
        f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1{end}": half
        for i in range(3)
        for end, half in zip(KOHYA, (UP, DOWN))
    }
    found = opened(DIALECTS["kohya"] | text, tmp_path)
    assert found.text_encoder == 3 and len(found.adapter.layers) == 3
    assert any("3 text encoder modules" in line for line in core.lora_text(found))
    with pytest.raises(core.FileFormatError, match="holds no LoRA of a diffusion model"):
        opened(text, tmp_path)


def test_biases_and_norms_are_refused_or_left_out_and_told(tmp_path):
    more = {
        "double_blocks.3.img_attn.qkv.lora_B.bias": torch.ones(24),
        "double_blocks.3.img_attn.norm.key_norm.scale": torch.ones(4),
    }
    with pytest.raises(core.FileFormatError, match="1 norms, 1 biases.*leave out"):
        opened(DIALECTS["BFL"] | more, tmp_path)
    found = opened(DIALECTS["BFL"] | more, tmp_path, other_parts="leave out")
    assert found.left_out == {"biases": 1, "norms": 1} and len(found.adapter.layers) == 3


LOHA = {
    f"lora_unet_double_blocks_3_img_attn_proj.hada_{part}": torch.randn(8, 2)
    if part.endswith("a")
    else torch.randn(2, 8)
    for part in ("w1_a", "w1_b", "w2_a", "w2_b")
}
LOKR = {
    "lora_unet_double_blocks_3_img_attn_proj.lokr_w1": torch.randn(2, 2),
    "lora_unet_double_blocks_3_img_attn_proj.lokr_w2": torch.randn(4, 4),
}
DIFF = {"diffusion_model.double_blocks.3.img_attn.proj.diff": torch.randn(8, 8)}


def dense(tensors):
    values = list(tensors.values())
    if len(values) == 4:
        return (values[0] @ values[1]) * (values[2] @ values[3])
    return torch.kron(*values) if len(values) == 2 else values[0]


@pytest.mark.parametrize("tensors", [LOHA, LOKR, DIFF], ids=["LoHa", "LoKr", "diff"])
def test_what_is_not_low_rank_is_approximated_on_request(tensors, tmp_path):
    with pytest.raises(core.FileFormatError, match="not low-rank.*'rank'"):
        opened(tensors, tmp_path)
    name = "transformer_blocks.3.attn.to_out.0"
    exact = opened(tensors, tmp_path, rank=8)
    assert torch.allclose(change(exact.adapter, name), dense(tensors), atol=1e-4) and exact.lost[name] < 1e-5
    few = opened(tensors, tmp_path, rank=1)
    values = torch.linalg.svdvals(dense(tensors))
    assert few.lost[name] == pytest.approx(float(1 - values[0] ** 2 / values.square().sum()), abs=1e-4)
    assert any("approximated" in line for line in core.lora_text(few))


@pytest.mark.parametrize(
    "change_of,words",
    [
        (lambda t: t | {"lora_unet_double_blocks_3_img_attn_qkv.dora_scale": torch.ones(24, 1)}, "is a DoRA"),
        (lambda t: {k: v for k, v in t.items() if "down" not in k}, "no down matrix"),
        (lambda t: {k: v[:3] if "down" in k else v for k, v in t.items()}, "pairs"),
        (lambda t: {k: v[:14] if "up" in k else v for k, v in t.items()}, "cannot be cut"),
        (lambda t: t | {"lora_unet_double_blocks_3_img_attn_qkv.oft_blocks": torch.ones(2, 2)}, "unknown kind"),
        (lambda t: t | {"lora_unet_double_blocks_3_img_attn_qkv.alpha": torch.tensor(float("nan"))}, "finite"),
        (lambda t: t | DIALECTS["native"], "twice"),
        (lambda t: {"x": torch.ones(2, 2)}, "no LoRA"),
    ],
)
def test_what_cannot_be_read_is_said(change_of, words, tmp_path):
    with pytest.raises(core.FileFormatError, match=words):
        opened(change_of(dict(DIALECTS["kohya"])), tmp_path)


def test_two_dialects_merge_without_a_model(tmp_path):
    one = opened(DIALECTS["kohya"], tmp_path).adapter
    two = opened(DIALECTS["diffusers"], tmp_path).adapter
    merged = core.merge(core.MergeRecipe.of(one), 0.5, core.MergeRecipe.of(two), 0.25)
    for name, wanted in WHOLE.items():
        assert torch.allclose(change(core.merged_adapter(merged), name), 0.75 * wanted, atol=1e-5)


def test_an_adapter_of_this_house_opens_as_itself(tmp_path):
    layers = {name: core.AdapterLayer(torch.linalg.qr(UP[:8]).Q, DOWN) for name in WHOLE}
    path = core.save_adapter(core.Adapter.from_tensors("a", layers, 4), tmp_path / "a.safetensors")
    assert core.open_lora(path).adapter is core.open_adapter(path)


def test_load_delta_r_names_the_node_for_a_plain_lora(tmp_path):
    save_file(DIALECTS["kohya"], tmp_path / "plain.safetensors")
    with pytest.raises(core.FileFormatError, match="Load LoRA as .R"):
        core.open_adapter(tmp_path / "plain.safetensors")


def test_bases_are_made_when_they_are_asked_for(tmp_path, monkeypatch):
    """A file is read and checked at once, in its own precision; no basis before a layer is used, each of them once."""
    made = []
    real = core.lora_layers.positive_qr
    monkeypatch.setattr(core.lora_layers, "positive_qr", lambda matrix: made.append(matrix.shape) or real(matrix))
    torch.manual_seed(0)
    up, down = torch.randn(24, 3).bfloat16(), torch.randn(3, 8).bfloat16()
    base = "lora_unet_double_blocks_0_img_attn_qkv"
    found = opened({base + KOHYA[0]: up, base + KOHYA[1]: down}, tmp_path)
    (tmp_path / "x.safetensors").unlink(missing_ok=True)  # nothing is read later
    layers = found.adapter.layers
    assert not made and len(layers) == 3 and {info.rank for info in layers.values()} == {3}
    held = found.adapter._read.__self__
    assert held._modules[base].up.dtype == torch.bfloat16
    for name, rows in zip(layers, (slice(0, 8), slice(8, 16), slice(16, 24))):
        first = found.adapter.layer(name)
        assert found.adapter.layer(name) is first
        assert torch.allclose(first.up @ first.down, up[rows].float() @ down.float(), atol=1e-5)
    assert made == [(8, 3)] * 3 and not held._modules, "the file's factors are let go"


def test_many_threads_ask_for_one_layer(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(0)
    base = "lora_unet_double_blocks_0_img_attn_qkv"
    found = opened({base + KOHYA[0]: torch.randn(384, 16), base + KOHYA[1]: torch.randn(16, 128)}, tmp_path)
    names = list(found.adapter.layers) * 8
    with ThreadPoolExecutor(8) as threads:
        layers = list(threads.map(found.adapter.layer, names))
    assert len({id(layer) for layer in layers}) == 3
