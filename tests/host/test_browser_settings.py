"""The pack's settings in ComfyUI's settings dialog: they act at once, on open graphs and new nodes; and its badge."""

import json
import os
import re

import pytest

from demo.server import PACK
from demo.workflow import editable
from tests.host import browser
from tests.host.training import node, train_graph

pytestmark = pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO)

RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
WINDOW = (1500, 1100)


@pytest.fixture
def opened(server, page, request):
    vue = request.node.callspec.params.get("vue", False) if hasattr(request.node, "callspec") else False
    page.fresh({"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": "light" if vue else "dark"})
    graph = train_graph("settings") | {"apply": node("QRLoRAApply", delta_r=["train", 0], strength=1.0, mode="auto")}
    page.load(editable(graph, server.get("/object_info")))
    return page


def choose(page, name, value):
    """As the settings dialog stores it."""
    page.js("return app.extensionManager.setting.set(arguments[0], arguments[1])", name, value)


def queued(page, kind, widget):
    """What a queued graph says, and what the workflow that is saved says."""
    return page.js(
        """
        const [kind, widget] = arguments;
        const node = app.graph.nodes.find((one) => one.type === kind);
        const place = node.widgets.findIndex((one) => one.name === widget);
        return app.graphToPrompt().then(({ output, workflow }) => [
          output[node.id].inputs[widget],
          workflow.nodes.find((one) => String(one.id) === String(node.id)).widgets_values[place],
        ]);
        """,
        kind,
        widget,
    )


@RENDERERS
def test_auto_means_what_the_settings_say(opened, vue):
    assert queued(opened, "QRLoRAApply", "mode") == ["auto", "auto"]
    choose(opened, "QRLoRA.ApplyMode", "live")
    assert queued(opened, "QRLoRAApply", "mode") == ["live", "auto"], "the graph keeps auto for other machines"
    choose(opened, "QRLoRA.MemoryPreset", "12 GB")
    assert queued(opened, "QRLoRATrainOptions", "preset") == ["12 GB", "auto"]
    opened.js(
        "const apply = app.graph.nodes.find((one) => one.type === 'QRLoRAApply');"
        "apply.widgets.find((one) => one.name === 'mode').value = 'patch';"
    )
    assert queued(opened, "QRLoRAApply", "mode") == ["patch", "patch"], "what a node says itself counts"
    choose(opened, "QRLoRA.MemoryPreset", "3 TB")
    assert queued(opened, "QRLoRATrainOptions", "preset") == ["auto", "auto"], "nothing that the node would refuse"
    assert opened.errors() == []


@RENDERERS
def test_new_train_nodes_write_to_the_folder_of_the_settings(opened, vue):
    choose(opened, "QRLoRA.Folder", "models/loras")
    added = """
        const node = LiteGraph.createNode("QRLoRATrain");
        app.graph.add(node);
        return node.widgets.find((one) => one.name === "folder").value;
    """
    assert opened.js(added) == "models/loras"
    assert queued(opened, "QRLoRATrain", "folder")[0] == "output/qrlora", "a graph keeps its own"
    saved = opened.js("return app.graph.serialize()")
    choose(opened, "QRLoRA.Folder", "models/qrlora")
    opened.load(saved)
    folders = opened.js(
        "return app.graph.nodes.filter((one) => one.type === 'QRLoRATrain')"
        ".map((one) => one.widgets.find((w) => w.name === 'folder').value).sort()"
    )
    assert folders == ["models/loras", "output/qrlora"]


def test_the_dialog_has_them(opened, tmp_path):
    opened.js("app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    opened.wait(
        "return [...document.querySelectorAll('[role=dialog] *')].some((one) => one.textContent.trim() === 'QR-LoRA')"
    )
    opened.js(
        "[...document.querySelectorAll('[role=dialog] *')]"
        ".filter((one) => one.textContent.trim() === 'QR-LoRA').at(-1).click()"
    )
    opened.wait("return document.querySelector('[role=dialog]').innerText.includes('Apply QR-LoRA means here')", 20)
    shown = opened.js("return document.querySelector('[role=dialog]').innerText")
    for words in ("What 'auto' of Apply QR-LoRA means here", "Options means here", "Folder that new Train"):
        assert words in shown
    if os.environ.get("QRLORA_SHOTS"):
        opened.screenshot(tmp_path / "settings.png")


def test_the_badge_is_on_the_about_page(opened, tmp_path):
    opened.js("app.extensionManager.command.execute('Comfy.Help.AboutComfyUI')")
    opened.wait("return [...document.querySelectorAll('a')].some((one) => one.href.includes('comfyui-qr-lora'))", 20)
    if os.environ.get("QRLORA_SHOTS"):
        opened.screenshot(tmp_path / "about.png")


def test_the_settings_offer_what_the_nodes_take(server):
    script = (PACK / "web" / "qrlora_settings.js").read_text(encoding="utf-8")
    blocks = re.findall(r"id: (\w+),.*?options: (\[.*?\])", script, re.DOTALL)
    offered = {name: json.loads(options.replace("AUTO", '"auto"')) for name, options in blocks}
    info = server.get("/object_info")

    def options(kind, widget):
        inputs = info[kind]["input"]
        spec = {**inputs.get("required", {}), **inputs.get("optional", {})}[widget]
        return spec[0] if isinstance(spec[0], list) else spec[1]["options"]

    assert sorted(offered["MODE"]) == sorted(options("QRLoRAApply", "mode"))
    assert offered["PRESET"] == options("QRLoRATrainOptions", "preset")
    assert sorted(offered["FOLDER"]) == sorted(options("QRLoRATrain", "folder"))
