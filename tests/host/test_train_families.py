"""Pictures to picture for every family but FLUX.1 on the real server with the real trainer: encode, train,
apply, sample. Small random models; VAEs with random weights in their real layouts; text encoders, which are models of
billions of weights, are stood in for by random vectors of the right width.
"""

import json
import re
import subprocess
import urllib.parse
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo import server as instance
from demo.server import WorkflowError
from tests.host import training
from tests.host.conftest import HOST
from tests.host.training import node, train_graph, write_vae
from tests.train.families import FAMILIES, TEXT_WIDTH, save_single_file

PROMPT = "a photo of a <c> dog"


@dataclass(frozen=True)
class InHost:
    """A family in a graph: its VAE's file, its node of empty latents, and how the host's latents are shaped."""

    vae: str
    empty: str
    channels: int
    factor: int
    tokens: int = 6  # words of the prompt
    width: int = TEXT_WIDTH  # of their vectors
    pooled: int = TEXT_WIDTH
    frames: bool = False


GRAPHS = {
    # the host fills its texts up to 512 tokens, with zeros before them
    "flux2": InHost("flux2-vae.safetensors", "EmptyFlux2LatentImage", 128, 16, tokens=512),
    "qwen_image": InHost("qwen_image_vae.safetensors", "EmptySD3LatentImage", 16, 8, frames=True),
    "z_image": InHost("ae.safetensors", "EmptySD3LatentImage", 16, 8),
    "sd3": InHost("ae.safetensors", "EmptySD3LatentImage", 16, 8),
    "krea2": InHost("qwen_image_vae.safetensors", "EmptySD3LatentImage", 16, 8, width=640, frames=True),
    "sdxl": InHost("sdxl_vae.safetensors", "EmptyLatentImage", 4, 8, width=2048, pooled=1280),
    "flux": InHost("ae.safetensors", "EmptySD3LatentImage", 16, 8),
}


MADE_FOR = {
    "flux2": "Flux2/Flux2",
    "qwen_image": "QwenImage/Wan21",
    "z_image": "Lumina2/Flux",
    "sd3": "SD3/SD3",
    "krea2": "Krea2/Wan21",
    "sdxl": "Segmind_Vega/SDXL",  # which differs from SDXL in the number of its blocks only
    "flux": "FluxInpaint/Flux",
}


@pytest.fixture(scope="module")
def models(server):
    """The server with a model and a VAE of every family."""
    add_families(server)
    return server


def add_families(server):
    """Small models in its folders, and VAEs in their real layouts; once."""
    vaes = server.base / "models" / "vae"
    if (vaes / GRAPHS["qwen_image"].vae).is_file():
        return
    write_vae(vaes / GRAPHS["flux2"].vae, channels=32, statistics=True)
    write_vae(vaes / GRAPHS["sdxl"].vae, channels=4)
    script = Path(__file__).with_name("write_video_vae.py")
    command = [instance.interpreter(HOST), script, HOST, vaes / GRAPHS["qwen_image"].vae]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    for name, small in FAMILIES.items():
        larger = replace(small, arguments=small.arguments | small.host_size | small.file_size)
        save_single_file(larger, server.base / "models" / "diffusion_models" / f"{name}.safetensors")


def family_graph(name, output, **inputs):
    """A training alone."""
    graph = train_graph(output, {"sample_every": 3}, vae=GRAPHS[name].vae, model_name=f"{name}.safetensors", **inputs)
    graph["clip"] = node("QRLoRATestClip", width=GRAPHS[name].width, pooled=True, pooled_width=GRAPHS[name].pooled)
    return graph


@pytest.fixture(scope="module", params=GRAPHS)
def trained(models, request):
    """Name, server, output folder of what the graph saved: three steps, and a picture with and without the adapter."""
    name = request.param
    size, where = {"width": 64, "height": 64, "batch_size": 1}, GRAPHS[name]
    graph = family_graph(name, f"family {name}", steps=3, learning_rate=0.05, method="delta_r", seed=1)
    graph |= {
        "model": node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default"),
        "apply": node("QRLoRAApply", model=["model", 0], delta_r=["train", 0], strength=1.0),
        "prompt": node("CLIPTextEncode", clip=["clip", 0], text=PROMPT),
        "empty": node(where.empty, **size),
        "crop": node("ImageScale", image=["picture", 0], upscale_method="lanczos", crop="center", width=64, height=64),
        "encode": node("VAEEncode", pixels=["crop", 0], vae=["vae", 0]),
        "latent": node("QRLoRATestSaveLatent", model=["model", 0], samples=["encode", 0], output=f"latent {name}"),
        "samples": node("SaveImage", images=["train", 2], filename_prefix=f"samples {name}"),
    }
    graph["train"]["inputs"]["images"] = ["crop", 0]
    for kind, model in (("base", "model"), ("adapted", "apply")):
        graph[f"{kind} sampler"] = node(
            "KSampler", model=[model, 0], positive=["prompt", 0], negative=["prompt", 0], latent_image=["empty", 0],
            seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        graph[f"{kind} decode"] = node("VAEDecode", samples=[f"{kind} sampler", 0], vae=["vae", 0])
        graph[f"{kind} latent"] = node(
            "QRLoRATestSaveLatent", model=["model", 0], samples=[f"{kind} sampler", 0], output=f"{kind} {name}"
        )
        graph[kind] = node("SaveImage", images=[f"{kind} decode", 0], filename_prefix=f"{kind} {name}")
    entry = models.queue(graph)
    return name, models, entry


def run_of(server, name):
    return next(path for path in training.runs(server) if path.name.startswith(f"family_{name}-") or name in path.name)


def test_pictures_to_picture(trained):
    name, server, entry = trained
    output = server.base / "output"
    base, adapted = (load_file(output / f"{kind} {name}.safetensors")["seen"] for kind in ("base", "adapted"))
    assert base.isfinite().all() and adapted.isfinite().all()
    assert float((base - adapted).norm() / base.norm()) > 0.01, "the adapter must be seen"
    assert Image.open(next(output.glob(f"adapted {name}*.png"))).size == (64, 64)
    assert len(entry["outputs"]["samples"]["images"]) == 1
    state = load_file(server.base / "output" / "qrlora" / f"family {name}.safetensors")
    down = [tensor for key, tensor in state.items() if "lora_A" in key]
    assert down and all(torch.isfinite(tensor).all() for tensor in down)
    assert sum(float(tensor.abs().max()) > 0 for tensor in down) > 0.7 * len(down)


def test_training_sees_what_sampling_sees(trained):
    """The cache holds what the host's own model makes of the graph's latents and conditioning."""
    name, server, _ = trained
    where = GRAPHS[name]
    settings = json.loads((run_of(server, name) / "settings.json").read_text(encoding="utf-8"))
    cache, stock = load_file(settings["data"]), load_file(server.base / "output" / f"latent {name}.safetensors")
    side = 64 // where.factor
    assert cache["latent.0"].shape == (where.channels, side, side)
    assert (stock["stored"].dim() == 5) == where.frames
    assert torch.equal(cache["latent.0"], stock["seen"].reshape(cache["latent.0"].shape))
    embeds = cache["text.0.embeds"]
    assert embeds.shape == (where.tokens, where.width)
    assert ("text.0.pooled" in cache) == bool(FAMILIES[name].pooled)
    assert "text.0.pooled" not in cache or cache["text.0.pooled"].shape == (where.pooled,)
    assert int(embeds.any(dim=1).sum()) == 6 and embeds[-6:].any(dim=1).all()
    with safe_open(settings["data"], "pt") as file:  # data of one kind of model are not taken for another's
        assert file.metadata()["qrlora.made_for"].endswith(MADE_FOR[name])


def test_a_sample_is_served_in_the_colours_of_its_family(trained):
    name, server, _ = trained
    run = urllib.parse.quote(run_of(server, name).name)
    with urllib.request.urlopen(f"{server.url}/qrlora/train/sample?run={run}&step=3", timeout=10) as answer:
        served = Image.open(answer)
        assert served.format == "PNG" and served.size == (512, 512)
        colours = np.asarray(served.convert("RGB")).astype(int)
    assert np.abs(colours[..., 0] - colours[..., 2]).max() > 0, "grey: the host's factors were not found"


WRONG = {
    ("flux2", "ae.safetensors"): r"latents of shape \(1, 16, 8, 8\); FLUX.2 takes 128 channels without frames",
    ("qwen_image", "ae.safetensors"): r"Qwen-Image takes 16 channels and a dimension for frames",
    ("krea2", "ae.safetensors"): r"Krea 2 takes 16 channels and a dimension for frames",
    ("sdxl", "ae.safetensors"): r"SDXL takes 4 channels without frames",
    (
        "z_image",
        "qwen_image_vae.safetensors",
    ): r"shape \(1, 16, 1, 8, 8\); Z-Image takes 16 channels without",
}


@pytest.mark.parametrize("name, vae", WRONG)
def test_a_vae_of_another_model_is_refused(models, name, vae):
    graph = family_graph(name, f"wrong vae {name}", steps=3)
    graph["vae"] = node("VAELoader", vae_name=vae)
    with pytest.raises(WorkflowError) as error:
        models.queue(graph)
    assert re.search(WRONG[name, vae], training.text_of(error)), training.text_of(error)


@pytest.mark.parametrize("name", GRAPHS)
def test_text_encoders_of_another_model_are_refused(models, name):
    graph = family_graph(name, f"wrong clip {name}", steps=3)
    width, takes_pooled = GRAPHS[name].width, bool(FAMILIES[name].pooled)
    graph["clip"] = node("QRLoRATestClip", width=width + 1, pooled=takes_pooled, pooled_width=GRAPHS[name].pooled)
    with pytest.raises(WorkflowError) as error:
        models.queue(graph)
    text = training.text_of(error)
    assert f"the texts have widths {width + 1} (embeds)" in text and f"takes {width} (embeds)" in text


def test_text_encoders_without_a_pooled_output_are_refused(models):
    graph = family_graph("sdxl", "no pooled text", steps=3)
    graph["clip"] = node("QRLoRATestClip", width=GRAPHS["sdxl"].width, pooled=False)
    with pytest.raises(WorkflowError) as error:
        models.queue(graph)
    assert "these text encoders give no pooled output" in training.text_of(error)


def test_a_file_that_the_host_cannot_tell_is_refused(models):
    """The trainer reads FLUX.2 with diffusers' names, this host does not: what it would sample with is not known."""
    state = {key: value.detach().contiguous() for key, value in FAMILIES["flux2"].model().state_dict().items()}
    save_file(state, models.base / "models" / "diffusion_models" / "flux2 by diffusers.safetensors")
    graph = family_graph("flux2", "not told", steps=3)
    graph["train"]["inputs"]["model_name"] = "flux2 by diffusers.safetensors"
    with pytest.raises(WorkflowError) as error:
        models.queue(graph)
    assert re.search(r"ComfyUI (cannot tell|does not know) what model flux2 by", training.text_of(error))
