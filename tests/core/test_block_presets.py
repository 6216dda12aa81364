"""Block strengths by name: every preset of every family, and a person's own as JSON."""

import json

import pytest

import qrlora_core as core
from qrlora_core.block_presets import blocks_of
from qrlora_core.families import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}
EVERYWHERE = ("first half", "middle half", "second half", "without attention", "without feed-forward")


def names_of(family, outside=True):
    """Diffusers' names of a whole model as it was released."""
    found = []
    for kind in family.block_kinds:
        numbers = range(max(kind.blocks, 2)) if "{}" in kind.path else (0,)
        if kind.name == "other" and not outside:
            continue
        for number in numbers:
            path = kind.path.format(number)
            found += [f"{path}.{layer.suffix}".lstrip(".") for layer in kind.layers]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_preset_of_a_family_keeps_some_and_drops_some(family):
    names = names_of(family)
    assert set(EVERYWHERE) < set(core.preset_names(family)) <= set(core.preset_names())
    for preset in core.preset_names(family):
        if preset in ("without image stream", "without text stream"):
            continue  # a family of one stream has nothing to drop
        scale = core.preset_scale(preset, names, family)
        factors = {scale.factor(name) for name in names}
        assert factors == {0.0, 1.0}, preset
        scale.check(names)


def kept(preset, family, names=None):
    names = names or names_of(BY_NAME[family])
    scale = core.preset_scale(preset, names, BY_NAME[family])
    return blocks_of([name for name in names if scale.factor(name)], BY_NAME[family])


def test_what_presets_keep():
    flux = [("double", block) for block in range(19)] + [("single", block) for block in range(38)]
    assert kept("first half", "FLUX.1") == flux[:29] and kept("second half", "FLUX.1") == flux[29:]
    assert kept("middle half", "FLUX.1") == flux[14:43]
    assert kept("only double blocks", "FLUX.2") == [("double", block) for block in range(8)]
    assert kept("only single blocks", "Chroma") == flux[19:]
    assert kept("style layers", "SDXL") == [("output", 1)] and kept("content layers", "SDXL") == [("output", 0)]
    assert kept("layout layers", "SDXL") == [("input", 8)]
    assert ("noise_refiner", 0) not in kept("without refiners", "Z-Image")
    assert {kind for kind, _ in kept("without text blocks", "Krea 2")} == {"single", "other"}
    names = names_of(BY_NAME["Qwen-Image"])
    scale = core.preset_scale("without text stream", names, BY_NAME["Qwen-Image"])
    assert scale.factor("transformer_blocks.3.attn.add_q_proj") == 0 and scale.factor(names[0]) == 1


def test_the_style_block_of_sdxl_is_the_one_of_the_papers():
    """up_blocks.0.attentions.1 of diffusers (B-LoRA, InstantStyle), with its block of the U-Net's own numbering."""
    names = names_of(BY_NAME["SDXL"])
    scale = core.preset_scale("style layers", names, BY_NAME["SDXL"])
    attention = {name for name in names if scale.factor(name) and ".attentions." in name}
    assert attention and all(name.startswith("up_blocks.0.attentions.1.") for name in attention)
    layout = core.preset_scale("layout layers", names, BY_NAME["SDXL"])
    attention = {name for name in names if layout.factor(name) and ".attentions." in name}
    assert attention and all(name.startswith("down_blocks.2.attentions.1.") for name in attention)


def test_presets_that_do_not_fit_say_so():
    flux = names_of(BY_NAME["FLUX.1"])
    with pytest.raises(core.TargetError, match="FLUX.1 has no preset 'style layers'; it has first half, .*double"):
        core.preset_scale("style layers", flux, BY_NAME["FLUX.1"])
    with pytest.raises(core.SettingError, match="expected one of first half"):
        core.preset_scale("best", flux, BY_NAME["FLUX.1"])
    with pytest.raises(core.TargetError, match="no family knows"):
        core.preset_scale("first half", ["some.layer"], None)
    only = [name for name in flux if name.startswith("transformer_blocks")]
    with pytest.raises(core.TargetError, match="'only single blocks' is for blocks that this adapter does not have"):
        core.preset_scale("only single blocks", only, BY_NAME["FLUX.1"])


def test_saved_strengths_come_back_equal():
    family = BY_NAME["FLUX.1"]
    names = names_of(family)
    written = core.BlockScale(
        double=0.5, text=-0.3, single_ranges=core.parse_ranges("0-18: 0.25", "x"), family=family,
        other_ranges=core.parse_kind_ranges("other: 0", "x"),
    )  # fmt: skip
    both = core.combined(written, core.preset_scale("second half", names, family))
    back = core.scale_from_json(core.scale_to_json(both), "mine", family)
    for name in names:
        expected = written.factor(name) * core.preset_scale("second half", names, family).factor(name)
        assert both.factor(name) == pytest.approx(expected) and back.factor(name) == both.factor(name)
    with pytest.raises(core.SettingError, match="a factor of 16 cannot be saved"):
        core.scale_to_json(core.combined(core.BlockScale(double=4), core.BlockScale(double=4)))


@pytest.mark.parametrize(
    "change",
    [
        {"qrlora.blocks": 2},
        {"double": 4.5},
        {"double": "1"},
        {"double": True},
        {"double": float("nan")},
        {"ranges": [["double", 0, 1]]},
        {"ranges": [["double", 3, 1, 0.5]]},
        {"ranges": [["double", 0.5, 1, 0.5]]},
        {"ranges": [["../x", 0, 1, 0.5]]},
        {"ranges": [["double", 0, 10**9, 0.5]]},
        {"ranges": 3},
        {"ranges": [["double", 0, 1, 0.5]] * 1001},
    ],
)
def test_what_is_no_saved_preset_is_refused(change):
    table = json.loads(core.scale_to_json(core.BlockScale())) | change
    with pytest.raises(core.FileFormatError, match="mine holds no block strengths"):
        core.scale_from_json(json.dumps(table), "mine", None)
    for text in ("", "[]", "[" * 100_000, "3"):
        with pytest.raises(core.FileFormatError):
            core.scale_from_json(text, "mine", None)


def test_the_picture_has_every_block_in_network_order():
    family = BY_NAME["FLUX.1"]
    names = names_of(family, outside=False)
    scale = core.BlockScale(attention=0.0, double_ranges=core.parse_ranges("3: 0.5", "x"), family=family)
    found = core.block_factors(scale, names)
    assert list(found) == ["double", "single"] and [len(one) for one in found.values()] == [19, 38]
    number, mean, low, high = found["double"][3]
    assert (number, low, high) == (3, 0.0, 0.5) and 0 < mean < 0.5
