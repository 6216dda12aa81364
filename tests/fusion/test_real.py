"""The real model's study runs end to end, on tiny random models of the classes that it is for."""

import json

import pytest
import torch
from PIL import Image

from benchmarks.fusion import real
from benchmarks.fusion.fusions import Fusion, fixed
from benchmarks.fusion.real_measures import Judges, Scores, numbers
from benchmarks.fusion.real_model import RealModel
from benchmarks.fusion.real_units import KINDS, read_units
from qrlora_core import Adapter, AdapterLayer, open_adapter, save_adapter
from tests.train import tiny

SIZE, STEPS = 32, 2
CALL = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "guidance_scale": 1.0}
LAYERS = ("transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.attn.to_v")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, DINO, CLIP, and a units' file with adapters and pictures."""
    folder = tmp_path_factory.mktemp("real")
    tiny.save_pipeline(folder / "flux")
    save_judges(folder)
    transformer = pytest.importorskip("diffusers").FluxTransformer2DModel.from_pretrained(folder / "flux/transformer")
    for seed, name in enumerate(("dog", "cup", "ink", "wax")):
        tiny.picture(folder / f"{name}.png", 48, 48, seed=seed)
        save_adapter(random_adapter(transformer, name, seed), folder / f"{name}.safetensors")

    def concept(name, trigger, noun=""):
        return {
            "name": name,
            "picture": f"{name}.png",
            "adapter": f"{name}.safetensors",
            "trigger": trigger,
            "noun": noun,
        }

    prompts = {
        "both": [{"text": "a {content} by the sea in {style} style", "words": "the sea"}],
        "content": [{"text": "a {content} in snow", "words": "snow"}],
        "style": [{"text": "a cat in {style} style", "words": "a cat"}],
        "none": [{"text": "a cat", "words": "a cat"}],
    }
    facts = {
        "tuning": {"contents": [concept("dog", "<c>", "dog")], "styles": [concept("ink", "<s>")]},
        "check": {"contents": [concept("cup", "<c>", "cup")], "styles": [concept("wax", "<s>")]},
        "prompts": prompts,
    }
    (folder / "units.json").write_text(json.dumps(facts))
    return folder


def save_judges(folder):
    from transformers import (
        BitImageProcessor,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
        Dinov2Config,
        Dinov2Model,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "dino")
    pixels = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessor(**pixels).save_pretrained(folder / "dino")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "flux/tokenizer")
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text |= {"pad_token_id": tokenizer.pad_token_id}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"intermediate_size": 16}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    CLIPProcessor(CLIPImageProcessor(**pixels), tokenizer).save_pretrained(folder / "clip")


def random_adapter(transformer, name, seed):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in LAYERS[: 2 - seed % 2]:  # every other one has a layer less
        out, width = transformer.get_submodule(layer).weight.shape
        q = torch.linalg.qr(torch.randn(out, 4, generator=generator)).Q
        layers[layer] = AdapterLayer(q, 3 * torch.randn(4, width, generator=generator))
    return Adapter.from_tensors(name, layers, 8)


@pytest.fixture
def arguments(folder, tmp_path):
    names = [f"--{name}={folder / where}" for name, where in (("pipeline", "flux"), ("dino", "dino"), ("clip", "clip"))]
    small = ["--size", str(SIZE), "--steps", str(STEPS), "--pictures", "1", "--device", "cpu", "--precision", "fp32"]
    return [*names, "--units", str(folder / "units.json"), "--folder", str(tmp_path / "run"), *small]


def test_end_to_end_and_goes_on(arguments, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(real, "GRID", (0.5, 1.0))
    assert real.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"| {real.PASSES} |" in printed and f"| minus {real.REFERENCE} |" in printed
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    found = stored["results"]
    assert stored["version"] == real.VERSION and len(found) == 7
    assert all(rows.keys() == {"cup-wax"} for rows in found.values())
    drift = {name: rows["cup-wax"]["drift"] for name, rows in found.items()}
    assert drift["plain sum"] > 1e-3 and drift["no adapter"] == 0
    assert drift["prompt gate"] == drift[real.PASSES] == 0  # no trigger, no adapter
    assert (tmp_path / "run" / "fusion.png").is_file()

    def refuse(*_args, **_settings):
        raise AssertionError("that was there already")

    monkeypatch.setattr(RealModel, "draw", refuse)
    monkeypatch.setattr(RealModel, "drift", refuse)
    assert real.main(arguments) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["results"] == found


def test_factors_equal_weights_and_composition_is_exact(folder):
    """Beside the weights and in them: the same picture; one pass each of one adapter: the same as that adapter."""
    adapters = [open_adapter(folder / f"{name}.safetensors") for name in ("dog", "wax")]
    model = RealModel(folder / "flux", adapters, torch.device("cpu"), "fp32")
    model.wear(adapters)

    def draw(*factors, separate=False):
        """Latents: a random VAE hardly shows them."""
        return model.draw("a cat", 3, lambda _sigma: torch.tensor([factors]), separate, output_type="latent", **CALL)

    bare, one, both = draw(0.0, 0.0), draw(0.7, 0.0), draw(0.7, -0.4)
    assert (bare - one).abs().max() > 0.05 and (one - both).abs().max() > 0.05
    torch.testing.assert_close(draw(1.0, 0.0, separate=True), draw(1.0, 0.0), rtol=1e-4, atol=1e-4)
    assert (draw(0.7, -0.4, separate=True) - both).abs().max() > 1e-3
    for adapter, factor in zip(adapters, (0.7, -0.4)):
        for name in adapter.layers:
            up, down, alpha = adapter.update(name)
            weight = model.wearer.layers[name].base.weight
            weight.data.addmm_(up, down, alpha=factor * alpha / up.shape[1])
    torch.testing.assert_close(draw(0.0, 0.0), both, rtol=1e-4, atol=1e-4)


def test_judges_know_a_picture_again(folder):
    judges = Judges(folder / "dino", folder / "clip", folder / "clip", torch.device("cpu"))
    one, two = (Image.open(folder / f"{name}.png") for name in ("dog", "ink"))
    for look in (judges.content, judges.styled):
        assert float(look(one) @ look(one)) == pytest.approx(1, abs=1e-5)
        assert float(look(one) @ look(two)) < 1 - 1e-6
    words = ["the sea", "snow", "a cat"]
    given = judges.clip_inputs(text=words, images=one, return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = int(judges.clip(**given).logits_per_image.argmax())
    assert judges.nearest(one, words) == wanted


def test_numbers_of_a_unit():
    base = {kind: Scores(0.2, 0.3, 1.0) for kind in KINDS}
    alone = {"content": Scores(0.8, 0.3, 1.0), "style": Scores(0.2, 0.5, 1.0)}
    found = {**base, "both": Scores(0.5, 0.6, 0.0)}
    assert numbers(found, base, alone, 0.1) == pytest.approx((0.5, 1.0, 2 / 3, 1.0, 0.0, 0.1))
    unmoved = {"content": Scores(0.1, 0.3, 1.0), "style": Scores(0.2, 0.5, 1.0)}
    assert numbers(found, base, unmoved, 0.1).content == 0  # an adapter that shows nothing alone


def test_units_are_all_pairs_and_apart(folder):
    units = read_units(folder / "units.json", 2)
    assert [unit.name for unit in (*units.tuning, *units.check)] == ["dog-ink", "cup-wax"]
    asked = [one for one in units.check[0].prompts if one.kind == "both"]
    assert [(one.text, one.noise) for one in asked] == [("a <c> cup by the sea in <s> style", n) for n in range(2)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda facts: facts["check"].update(styles=facts["tuning"]["styles"]), "ink is both tuned on and checked"),
        (lambda facts: facts["prompts"].pop("none"), "lacks none"),
        (lambda facts: facts["prompts"].update({key: [{"text": "a", "words": "b"}] for key in KINDS}), "at least two"),
        (lambda facts: facts["tuning"]["contents"][0].update(adapter="other.safetensors"), "does not exist"),
    ],
)
def test_units_that_would_not_do_are_refused(folder, spoil, message):
    facts = json.loads((folder / "units.json").read_text())
    spoil(facts)
    (folder / "spoilt.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message):
        read_units(folder / "spoilt.json", 1)


def test_another_family_is_refused(folder, monkeypatch):
    from dataclasses import replace

    from benchmarks.fusion import real_model

    opened = real_model.open_pipeline(folder / "flux")
    other = replace(opened, backbone=replace(opened.backbone, family="other", title="Another"))
    monkeypatch.setattr(real_model, "open_pipeline", lambda _path: other)
    with pytest.raises(real_model.TrainError, match="Another; this study is for FLUX.1"):
        RealModel(folder / "flux", [], torch.device("cpu"), "fp32")


def test_fixed_factors_are_drawn_alike_for_all_that_share_them(folder, tmp_path):
    """A picture is drawn once for all units that share what acts in it."""
    units = read_units(folder / "units.json", 1)
    study = real.RealStudy(tmp_path, None, None, units.words, CALL)
    one, two = units.tuning[0], units.check[0]
    for asked in one.prompts:
        assert study._key(Fusion("base", both=()), one, asked) == study._key(Fusion("base", both=()), two, asked)
        alone = Fusion("alone", both=fixed(0, 1))
        assert study._key(alone, one, asked) == study._key(alone, one._replace(style=two.style), asked)
        assert study._key(alone, one, asked) != study._key(alone, two, asked)
