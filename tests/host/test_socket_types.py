"""Sockets have types of this pack's own name, and those that they had before connect as they did: in graphs that were
saved, in subgraphs, and on nodes of other packs; in the page, and on the server."""

import copy
import json

import pytest
from safetensors.torch import load_file

from demo.server import GOLDEN, PACK
from demo.workflow import editable
from tests.host import browser
from tests.host.training import node

MERGE = json.loads((PACK / "tests" / "workflows" / "merge_api.json").read_text(encoding="utf-8"))
EARLIER = sorted((PACK / "tests" / "workflows" / "earlier").glob("*.json"))
TEAL, BROWN = "#1FBFA8", "#B07D52"
PAGE = pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO)
RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
WINDOW = (1900, 1200)


def through_a_foreign_node(residual=False):
    """The main job with a node of another pack between Merge and Apply."""
    graph = copy.deepcopy(MERGE)
    graph["other"] = node("QRLoRATestForeign", delta_r=["4", 0])
    graph["5"]["inputs"]["delta_r"] = ["other", 0]
    graph["12"]["inputs"]["output"] = "foreign"
    if residual:
        graph["rest"] = node("QRLoRALoadResidual", residual_name="official_residual_fp32.safetensors")
        graph["other"]["inputs"]["residual"] = ["rest", 0]
        graph["5"]["inputs"]["residual"] = ["other", 1]
    return graph


def opened(page, graph, vue):
    page.fresh({"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": "light" if vue else "dark"})
    page.load(graph)


def test_every_socket_of_ours_has_a_prefix(server):
    known = {
        "MODEL",
        "CLIP",
        "VAE",
        "IMAGE",
        "CONDITIONING",
        "SIGMAS",
        "HOOKS",
        "LORA_STACK",
    }  # of the host, of stackers
    known |= {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    for name, one in server.get("/object_info").items():
        if name.startswith("QRLoRA") and "Test" not in name:
            specs = [spec for part in ("required", "optional") for spec in one["input"].get(part, {}).values()]
            kinds = {spec[0] for spec in specs if isinstance(spec[0], str)} | set(one["output"])
            assert all(kind.startswith("QRLORA_") for kind in kinds - known), name


def test_a_node_of_another_pack_between_ours_changes_nothing(server):
    server.queue(through_a_foreign_node(residual=True))
    found = load_file(server.base / "output" / "foreign.safetensors")["out"]
    wanted = load_file(GOLDEN / "tensors.safetensors")["merged.0.9.1.0.out"]
    assert float((found - wanted).abs().max()) < 1e-4


@PAGE
@RENDERERS
@pytest.mark.parametrize("path", EARLIER, ids=lambda path: path.stem)
def test_a_workflow_of_before_keeps_links_and_values(server, page, path, vue):
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert any(link[5] == "DELTA_R" for link in saved["links"]), "a workflow from before"
    opened(page, saved, vue)
    now = page.js("return app.graph.serialize()")
    assert sorted(link[:4] for link in now["links"]) == sorted(link[:4] for link in saved["links"])
    prompt = page.js("return app.graphToPrompt().then((made) => made.output)")
    info = server.get("/object_info")
    for one in saved["nodes"]:
        if one["type"] not in info:
            continue  # a note
        for socket in one.get("inputs", []):
            link = next((link for link in saved["links"] if link[0] == socket.get("link")), None)
            if link:
                assert prompt[str(one["id"])]["inputs"][socket["name"]] == [str(link[1]), link[2]]
        values = list(prompt[str(one["id"])]["inputs"].values())
        for value in one.get("widgets_values") or []:
            assert value in (*values, "fixed", ""), f"{one['type']} lost {value!r}"
    colours = page.js(
        "return app.graph.nodes.flatMap((one) => (one.inputs ?? []).map((input) => [input.type, input.link]))"
        ".filter(([type, link]) => link != null && /DELTA_R/.test(type))"
        ".map(([, link]) => LGraphCanvas.link_type_colors[app.graph.links[link]?.type ?? ''])"
    )
    assert colours and set(colours) == {TEAL}
    assert page.errors() == []


@PAGE
@RENDERERS
def test_sockets_connect_to_what_they_should_and_have_their_colours(server, page, vue):
    graph = {name: one for name, one in through_a_foreign_node(residual=True).items() if name in ("2", "4", "rest")}
    graph["4"]["inputs"].pop("delta_r_content")
    graph["apply"] = node("QRLoRAApply", strength=1.0)
    graph["other"] = node("QRLoRATestForeign")
    opened(page, editable(graph, server.get("/object_info")), vue)
    connect = """
        const of = (kind) => app.graph.nodes.find((one) => one.type === kind);
        const place = (one, name) => one.inputs.findIndex((input) => input.name === name);
        const link = (from, slot, to, name) => of(from).connect(slot, of(to), place(of(to), name));
        const type = (made) => made && [made.type, LGraphCanvas.link_type_colors[made.type]];
        return [
          link("QRLoRAMerge", 0, "QRLoRATestForeign", "delta_r"),
          link("QRLoRATestForeign", 0, "QRLoRAApply", "delta_r"),
          link("QRLoRALoadResidual", 0, "QRLoRATestForeign", "residual"),
          link("QRLoRATestForeign", 1, "QRLoRAApply", "residual"),
          link("QRLoRALoadResidual", 0, "QRLoRAApply", "residual"),
          link("QRLoRALoadResidual", 0, "QRLoRAApply", "delta_r"), link("QRLoRALoadDeltaR", 0, "QRLoRAApply", "model"),
          link("QRLoRALoadDeltaR", 0, "QRLoRAApply", "delta_r"),
        ].map(type);
    """
    *allowed, crossed, other, last = page.js(connect)
    assert [one[1] for one in allowed] == [TEAL, TEAL, BROWN, BROWN, BROWN] and last[1] == TEAL
    assert crossed is None and other is None, "a residual is no adapter"
    if vue:
        page.wait("return document.querySelectorAll('.lg-node').length >= 5")
        shown = page.js("return document.documentElement.outerHTML.match(/--color-datatype-QRLORA_[A-Z_,]+/g)")
        assert any("QRLORA_DELTA_R" in one for one in shown)
    assert page.errors() == []
