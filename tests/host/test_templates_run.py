"""Every template on a real server, from its file to its pictures.

Small models of its family stand in for those that it names, and for text encoders of billions of weights vectors of the
right width. Sizes and steps are small; all else is as it ships: nodes, links, values.
"""

import json
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from demo.server import PACK
from demo.workflow import prompt_of
from tests.host import training
from tests.host.test_train_families import GRAPHS, add_families
from tests.train.families import TEXT_WIDTH

TEMPLATES = sorted((PACK / "example_workflows").glob("*.json"))
FLUX, ADAPTERS = "flux 768 \u00e9.safetensors", ("official_style.safetensors", "official_content.safetensors")
# What a template names -> what stands in for it: model, VAE, width of its texts
SYSTEMS = {
    "flux1-dev.safetensors": (FLUX, "test_vae.safetensors", training.WIDTH),
    "flux1-dev-kontext_fp8_scaled.safetensors": (FLUX, "ae.safetensors", training.WIDTH),
    "flux-2-klein-4b.safetensors": ("flux2.safetensors", GRAPHS["flux2"].vae, TEXT_WIDTH),
    "z_image_turbo_bf16.safetensors": ("z_image.safetensors", GRAPHS["z_image"].vae, TEXT_WIDTH),
    "qwen_image_fp8_e4m3fn.safetensors": ("qwen_image.safetensors", GRAPHS["qwen_image"].vae, TEXT_WIDTH),
}
SIZE, STEPS = 64, 2


@pytest.fixture(scope="module")
def models(server):
    """The server with a model and a VAE of every family, and two LoRAs for each model."""
    add_families(server)
    for model in {system[0] for system in SYSTEMS.values()}:
        state = load_file(server.base / "models" / "diffusion_models" / model)
        for seed in (1, 2):
            save_file(lora_for(state, seed), server.base / "models" / "loras" / f"{seed} {model}")
    server.play("ok", sample_every=2)
    yield server
    server.train_really()


def lora_for(state, seed):
    """An ordinary LoRA on every attention weight of a model, by the names that its file has."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for key, weight in state.items():
        if key.endswith(".weight") and weight.dim() == 2 and ("attn" in key or "attention" in key):
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            made[f"{name}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) / 8
            made[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) / 8
    assert len(made) > 4
    return made


def small(prompt, model):
    """The same prompt with files that are here, a picture of SIZE x SIZE in STEPS steps."""
    names = {one["inputs"]["unet_name"] for one in prompt.values() if one["class_type"] == "UNETLoader"}
    (system,) = {SYSTEMS[name] for name in names} or {("", "", 0)}
    model, vae, width = system
    lists = {"QRLoRALoadDeltaR": iter(ADAPTERS), "QRLoRALoadLoRA": iter((f"1 {model}", f"2 {model}"))}
    found = {}
    for name, one in prompt.items():
        kind, inputs = one["class_type"], dict(one["inputs"])
        for key, value in (
            ("width", SIZE),
            ("height", SIZE),
            ("steps", STEPS),
            ("unet_name", model),
            ("vae_name", vae),
        ):
            if key in inputs:
                inputs[key] = value
        if kind in ("DualCLIPLoader", "CLIPLoader"):
            kind, inputs = "QRLoRATestClip", {"width": width, "pooled": True}
        if kind in lists:
            inputs["delta_r_name" if "DeltaR" in kind else "lora_name"] = next(lists[kind])
        if kind == "FluxKontextImageScale":  # to a million pixels, whatever the picture
            kind, inputs = "ImageScale", {**inputs, "upscale_method": "area", "crop": "disabled"}
            inputs |= {"width": SIZE, "height": SIZE}
        if kind == "LoadImage":
            inputs["image"] = "picture 0.png"
        if kind == "QRLoRATrain":
            inputs |= {"model_name": model, "rank": 8, "resolution": SIZE, "output_name": f"of template {name}"}
        if kind == "QRLoRATrainOptions":
            inputs |= {key: value for key, value in training.OPTIONS.items() if key in inputs}
        links = {key: [f"node {value[0]}", value[1]] for key, value in inputs.items() if isinstance(value, list)}
        # names that no page's nodes have: a page shows what a node of its id does that came without a workflow
        found[f"node {name}"] = {"class_type": kind, "inputs": inputs | links}
    return found


def test_every_system_has_a_template():
    """And every model that a template names has one here: a new template is run, too."""
    named = set()
    for path in TEMPLATES:
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        named |= {node["widgets_values"][0] for node in nodes if node["type"] == "UNETLoader"}
    assert named == SYSTEMS.keys()


@pytest.mark.skipif(os.name == "nt", reason="the fake trainer is started by a shell script")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_runs(models, path):
    saved = json.loads(path.read_text(encoding="utf-8"))
    prompt = small(prompt_of(saved, models.get("/object_info")), path.stem)
    entry = models.queue(prompt)
    outputs = [name for name, one in prompt.items() if one["class_type"] in ("SaveImage", "QRLoRAContactSheet")]
    assert outputs
    for name in outputs:
        shown = entry["outputs"][name]["images"][0]
        picture = Image.open(models.base / shown["type"] / shown["subfolder"] / shown["filename"]).convert("RGB")
        assert min(picture.size) >= SIZE and len(picture.getcolors(1 << 24)) > 10, "a picture of something"
    for name, one in prompt.items():
        if one["class_type"] == "QRLoRAApply":
            report = entry["outputs"][name]["text"][0]
            assert "layers" in report and "not in" not in report, report
