"""Blueprints: in the host's library, up to date with the nodes, and a prompt after they are put into a graph."""

import json
import os

import pytest

from demo.blueprints import FOLDER, blueprints, made
from tests.host import browser
from tests.host.training import node

WINDOW = (1600, 1000)
FILES = sorted(FOLDER.glob("*.json"))


def test_the_files_are_those_of_the_live_nodes(server):
    info = server.get("/object_info")
    assert {path.stem for path in FILES} == blueprints().keys()
    for path in FILES:
        wanted = json.loads(json.dumps(made(path.stem, blueprints()[path.stem], info)))
        files = ("model_name",)  # whatever the first file on a disk is
        assert json.loads(path.read_text(encoding="utf-8")).keys() == wanted.keys(), files
        found = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"][0]
        inner = wanted["definitions"]["subgraphs"][0]
        assert found["links"] == inner["links"] and found["inputs"] == inner["inputs"], "python -m demo.blueprints"
        for one, other in zip(found["nodes"], inner["nodes"]):
            assert one["inputs"] == other["inputs"] and len(one["widgets_values"]) == len(other["widgets_values"])


def test_the_host_lists_them(server):
    listed = {one["name"] for one in server.get("/global_subgraphs").values() if "qr-lora" in json.dumps(one)}
    assert {path.stem for path in FILES} <= listed


@pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_is_a_prompt_once_it_is_in_a_graph(server, page, path):
    page.fresh()
    page.load(json.loads(path.read_text(encoding="utf-8")))
    shown = page.js("return app.graph.nodes[0].widgets.map((one) => one.name)")
    assert len(shown) == len(blueprints()[path.stem].shown), shown
    prompt = page.js("return app.graphToPrompt().then((made) => made.output)")
    kinds = sorted(one["class_type"] for one in prompt.values())
    assert kinds == sorted(one["class_type"] for one in blueprints()[path.stem].graph.values())
    assert all(":" in name for name in prompt), "nodes inside of another one"
    assert page.errors() == []
    if os.environ.get("QRLORA_SHOTS"):
        page.screenshot(FOLDER.parent / f"{path.stem}.png")


def test_merge_style_and_content_runs(server, page):
    """With the model of the tests outside, and the files that its own widgets choose."""
    path = FOLDER / "Merge style and content.json"
    page.fresh()
    page.load(json.loads(path.read_text(encoding="utf-8")))
    prompt = page.js(
        """
        const [style, content] = app.graph.nodes[0].widgets;
        style.value = "official_style.safetensors";
        content.value = "official_content.safetensors";
        return app.graphToPrompt().then((made) => made.output);
        """
    )
    apply = next(name for name, one in prompt.items() if one["class_type"] == "QRLoRAApply")
    prompt["model"] = node("UNETLoader", unet_name="base_bfl.safetensors", weight_dtype="default")
    prompt[apply]["inputs"]["model"] = ["model", 0]
    prompt["out"] = node("QRLoRATestForward", model=[apply, 0], filename="tensors.safetensors", output="blueprint")
    entry = server.queue(prompt)
    assert "15 layers" in entry["outputs"][apply]["text"][0]
