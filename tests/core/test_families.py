"""Families' tables: every name is found again, families tell each other apart, sorting and cutting follow them."""

import pytest
import torch
from safetensors.torch import save_file

import qrlora_core as core
from qrlora_core import families
from qrlora_core.families import FAMILIES, find

BY_NAME = {family.name: family for family in FAMILIES}


def layers(family):
    """(kind, layer, diffusers name, native module) of block 0 (or the only one) of every kind."""
    for kind in family.block_kinds:
        for layer in kind.layers:
            path, native = kind.path.format(0), kind.native.format(0)
            yield kind, layer, f"{path}.{layer.suffix}".lstrip("."), f"{native}.{layer.module}".lstrip(".")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_name_is_found_with_dots_and_underscores(family):
    names = [name for _, _, name, _ in layers(family)]
    assert len(set(names)) == len(names)
    for kind, layer, name, native in layers(family):
        for spelled in (name, name.replace(".", "_")):
            found = find(family, spelled)
            assert found.kind == kind and found.layers == (layer,) and found.name(layer) == name
        for spelled in (native, native.replace(".", "_")):
            assert layer in find(family, spelled).layers
        place = families.native_place(family, name, (64, 64))
        assert place.key == f"{native}.weight"
        assert name in families.native_layers(family, native)
        assert families.layer_kind(name, family)[2:] == (layer.suffix, layer.part, layer.stream)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_whole_model_is_recognised_in_both_layouts(family):
    shapes = {True: {}, False: {}}
    for kind, layer, name, native in layers(family):
        rows = sum(one.rows or 1 for one in kind.layers if one.module == layer.module)
        shapes[False][name] = (round((layer.rows or 1) * 240), 240)
        shapes[True][native] = (round(rows * 240), 240)
    for native in (True, False):
        found = families.family_of(shapes[native])
        if family.name == "Chroma":  # its layers are FLUX.1's; a model also has the network that modulates
            assert found.name == "FLUX.1"
            found = families.family_of(shapes[native] | {"distilled_guidance_layer.in_proj": (240, 240)})
        assert found is family


def test_shapes_tell_families_apart_that_share_names():
    assert families.family_of({"double_blocks.0.img_mlp.0": (4 * 64, 64)}).name == "FLUX.1"
    assert families.family_of({"double_blocks.0.img_mlp.0": (6 * 64, 64)}).name == "FLUX.2"
    attention = {f"transformer_blocks.{block}.attn.to_q": (64, 64) for block in range(60)}
    assert families.family_of(attention).name == "Qwen-Image"  # FLUX.1 has 19 of them
    assert families.family_of({"some.layer": (4, 4)}) is None
    assert families.family_of({"t_embedder.mlp.0": (64, 64), "some.blocks.0.layer": (4, 4)}) is None


def test_families_that_share_all_names_are_all_told(tmp_path):
    """FLUX.1's attention and feed-forward are Chroma's, too; a modulation, or what the file says, settles it."""

    def told(modules, **metadata):
        tensors = {}
        for module, (out, width) in modules.items():
            tensors[f"{module}.lora_up.weight"] = torch.randn(out, 2)
            tensors[f"{module}.lora_down.weight"] = torch.randn(2, width)
        save_file(tensors, tmp_path / "x.safetensors", {f"modelspec.{key}": value for key, value in metadata.items()})
        return core.lora_text(core.open_lora(tmp_path / "x.safetensors"))[0]

    both = {"lora_unet_double_blocks_0_img_attn_qkv": (24, 8), "lora_unet_single_blocks_0_linear1": (56, 8)}
    assert told(both) == "FLUX.1 or Chroma"
    assert told(both | {"lora_unet_double_blocks_0_img_mod_lin": (48, 8)}) == "FLUX.1"
    assert told(both, architecture="Chroma/lora") == "Chroma"
    assert told(both, architecture="flux-1-dev/lora") == "FLUX.1"
    assert told({"lora_unet_single_blocks_0_linear1": (72, 8)}) == "FLUX.2"


def test_network_order():
    names = ["x.10.a", "x.2.a", "single_transformer_blocks.0.attn.to_q", "transformer_blocks.2.attn.to_q", "proj_out"]
    names += ["transformer_blocks.10.attn.to_q", "transformer_blocks.2.ff.net.2", "down_blocks.1.attentions.0.proj_in"]
    assert sorted(names, key=families.network_order) == [
        "transformer_blocks.2.attn.to_q",
        "transformer_blocks.2.ff.net.2",
        "transformer_blocks.10.attn.to_q",
        "single_transformer_blocks.0.attn.to_q",
        "down_blocks.1.attentions.0.proj_in",
        "proj_out",
        "x.2.a",
        "x.10.a",
    ]


def test_fused_rows_are_cut():
    found = find(BY_NAME["FLUX.1"], "single_blocks_3_linear1")
    assert families.cut(found, (7 * 8, 8)) == {
        "single_transformer_blocks.3.attn.to_q": (0, 8),
        "single_transformer_blocks.3.attn.to_k": (8, 8),
        "single_transformer_blocks.3.attn.to_v": (16, 8),
        "single_transformer_blocks.3.proj_mlp": (24, 32),
    }
    only = families.cut(find(BY_NAME["FLUX.1"], "single_blocks.3.linear1_qkv"), (24, 8))
    assert [rows for _, rows in only.values()] == [8, 8, 8]
    assert families.cut(find(BY_NAME["Z-Image"], "layers_0_attention_qkv"), (20, 8)) is not None
    assert families.cut(find(BY_NAME["Z-Image"], "layers_0_attention_qkv"), (15, 8)) is None


def test_any_name_makes_an_adapter():
    layer = core.AdapterLayer(torch.linalg.qr(torch.randn(6, 2)).Q, torch.randn(2, 5))
    adapter = core.Adapter.from_tensors("x", {"some.model.10.layer": layer, "some.model.9.layer": layer}, 2)
    assert list(adapter.layers) == ["some.model.9.layer", "some.model.10.layer"]
    assert core.BlockScale(double=0.5, attention=0.1).factor("some.model.9.layer") == 1
    kind = core.layer_kind("some.model.9.layer")
    assert (kind.block, kind.part, kind.stream) == ("other", "other", "both")


def test_ranges_of_a_familys_own_kinds():
    scale = core.BlockScale(
        other_ranges=core.parse_kind_ranges("input 4-5: 0.5; middle: 0", "other_ranges"), family=BY_NAME["SDXL"]
    )
    layer = "transformer_blocks.0.attn1.to_q"
    assert scale.factor(f"down_blocks.1.attentions.0.{layer}") == 0.5
    assert scale.factor(f"down_blocks.2.attentions.0.{layer}") == 1
    assert scale.factor(f"mid_block.attentions.0.{layer}") == 0
    with pytest.raises(core.TargetError, match="the adapter has middle blocks: none .it has input blocks"):
        scale.check([f"down_blocks.1.attentions.0.{layer}"])
    with pytest.raises(core.SettingError, match="names no kind of block"):
        core.parse_kind_ranges("4-5: 0.5", "other_ranges")
    assert str(scale) == "input 4-5: 0.5, middle all: 0"


def test_a_family_settles_names_that_two_share():
    name = "transformer_blocks.3.attn.to_q"
    assert core.layer_kind(name).block == "double"
    assert core.layer_kind(name, BY_NAME["Krea 2"]).block == "single"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_saved_adapter_of_a_family_opens_with_its_names(family, tmp_path):

    from safetensors import safe_open

    torch.manual_seed(0)
    tensors = {
        name: core.AdapterLayer(torch.linalg.qr(torch.randn(8, 2)).Q, torch.randn(2, 6))
        for _, layer, name, _ in layers(family)
        if layer.part == "attention"
    }
    path = core.save_adapter(core.Adapter.from_tensors("x", tensors, 2), tmp_path / "x.safetensors")
    back = core.open_adapter(path)
    assert set(back.layers) == set(tensors)
    with safe_open(path, "pt") as file:
        assert all(key.startswith(family.portable) for key in file.keys())  # noqa: SIM118
