"""What the panel of a Train node says is what ComfyUI's queue says: waiting, running, refused, gone with the server."""

import copy
import os

import pytest

from demo.workflow import editable
from tests.host import browser
from tests.host.test_train import whole_graph
from tests.host.training import node, train_graph

pytestmark = [
    pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO),
    pytest.mark.skipif(os.name == "nt", reason="the fake trainer is started by a shell script"),
]

RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
PANELS = "[...document.querySelectorAll('[data-qrlora-train]')]"
STATES = f"{PANELS}.map((one) => one.dataset.state).sort().join()"
LONG = 100_000
WINDOW = (1600, 1000)


@pytest.fixture(autouse=True)
def steps_that_take_a_while(fake):
    fake.play("ok", seconds=0.05)


def opened(page, graph, vue):
    page.fresh({"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": "light" if vue else "dark"})
    page.load(editable(graph, page.server.get("/object_info")))
    page.js("app.canvas.ds.scale = 0.35; app.canvas.ds.offset = [80, 80]; app.canvas.setDirty(true, true)")
    page.wait(f"return {PANELS}.length")


def said(page, state):
    return page.js(f"return {PANELS}.find((one) => one.dataset.state === arguments[0])?.innerText ?? ''", state)


@RENDERERS
def test_the_second_training_of_a_graph_waits_for_the_first(server, page, vue):
    graph = whole_graph(steps=LONG)
    for name in ("train", "style"):
        graph[name]["inputs"] |= {"seed": 70 + vue, "output_name": f"waits {name} {vue}"}
    opened(page, graph, vue)
    page.wait(f"return {STATES} === 'idle,idle'")
    assert page.js("return app.queuePrompt(0, 1)")
    page.wait(f"return {STATES} === 'queued,running'", 120)
    assert "Queued" in said(page, "queued") and "Waits for the nodes before it." in said(page, "queued")
    if os.environ.get("QRLORA_SHOTS"):
        page.screenshot(server.base / f"queued {vue}.png")
    page.js(f"{PANELS}.find((one) => one.dataset.state === 'running').querySelector('button').click()")
    page.wait(f"return {STATES} === 'idle,stopped'", 60)
    assert page.errors() == []


@RENDERERS
def test_a_graph_behind_another_entry_of_the_queue_waits(server, page, vue):
    opened(page, train_graph(f"behind {vue}", seed=80 + vue, steps=4), vue)
    other = {
        f"other {name}" if name != "train" else "77": copy.deepcopy(one)
        for name, one in train_graph(f"before {vue}", seed=90 + vue, steps=LONG).items()
    }
    for one in other.values():
        for key, value in one["inputs"].items():
            if isinstance(value, list):
                one["inputs"][key] = [f"other {value[0]}", value[1]]
    server.submit(other)
    assert page.js("return app.queuePrompt(0, 1)")
    page.wait(f"return {STATES} === 'queued'", 60)
    assert "One entry of the queue runs before it." in said(page, "queued")
    server.post("/interrupt", {})
    page.wait(f"return {STATES} === 'finished'", 120)
    assert page.errors() == []


def test_an_input_that_is_refused_is_told_on_the_panel(server, page):
    graph = train_graph("refused", seed=99, steps=4)
    graph["any"] = node("QRLoRATestAny", what="no encoder")
    graph["train"]["inputs"]["clip"] = ["any", 0]
    opened(page, graph, False)
    assert page.js("return app.queuePrompt(0, 1)")
    page.wait(f"return {STATES} === 'failed'", 60)
    assert "clip is 'no encoder', expected a text encoder" in said(page, "failed")


def test_a_training_that_the_server_no_longer_knows_has_stopped(server, page):
    """ComfyUI was started anew while the page was open."""
    opened(page, train_graph("gone", seed=100, steps=4), False)
    number = page.js("return String(app.graph.nodes.find((one) => one.type === 'QRLoRATrain').id)")
    message = {"node": number, "prompt_id": None, "run": "gone-0123456789ab", "state": "running", "events": []}
    page.js("window.comfyAPI.api.api.dispatchCustomEvent('qrlora.train', arguments[0])", message)
    page.wait(f"return {STATES} === 'running'")
    page.js("window.comfyAPI.api.api.dispatchCustomEvent('reconnected')")
    page.wait(f"return {STATES} === 'stopped'")
    assert "ComfyUI was restarted" in said(page, "stopped")
    page.spoil()  # it goes on showing the run on whatever node has this number
