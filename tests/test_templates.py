"""What the templates promise before a node runs: pack and version of every node, where files go, pictures, one note."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qrlora_core
from demo import minute, thumbnails
from demo.toy.files import FOLDER
from qrlora_core import open_adapter

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))
NOTES = ("MarkdownNote", "Note")
LOADERS = {"UNETLoader": ("unet_name",), "VAELoader": ("vae_name",), "DualCLIPLoader": ("clip_name1", "clip_name2")}
LOADERS |= {"CLIPLoader": ("clip_name",)}
FOLDERS = {"UNETLoader": "diffusion_models", "VAELoader": "vae"}
FOLDERS |= dict.fromkeys(("CLIPLoader", "DualCLIPLoader"), "text_encoders")


@pytest.fixture(params=TEMPLATES, ids=lambda path: path.stem)
def template(request):
    return request.param, json.loads(request.param.read_text(encoding="utf-8"))


def test_there_are_templates():
    assert len(TEMPLATES) >= 5


def test_every_node_names_its_pack(template):
    for node in template[1]["nodes"]:
        if node["type"] in NOTES:
            continue
        ours = node["type"].startswith("QRLoRA")
        assert node["properties"]["cnr_id"] == ("qr-lora" if ours else "comfy-core"), node["type"]
        assert re.fullmatch(r"\d+\.\d+\.\d+", node["properties"]["ver"]), node["type"]
        assert not ours or node["properties"]["ver"] == qrlora_core.__version__


def test_every_file_has_an_address_and_a_folder(template):
    _, graph = template
    note = "\n".join(node["widgets_values"][0] for node in graph["nodes"] if node["type"] in NOTES)
    for node in graph["nodes"]:
        for number in range(len(LOADERS.get(node["type"], ()))):
            name = node["widgets_values"][number]
            (model,) = [one for one in node["properties"]["models"] if one["name"] == name]
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(name)
            assert model["directory"] == FOLDERS[node["type"]]
            assert f"[{name}]({model['url']})" in note and f"models/{model['directory']}" in note, (
                "the note says it too"
            )
        if node["type"] == "QRLoRALoadDeltaR":
            assert "models/qrlora" in note


def test_one_note_and_a_picture(template):
    path, graph = template
    assert sum(node["type"] in NOTES for node in graph["nodes"]) == 1
    picture = Image.open(path.with_suffix(".jpg"))
    assert max(picture.size) >= 360 and path.with_suffix(".jpg").stat().st_size < 150_000


def test_every_template_has_a_picture_of_its_own():
    pictures = [path.with_suffix(".jpg").read_bytes() for path in TEMPLATES]
    assert len(set(pictures)) == len(pictures)


TWO_LORAS = ("Merge two LoRAs, FLUX2 klein", "Merge two LoRAs, Qwen-Image", "Edit with two LoRAs, Kontext")


@pytest.mark.parametrize("other", TWO_LORAS)
def test_two_loras_are_merged_alike_for_all_families(other):
    """The part that is this pack's: the same nodes, values and links, whatever loads and samples."""

    def ours(stem):
        graph = json.loads((ROOT / "example_workflows" / f"{stem}.json").read_text(encoding="utf-8"))
        nodes = {node["id"]: node for node in graph["nodes"]}
        values = sorted((node["type"], str(node["widgets_values"])) for node in nodes.values() if ours_is(node))
        links = sorted(
            (nodes[source]["type"], slot, nodes[target]["type"], place)
            for _, source, slot, target, place, _ in graph["links"]
            if ours_is(nodes[source]) and ours_is(nodes[target])
        )
        return values, links

    def ours_is(node):
        return node["type"].startswith("QRLoRA")

    assert ours("Merge two LoRAs") == ours(other)
    assert len(ours("Merge two LoRAs")[0]) == 4


def test_one_pass_each_merges_by_the_prompt_and_applies_live():
    graph = json.loads((ROOT / "example_workflows" / "One pass each.json").read_text(encoding="utf-8"))
    nodes = {node["type"]: node for node in graph["nodes"]}
    assert nodes["QRLoRAMerge"]["widgets_values"][3] == "by prompt, one pass each"
    assert nodes["QRLoRAApply"]["widgets_values"] == [1.0, "live"]
    links = {(source, target) for _, source, _, target, *_ in graph["links"]}
    ids = {kind: node["id"] for kind, node in nodes.items()}
    wanted = [("QRLoRAMerge", "QRLoRAPrompt"), ("QRLoRAPrompt", "FluxGuidance"), ("FluxGuidance", "KSampler")]
    assert {(ids[one], ids[other]) for one, other in wanted} <= links, "the mark reaches the sampler"


def test_the_picture_of_one_pass_each_is_the_toys():
    path = ROOT / "example_workflows" / "One pass each.jpg"
    adapters = [open_adapter(FOLDER / f"toy_{side}.safetensors") for side in ("style", "content")]
    made = thumbnails.one_pass_each(*adapters).convert("RGB")
    made.thumbnail(minute.THUMBNAIL)
    shown = Image.open(path).convert("RGB")
    assert made.size == shown.size
    far = np.abs(np.asarray(made, dtype=float) - np.asarray(shown, dtype=float)).mean()
    assert far < 5, "as a JPEG, and drawn by another processor; renew it with python -m demo.thumbnails"


def test_titles_are_words(template):
    assert re.fullmatch(r"[A-Z][\w-]*,?( [\w-]+,?)+", template[0].stem) and "_" not in template[0].stem


def test_nothing_overlaps(template):
    """Nodes have a title of 30 pixels above their place."""
    nodes = template[1]["nodes"]
    for index, one in enumerate(nodes):
        for other in nodes[index + 1 :]:
            (left, top), (width, height) = one["pos"], one["size"]
            (left2, top2), (width2, height2) = other["pos"], other["size"]
            apart = (
                left + width <= left2
                or left2 + width2 <= left
                or top + height <= top2 - 30
                or top2 + height2 <= top - 30
            )
            assert apart, f"{one['type']} {one['id']} and {other['type']} {other['id']}"
