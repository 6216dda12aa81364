"""The other families from a shell: encode, fit and sample by their own small pipeline folders, against diffusers' own
way from pictures to latents and from words to texts."""

import inspect
import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from qrlora_core import TrainingCache, bucket_size, open_adapter
from tests.train import tiny
from tests.train.families import FAMILIES
from tests.train.tiny_families import PIPELINES, save_pipeline
from train.cli import main
from train.config import EncodeConfig, FitConfig
from train.data.encode import encode
from train.errors import TrainError
from train.model.backbones import BACKBONES
from train.model.pipeline_folder import open_pipeline
from train.model.source import BaseModel
from train.run.fit import fit
from train.settings import make_config


@pytest.fixture(scope="module", params=PIPELINES)
def family(request, tmp_path_factory):
    """Name and pipeline folder."""
    return request.param, save_pipeline(request.param, tmp_path_factory.mktemp(request.param))


def encoded(folder, path, **changes):
    """The opened cache of one picture."""
    base = {
        "pipeline": str(folder),
        "pictures": [str(tiny.picture(path.with_suffix(".png"), 128, 64, "RGBA"))],
        "output": str(path),
        "resolution": 96,
        "bucket_step": 32,
        "instance_prompt": "a photo of a <c> dog",
        "max_tokens": 300,
        "device": "cpu",
        "precision": "fp32",
        "mask": True,
    }
    return TrainingCache(encode(make_config(EncodeConfig, base, changes)))


def pipeline_of(name, folder):
    return getattr(diffusers, PIPELINES[name].class_name).from_pretrained(folder)


def network(name, pipeline):
    return getattr(pipeline, FAMILIES[name].network)


@torch.no_grad()
def own_latents(name, pipeline, pixels):
    """By the functions that diffusers' own pipelines encode pictures with."""
    if name in ("z_image", "sd3", "sdxl"):
        latents = pipeline.vae.encode(pixels).latent_dist.mode()
        return (latents - (pipeline.vae.config.shift_factor or 0)) * pipeline.vae.config.scaling_factor
    if name == "flux2":
        return pipeline._encode_vae_image(pixels, None)
    kind = diffusers.QwenImageImg2ImgPipeline  # whose VAE Krea 2 has
    mode = kind._encode_vae_image(
        kind(None, pipeline.vae, None, None, None), pixels.unsqueeze(2), torch.Generator().manual_seed(0)
    )
    return mode.squeeze(2)


def test_latents_and_texts_are_those_of_the_pipeline(family, tmp_path, monkeypatch):
    name, folder = family
    cache, pipeline = encoded(folder, tmp_path / "cache.safetensors"), pipeline_of(name, folder)
    width, height = bucket_size(128, 64, 96, 32)
    factor = PIPELINES[name].factor
    assert width != height and cache.latent_shape(0)[1:] == (height // factor, width // factor)
    cut = ImageOps.fit(Image.open(tmp_path / "cache.png").convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    pixels = torch.tensor(np.asarray(cut)).permute(2, 0, 1)[None].float() / 127.5 - 1
    # diffusers draws where only a picture to picture pipeline encodes: here the mean is meant
    posterior = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(posterior, "sample", lambda self, generator=None: self.mean)
    torch.testing.assert_close(cache.latent(0), own_latents(name, pipeline, pixels)[0], rtol=1e-4, atol=1e-4)
    assert cache.mask(0).shape == cache.latent_shape(0)[1:]

    def own_text(text):
        more = {} if name == "sdxl" else {"max_sequence_length": 300}
        more |= {"do_classifier_free_guidance": False} if name in ("z_image", "sd3", "sdxl") else {}
        more |= {"prompt_2": None, "prompt_3": None} if name == "sd3" else {}
        with torch.no_grad():
            given = pipeline.encode_prompt(text, **more)
        embeds = given[0][0][given[1][0]].flatten(1) if name == "krea2" else given[0][0]
        return embeds, given[2][0] if PIPELINES[name].pooled else None

    for index, text in ((cache.items[0].text, "a photo of a <c> dog"), (cache.empty_text, "")):
        (embeds, pooled), found = own_text(text), cache.text(index)
        assert torch.equal(found.embeds, embeds) and found.embeds.shape[1] == PIPELINES[name].text_width
        assert (found.pooled is None and pooled is None) or torch.equal(found.pooled, pooled)


@pytest.fixture(scope="module")
def trained(family, tmp_path_factory):
    """An adapter that three large steps made, from the folder alone."""
    name, folder = family
    work = tmp_path_factory.mktemp(f"{name}_trained")
    encoded(folder, work / "cache.safetensors")
    settings = {
        "model": str(folder), "data": str(work / "cache.safetensors"), "run_dir": str(work / "run"), "rank": 4,
        "steps": 3, "gradient_accumulation": 1, "learning_rate": 0.3, "device": "cpu", "precision": "fp32",
        "base_storage": "fp32", "caption_dropout": 0.5, "method": "delta_r",
    }  # fmt: skip
    return fit(make_config(FitConfig, settings))


def test_what_was_encoded_and_trained_is_drawn(family, trained, tmp_path):
    """`sample` with strength 1 draws what the pipeline draws whose weights were patched by hand, and 0 the base."""
    name, folder = family
    arguments = ["--prompts", "a dog", "--steps", "2", "--width", "64", "--height", "32", "--guidance", "2"]
    arguments += ["--precision", "fp32", "--device", "cpu", "--content", str(trained), "--betas", "0", "1"]
    assert main(["sample", "--pipeline", str(folder), "--output", str(tmp_path), *arguments]) == 0
    pipeline, adapter = pipeline_of(name, folder), open_adapter(trained)
    guidance = {"true_cfg_scale": 2.0, "negative_prompt": " "} if name == "qwen_image" else {"guidance_scale": 2.0}

    def drawn():
        options = {"num_inference_steps": 2, "width": 64, "height": 32, "generator": torch.Generator().manual_seed(0)}
        return np.asarray(pipeline(prompt="a dog", **options, **guidance).images[0]).astype(int)

    base = drawn()
    with torch.no_grad():
        for layer in adapter.layers:
            up, down, alpha = adapter.update(layer)
            network(name, pipeline).get_submodule(layer).weight += alpha / up.shape[1] * (up.float() @ down.float())
    patched = drawn()
    for beta, expected in ((0, base), (1, patched)):
        found = np.asarray(Image.open(tmp_path / f"prompt0_seed0_alpha0_beta{beta}.png")).astype(int)
        assert np.abs(found - expected).max() <= 1
    assert np.abs(patched - base).max() > 2, "the strength must be seen"


def copy(folder, target):
    shutil.copytree(folder, target)
    return target


def rename_class(path, name):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))


def refused(folder, tmp_path):
    with pytest.raises(TrainError) as caught:
        encoded(folder, tmp_path / "cache.safetensors")
    assert caught.value.reason == "model" and not (tmp_path / "cache.safetensors").exists()
    return str(caught.value)


def test_a_vae_of_another_family_is_refused(family, tmp_path):
    folder = family[1]
    backbone = open_pipeline(folder).backbone
    own = backbone.pipeline.vae_class
    other = "AutoencoderKL" if own == "AutoencoderKLQwenImage" else "AutoencoderKLQwenImage"
    folder = copy(folder, tmp_path / "mixed")
    rename_class(folder / "vae" / "config.json", other)
    text = refused(folder, tmp_path)
    assert f"is of {backbone.title}, whose VAE is {backbone.pipeline.vae_class}" in text and other in text


def test_a_transformer_of_another_family_is_refused(family, tmp_path):
    folder = copy(family[1], tmp_path / "mixed")
    rename_class(folder / FAMILIES[family[0]].network / "config.json", "PixArtTransformer2DModel")
    assert "PixArtTransformer2DModel, of another model" in refused(folder, tmp_path)


@pytest.mark.parametrize(
    "index, message",
    [
        (
            '{"_class_name": "StableDiffusionPipeline"}',
            "is of a StableDiffusionPipeline, expected one of FluxPipeline, ",
        ),
        ("{}", "is of a None, expected one of"),
        ("{", "model_index.json is damaged"),
    ],
)
def test_pipelines_of_nobody(family, tmp_path, index, message):
    folder = copy(family[1], tmp_path / "other")
    (folder / "model_index.json").write_text(index)
    assert message in refused(folder, tmp_path)


def test_data_of_another_family_are_refused(family, tmp_path):
    """What one family's pipeline encoded does not train another's model."""
    name, folder = family
    other = next(key for key in PIPELINES if key != name)
    cache = encoded(save_pipeline(other, tmp_path / "other"), tmp_path / "cache.safetensors")
    settings = {"model": str(folder), "data": str(cache.path), "run_dir": str(tmp_path / "run"), "device": "cpu"}
    facts = BaseModel(folder).facts
    if (cache.latent_shape(0)[0], (cache.text(0).embeds.shape[1],)) == (facts.channels, facts.text_widths):
        pytest.skip("these two small ones take the same sizes")
    with pytest.raises(TrainError, match="channels, the model takes|the texts have widths") as caught:
        fit(make_config(FitConfig, settings))
    assert caught.value.reason == "data"


def test_an_old_diffusers_is_named(family):
    folder = replace(open_pipeline(family[1]), class_name="OfTomorrowPipeline")
    with pytest.raises(TrainError, match="has no OfTomorrowPipeline, .* -m pip install --upgrade diffusers") as caught:
        folder.load("parts", torch.float32)
    assert caught.value.reason == "library"


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone.family)
def test_every_pipeline_is_called_as_it_takes_it(backbone):
    """Also those whose text encoders are not small enough for a test: names of arguments are diffusers' own."""
    for name in backbone.pipeline.classes.values():
        kind = getattr(diffusers, name)
        more = {} if backbone.family == "sdxl" else {"max_sequence_length": 300}
        more |= {"prompt_2": None, "prompt_3": None} if backbone.family == "sd3" else {}
        inspect.signature(kind.encode_prompt).bind(None, "a dog", device=None, **more)
        arguments = {"prompt": "a dog", "num_inference_steps": 2, "width": 64, "height": 64, "generator": None}
        for guidance in (0.0, 3.5):
            inspect.signature(kind.__call__).bind(None, **arguments, **backbone.pipeline.guidance(guidance))
        assert hasattr(diffusers, backbone.pipeline.vae_class)
        assert set(backbone.pipeline.encoders) <= set(inspect.signature(kind.__init__).parameters)
