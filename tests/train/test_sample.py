"""Pictures over alpha x beta, against a pipeline whose weights were patched by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from demo.small_flux import GOLDEN, base_weights, golden_output, own_weight, to_diffusers, with_weights
from qrlora_core import (
    Adapter,
    AdapterLayer,
    MergeRecipe,
    Residual,
    decompose,
    merge,
    merged_adapter,
    open_adapter,
    save_adapter,
)
from tests.train import tiny
from train.cli import main
from train.errors import TrainError
from train.model.pipeline_folder import PipelineFolder, open_pipeline
from train.model.source import BaseModel
from train.run.sample import LiveAdapter

STYLE, CONTENT = GOLDEN / "official_style.safetensors", GOLDEN / "official_content.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    """The golden adapters, 300 times as strong, so that pictures of 8 bits show them."""
    folder, paths = tmp_path_factory.mktemp("strong"), []
    for path in (STYLE, CONTENT):
        recipe = MergeRecipe.of(open_adapter(path), 300.0)
        paths.append(save_adapter(merged_adapter(recipe), folder / path.name))
    return paths


def by_hand(folder, weights, prompt="a dog", seed=0):
    """The picture of a pipeline in which layer name -> weight were replaced."""
    pipeline = FluxPipeline.from_pretrained(folder)
    found = pipeline.transformer.load_state_dict({f"{n}.weight": w for n, w in weights.items()}, strict=False)
    assert not found.unexpected_keys
    image = pipeline(
        prompt,
        num_inference_steps=2,
        guidance_scale=3.5,
        width=64,
        height=48,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return np.asarray(image).astype(int)


def patched(*terms):
    """W + strength * scaling * up @ down, for (adapter, strength) pairs, written out."""
    weights = {}
    for adapter, strength in terms:
        for name, info in adapter.layers.items():
            layer = adapter.layer(name)
            weight = weights.get(name, own_weight(name, adapter))
            weights[name] = weight + strength * info.scaling * (layer.up.float() @ layer.down.float())
    return weights


def run(folder, output, *arguments):
    return main(
        ["sample", "--pipeline", str(folder), "--output", str(output), "--prompts", "a dog", "--steps", "2",
         "--width", "64", "--height", "48", "--precision", "fp32", "--device", "cpu", *map(str, arguments)]
    )  # fmt: skip


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_equal_a_pipeline_patched_by_hand(folder, strong, tmp_path):
    style, content = strong
    code = run(folder, tmp_path, "--style", style, "--content", content, "--alphas", 0, 0.9, "--betas", 0, 1)
    assert code == 0
    a, b = open_adapter(style), open_adapter(content)
    base = by_hand(folder, {})
    for alpha in (0.0, 0.9):
        for beta in (0.0, 1.0):
            found = pixels(tmp_path / f"prompt0_seed0_alpha{alpha:g}_beta{beta:g}.png")
            expected = by_hand(folder, patched((a, alpha), (b, beta)))
            assert np.abs(found - expected).max() <= 1
            assert (np.abs(found - base).max() > 8) == bool(alpha or beta), "the strengths must be seen"
    sheet = Image.open(tmp_path / "prompt0_seed0_sheet.png")
    assert sheet.width > 2 * 64 and sheet.height > 2 * 48
    assert len(list(tmp_path.iterdir())) == 5


def test_metadata_seeds_and_prompts(folder, strong, tmp_path):
    assert run(folder, tmp_path, "--style", strong[0], "--alphas", 0.125, "--seeds", 3, 3, 4) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["prompt0_seed3_alpha0.125_beta0.png", "prompt0_seed4_alpha0.125_beta0.png"]
    recipe = json.loads(Image.open(tmp_path / names[1]).text["qrlora"])
    assert recipe == {
        "alpha": 0.125,
        "beta": 0.0,
        "prompt": "a dog",
        "seed": 4,
        "steps": 2,
        "guidance": 3.5,
        "width": 64,
        "height": 48,
        "style": strong[0].name,
        "content": None,
    }
    assert (pixels(tmp_path / names[0]) != pixels(tmp_path / names[1])).any()
    expected = by_hand(folder, patched((open_adapter(strong[0]), 0.125)), seed=4)
    assert np.abs(pixels(tmp_path / names[1]) - expected).max() <= 1


@pytest.fixture
def live(folder):
    transformer = FluxPipeline.from_pretrained(
        folder, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, vae=None
    ).transformer
    return LiveAdapter(transformer, BaseModel(folder), torch.device("cpu")), transformer


def test_strength_zero_is_the_base_model_bit_for_bit(live):
    adapters, model = live
    before = golden_output(model)
    recipe = MergeRecipe.of(open_adapter(STYLE))
    adapters.set(recipe)
    assert not torch.equal(golden_output(model), before)
    adapters.set(recipe.scaled(0.0))
    assert torch.equal(golden_output(model), before)


def test_recipes_are_exchanged_without_a_trace(live):
    """What was set before does not matter, also when the ranks and the layers differ."""
    adapters, model = live
    style, content = open_adapter(STYLE), open_adapter(CONTENT)
    names = list(content.layers)[:4]
    fewer = Adapter.from_tensors("fewer", {name: content.layer(name) for name in names}, content.alpha)
    adapters.set(MergeRecipe.of(fewer, 50.0))
    alone = golden_output(model)
    adapters.set(merge(MergeRecipe.of(style), 9.0, MergeRecipe.of(content), 3.0))
    assert not torch.allclose(golden_output(model), alone)
    adapters.set(MergeRecipe.of(fewer, 50.0))
    assert torch.equal(golden_output(model), alone)


def test_other_bases_are_stacked(live):
    adapters, model = live
    style = open_adapter(STYLE)
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, info in style.layers.items():
        q = torch.linalg.qr(torch.randn(info.shape[0], 3, generator=generator)).Q
        layers[name] = AdapterLayer(q, 0.01 * torch.randn(3, info.shape[1], generator=generator))
    other = Adapter.from_tensors("other", layers, 6.0)
    adapters.set(merge(MergeRecipe.of(style), 0.5, MergeRecipe.of(other), 2.0))
    expected = golden_output(with_weights(patched((style, 0.5), (other, 2.0))))
    torch.testing.assert_close(golden_output(model), expected, rtol=1e-4, atol=1e-5)


def test_published_full_qr(live):
    """W - QR + Q'R' with Q and R decomposed from the pipeline's own weights, against the published residual route."""
    adapters, model = live
    full = open_adapter(GOLDEN / "official_qr.safetensors")
    assert full.method == "qr" and not full.has_initial
    residual = Residual(GOLDEN / "official_residual_fp32.safetensors")
    weights = {}
    for name in full.layers:
        layer = full.layer(name)
        weights[name] = residual.weight(name).float() + layer.up.float() @ layer.down.float()
    expected = golden_output(with_weights(weights))
    base = golden_output(model)
    adapters.set(MergeRecipe.of(full))
    assert float((expected - base).abs().max()) > 1e-4
    torch.testing.assert_close(golden_output(model), expected, rtol=1e-3, atol=2e-5)
    known = dict(adapters._bases)
    adapters.set(MergeRecipe.of(full, 0.5))
    assert all(adapters._bases[key] is basis for key, basis in known.items()), "a basis is decomposed once"
    name = next(iter(full.layers))
    exact = decompose(to_diffusers(base_weights())[f"{name}.weight"], full.rank, method="exact")
    torch.testing.assert_close(known[name, full.rank].q, exact.q)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 1, "name a --style or a --content"),
        (["--style", STYLE, "--width", 100], 1, "multiples of 16"),
        (["--style", "missing.safetensors"], 1, "missing.safetensors is not a readable"),
        (["--style", GOLDEN / "official_residual_fp16.safetensors"], 1, "official_residual_fp16"),
    ],
)
def test_refused_before_anything_is_loaded(folder, tmp_path, monkeypatch, caplog, arguments, code, message):
    monkeypatch.setattr(PipelineFolder, "load", lambda *_, **__: pytest.fail("the pipeline was loaded"))
    assert run(folder, tmp_path / "out", *arguments) == code
    assert message in caplog.text and not (tmp_path / "out").exists()


def test_nothing_is_overwritten(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(PipelineFolder, "load", lambda *_, **__: pytest.fail("the pipeline was loaded"))
    (tmp_path / "prompt0_seed0_alpha1_beta0.png").write_bytes(b"mine")
    assert run(folder, tmp_path, "--style", STYLE) == 1
    assert "exists" in caplog.text
    assert (tmp_path / "prompt0_seed0_alpha1_beta0.png").read_bytes() == b"mine"


def test_an_adapter_of_another_model(folder, tmp_path, monkeypatch, caplog):
    style = open_adapter(STYLE)
    name = next(iter(style.layers))
    layer = AdapterLayer(torch.eye(32)[:, :4], torch.ones(4, 32))
    save_adapter(Adapter.from_tensors("small", {name: layer}, 4.0), tmp_path / "small.safetensors")
    monkeypatch.setattr(PipelineFolder, "load", lambda *_, **__: pytest.fail("the pipeline was loaded"))
    assert run(folder, tmp_path / "out", "--content", tmp_path / "small.safetensors") == 1
    assert f"{name} is (128, 128) in transformer, the adapter has (32, 32)" in caplog.text


def test_numbers_that_make_no_sense(folder, tmp_path):
    for wrong in (["--alphas", "nan"], ["--steps", "0"], ["--betas", "x"], ["--width", "-16"]):
        with pytest.raises(SystemExit) as caught:
            run(folder, tmp_path, "--style", STYLE, *wrong)
        assert caught.value.code == 2


def test_live_adapter_refuses_a_model_without_the_layer(live):
    adapters, _ = live
    layer = AdapterLayer(torch.eye(128)[:, :4], torch.ones(4, 128))
    far = Adapter.from_tensors("far", {"single_transformer_blocks.7.attn.to_q": layer}, 4.0)
    with pytest.raises(TrainError, match=r"has no single_transformer_blocks\.7\.attn\.to_q"):
        adapters.set(MergeRecipe.of(far))


def test_a_folder_of_fill_is_not_drawn_with(folder, strong, tmp_path, caplog):
    """Its pipeline takes a picture and a mask. What `encode` needs of it is loaded as FLUX.1's is."""
    fill = tmp_path / "fill"
    shutil.copytree(folder, fill)
    index = json.loads((fill / "model_index.json").read_text())
    (fill / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxFillPipeline"}))
    assert open_pipeline(fill).class_name == "FluxPipeline"
    assert run(fill, tmp_path / "out", "--style", strong[0]) == 1
    assert "FluxFillPipeline, which draws into a picture and its mask" in caplog.text
    assert not (tmp_path / "out").exists()
