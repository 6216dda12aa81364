"""Presets of Block Scale through a real server and in a browser: saved, chosen again, refused, drawn."""

import json
import uuid

import pytest

from demo.server import PACK, WorkflowError
from tests.host import browser
from tests.host.test_similarity_and_sweeps import block_graph, gap, output

NODE = "QRLoRABlockScale"
FOLDER = ("models", "qrlora", "blocks")
BARS = "document.querySelectorAll('svg[aria-label^=blocks] rect')"


def run(server, **changed):
    entry = server.queue(block_graph(**changed))
    return entry["outputs"]["scaled"], output(server)


def blocks(shown):
    return {one["kind"]: [block[1] for block in one["blocks"]] for one in shown["qrlora_blocks"]}


def test_a_preset_is_what_its_factors_are(server):
    shown, preset = run(server, preset="only double blocks")
    assert shown["text"][0].splitlines()[0] == "single 0: 0" and blocks(shown) == {"double": [1.0], "single": [0.0]}
    _, written = run(server, single_blocks=0.0)
    assert gap(preset, written) == 0
    shown, _ = run(server, preset="only double blocks", attention=0.5)
    assert 0.5 < blocks(shown)["double"][0] < 1 and "12 layers" not in shown["text"][0]


def test_strengths_are_saved_and_chosen_again(server):
    name = f"mine {uuid.uuid4().hex[:6]}"
    shown, first = run(server, double_blocks=0.25, single_ranges="0: -0.5", save_as=f"my/{name}")
    assert shown["text"][0].endswith(f"saved as my/{name}")
    file = server.base.joinpath(*FOLDER, "my", f"{name}.json")
    assert json.loads(file.read_text())["double"] == 0.25
    spec = server.get(f"/object_info/{NODE}")[NODE]["input"]["optional"]["preset"]
    assert f"saved: my/{name}" in (spec[1].get("options") or spec[0])
    _, again = run(server, preset=f"saved: my/{name}")
    assert gap(first, again) == 0
    _, twice = run(server, preset=f"saved: my/{name}", double_blocks=2.0)
    assert gap(first, twice) > 1e-4
    shown, _ = run(server, double_blocks=0.5, save_as=f"my/{name}")
    assert shown["text"][0].endswith(f"saved as my/{name}_00002"), "nothing is overwritten"
    file.write_text(file.read_text().replace("0.25", "0.75"))
    _, edited = run(server, preset=f"saved: my/{name}")
    assert gap(first, edited) > 1e-4, "a file that was edited is read anew"
    file.unlink()
    with pytest.raises(WorkflowError, match="is not in models/qrlora/blocks"):
        run(server, preset=f"saved: my/{name}")


def test_presets_that_cannot_be_used_say_why(server):
    folder = server.base.joinpath(*FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "broken.json").write_bytes(b"\xff")
    (folder / "large.json").write_bytes(b" " * 200_000)
    (folder / "other.json").write_text(json.dumps({"qrlora.blocks": 1, "ranges": [["input", 0, 3, 0.5]]}))
    before = sorted(server.base.rglob("*.json"))
    for changed, words in (
        ({"preset": "style layers"}, "has no preset 'style layers'; it has first half"),
        ({"preset": "best"}, "expected none, first half"),
        ({"preset": "saved: ../../../x"}, "is refused"),
        ({"preset": "saved: absent"}, "is not in models/qrlora/blocks"),
        ({"preset": "saved: broken"}, "broken.json is not a text"),
        ({"preset": "saved: large"}, "larger than block strengths are"),
        ({"preset": "saved: other"}, "saved preset 'other' is for another adapter.*matches no block"),
        ({"save_as": "../out"}, "is refused"),
        ({"save_as": "nul"}, "device name"),
        ({"save_as": "/tmp/out"}, "absolute"),
    ):
        with pytest.raises(WorkflowError, match=words):
            run(server, **changed)
    assert sorted(server.base.rglob("*.json")) == before


@pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO)
@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_the_blocks_are_drawn_after_a_run(server, page, vue, tmp_path):
    graph = json.loads((PACK / "tests" / "workflows" / "merge_api.json").read_text())
    double = 0.75 if vue else 1.0  # a node that the server has cached says nothing again
    values = [double, 1.0, 1.0, 1.0, 1.0, 1.0, "", "", "", "only double blocks", ""]
    workflow = {
        "id": str(uuid.uuid4()), "last_node_id": 2, "last_link_id": 1, "groups": [], "version": 0.4,
        "nodes": [
            {"id": 1, "type": "QRLoRALoadDeltaR", "pos": [0, 100], "size": [300, 200], "flags": {}, "order": 0,
             "mode": 0, "widgets_values": [graph["2"]["inputs"]["delta_r_name"]],
             "outputs": [{"name": "delta_r", "type": "DELTA_R", "links": [1]}]},
            {"id": 2, "type": NODE, "pos": [400, 100], "size": [340, 560], "flags": {}, "order": 1, "mode": 0,
             "widgets_values": values, "inputs": [{"name": "delta_r", "type": "DELTA_R", "link": 1}],
             "outputs": [{"name": "delta_r", "type": "DELTA_R", "links": [2]}]},
            {"id": 3, "type": "QRLoRASaveDeltaR", "pos": [800, 100], "size": [300, 300], "flags": {}, "order": 2,
             "mode": 0, "widgets_values": [f"drawn {vue}", "portable", "as it is", "models/qrlora"],
             "inputs": [{"name": "delta_r", "type": "DELTA_R", "link": 2}]},
        ],
        "links": [[1, 1, 0, 2, 0, "DELTA_R"], [2, 2, 0, 3, 0, "DELTA_R"]],
    }  # fmt: skip
    browser.set_settings(server, {"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": "dark"})
    page.open()
    page.load(workflow)
    page.js("app.canvas.ds.scale = 1; app.canvas.ds.offset = [100, 0]; app.canvas.setDirty(true, true)")
    page.wait("return document.querySelector('svg[aria-label^=blocks]')?.textContent.includes('after a run')")
    size = page.js("return [...app.graph.getNodeById(2).size]")
    page.js("app.queuePrompt(0)")
    page.wait(f"return {BARS}.length === 2")
    titles = page.js(f"return [...{BARS}].map((one) => one.textContent)")
    assert titles == [f"double 0: {double:g}", "single 0: 0"]
    heights = page.js(f"return [...{BARS}].map((one) => Number(one.getAttribute('height')))")
    assert heights[0] > 40 and heights[1] < 1
    assert page.js("return [...app.graph.getNodeById(2).size]") == size, "what a run shows does not make it grow"
    saved = page.js("return app.graphToPrompt().then((made) => [made.workflow.nodes[1].widgets_values, made.output])")
    assert saved[0] == values and "qrlora_blocks" not in saved[1]["2"]["inputs"]
    page.screenshot(tmp_path / "blocks.png")
    assert page.errors() == []
