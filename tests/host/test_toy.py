"""The toy FLUX in a real ComfyUI: through the ordinary loader, with its helper pack, and the demo's whole graph."""

import json
import shutil

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from demo import graph as demo_graph
from demo import in_comfyui as demo_host
from demo import minute
from demo.concepts import ACT, CONTENT, FIT, MERGED_PROMPT, MORE, STYLE, draw_picture, fit, read_picture
from demo.fused import Fused
from demo.model import STEPS, WEIGHTS, load_toy, sample
from demo.toy.files import BASE, FOLDER
from qrlora_core import MergeRecipe, merge_acting, open_adapter

PROMPT = "a ring in blue dotted style"
SHORT = {**FIT, **MORE, "steps": 3, "rank": 4, "alpha": 4.0, "learning_rate": 0.05}


def picture_of(server, entry, node):
    shown = entry["outputs"][node]["images"][0]
    return server.base / "output" / shown["subfolder"] / shown["filename"]


def test_the_ordinary_loader_draws_the_same_picture_as_diffusers(server):
    graph = demo_graph.graph(SHORT, 7, "0, 1")
    wanted = ("model", "clip", "vae", "prompt", "noise", "merge_sample", "merge_decode", "merge_picture")
    graph = {name: graph[name] for name in wanted}
    graph["prompt"]["inputs"]["text"] = PROMPT
    del graph["prompt"]["inputs"]["delta_r"]
    graph["merge_sample"]["inputs"]["model"] = ["model", 0]
    entry = server.queue(graph)
    path = picture_of(server, entry, "merge_picture")
    assert Image.open(path).size == (128, 128)
    expected = sample(load_toy(), [PROMPT], [7], STEPS)
    assert expected.std() > 0.1
    # a file holds 8 bits, what is left over was cut off; beyond that the two are equal
    torch.testing.assert_close(read_picture(path) + 0.5 / 255, expected, rtol=0, atol=0.51 / 255)


def test_one_pass_each_draws_the_same_picture_as_diffusers(server):
    """Gate, factors and passes of Apply QR-LoRA against the demo's own, and the sweep's merge against Merge's."""
    graph = minute.graph()
    graph["sweep"]["inputs"] |= {"alphas": "0.5, 1", "betas": "1"}
    graph["merge"]["inputs"] |= {"alpha": 0.5}
    graph["picture"] = demo_graph.node("SaveImage", images=["merge_decode", 0], filename_prefix="merge")
    graph["cells"] = demo_graph.node("SaveImage", images=["sweep_decode", 0], filename_prefix="sweep")
    entry = server.queue(demo_graph.with_defaults(graph, server.get("/object_info")))
    assert "by prompt, one pass each" in entry["outputs"]["sweep"]["text"][0]
    assert "holds <s>, <c>" in entry["outputs"]["prompt"]["text"][0]
    style, content = (open_adapter(FOLDER / f"{one.name}.safetensors") for one in (STYLE, CONTENT))
    recipe = merge_acting(MergeRecipe.of(style), 0.5, MergeRecipe.of(content), 1.0, act=ACT)
    expected = Fused(load_toy(BASE), (style, content)).sample(recipe, [MERGED_PROMPT], [minute.SEED])
    found = read_picture(picture_of(server, entry, "picture"))
    np.testing.assert_allclose(found + 0.5 / 255, expected, rtol=0, atol=1.5 / 255)
    shown = entry["outputs"]["cells"]["images"]
    cells = [read_picture(server.base / "output" / one["filename"]) for one in shown]
    assert torch.equal(cells[0], found) and float((cells[1] - found).abs().max()) > 0.1


def test_encoding_is_the_inverse_of_decoding(server):
    graph = {
        "vae": demo_graph.node("QRLoRAToyVAE"),
        "picture": demo_graph.node("LoadImage", image=f"{STYLE.name}.png"),
        "encode": demo_graph.node("VAEEncode", pixels=["picture", 0], vae=["vae", 0]),
        "decode": demo_graph.node("VAEDecode", samples=["encode", 0], vae=["vae", 0]),
        "save": demo_graph.node("SaveImage", images=["decode", 0], filename_prefix="again"),
    }
    path = picture_of(server, server.queue(graph), "save")
    given = np.asarray(Image.open(server.base / "input" / f"{STYLE.name}.png"), dtype=int)
    assert np.abs(np.asarray(Image.open(path), dtype=int) - given).max() <= 1


def test_the_whole_graph_trains_merges_and_draws_the_sheet(server, tmp_path):
    workflow = demo_graph.graph(SHORT, 7, "0, 1")
    demo_host.offer_page(server, workflow)
    entry = demo_host.queued(server, workflow, SHORT["steps"])
    demo_host.collect(server.base, entry, tmp_path, in_graph=True)
    sheet = Image.open(tmp_path / "sheet.png")
    made = json.loads(sheet.text["qr_lora_contact_sheet"])
    assert made["rows"] == ["alpha = 0", "alpha = 1"] and made["columns"] == ["beta = 0", "beta = 1"]
    assert len(made["cells"]) == 4 and min(sheet.size) > 2 * 128
    one_pass, plain = (Image.open(tmp_path / f"{name}.png") for name in ("merge", "plain"))
    assert one_pass.size == plain.size == (128, 128) and one_pass.tobytes() != plain.tobytes()
    # the graph's training is that of the shell
    ours = load_file(fit(CONTENT, tmp_path / "shell", tmp_path / "scratch", **SHORT))
    theirs = load_file(tmp_path / f"{CONTENT.name}.safetensors")
    assert ours.keys() == theirs.keys() == load_file(tmp_path / f"{STYLE.name}.safetensors").keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=5e-3)  # another torch; steps are 0.05
    page = json.loads((server.base / "user/default/workflows" / f"{demo_host.PAGE}.json").read_text())
    assert {one["type"] for one in page["nodes"]} == {one["class_type"] for one in workflow.values()} | {"MarkdownNote"}


def test_the_base_holds_the_toy_and_both_pictures(tmp_path):
    base = demo_host.make_base(tmp_path / "base")
    assert (base / "models" / "diffusion_models" / WEIGHTS.name).stat().st_size == WEIGHTS.stat().st_size
    for concept in (CONTENT, STYLE):
        assert (base / "input" / f"{concept.name}.png").read_bytes() == draw_picture(concept, tmp_path).read_bytes()
    shutil.rmtree(base)
