"""Nothing that a training shows moves the graph: every node's rectangle before, during, after and on reload.

The page, the queue and the encoders are real; a fake trainer reports steps and samples within seconds.
"""

import json
import os

import pytest

from demo.server import PACK
from demo.workflow import editable
from tests.host import browser
from tests.host.training import node, train_graph

pytestmark = [
    pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO),
    pytest.mark.skipif(os.name == "nt", reason="the fake trainer is started by a shell script"),
]

STEPS, EVERY = 32, 8
WINDOW = (2200, 1000)
VIEW = "app.canvas.ds.scale = 0.4; app.canvas.ds.offset = [950, 60]; app.canvas.setDirty(true, true)"
TITLE = 30  # of a node, above its place
PANEL = "document.querySelector('[data-qrlora-train]')"
# Each node's place and size as the graph knows them, and as the new renderer draws them; whole pixels.
RECTANGLES = """
    Object.fromEntries(app.graph.nodes.map((node) => {
      const drawn = document.querySelector(`.lg-node[data-node-id="${node.id}"]`)?.getBoundingClientRect();
      const box = drawn ? [drawn.x, drawn.y, drawn.width, drawn.height] : [];
      return [`${node.id} ${node.type}`, [...node.pos, ...node.size, ...box].map(Math.round)];
    }))
"""


@pytest.fixture(autouse=True)
def quick_steps_with_samples(fake):
    fake.play("ok", seconds=0.05, sample_every=EVERY)


def graph(name):
    """Train with what its outputs are usually wired to: its pictures and its texts, as the templates have it."""
    made = train_graph(name, {"sample_every": EVERY}, steps=STEPS)
    made["curve"] = node("PreviewImage", images=["train", 1])
    made["samples"] = node("PreviewImage", images=["train", 2])
    made["log"] = node("PreviewAny", source=["train", 4])
    return made


def settled(page):
    """The rectangles, once they are the same in so many pictures that nothing is under way any more."""
    return page.driver.execute_async_script(
        f"""
        const done = arguments[0];
        let before = "", same = 0;
        const look = () => {{
          const now = JSON.stringify({RECTANGLES});
          same = now === before ? same + 1 : 0;
          before = now;
          if (same === 15) return done(JSON.parse(now));
          requestAnimationFrame(look);
        }};
        look();
        """
    )


def watch_rectangles(page):
    """From now on keep every state of the rectangles that is drawn, as text."""
    page.js(
        f"""
        window.qrloraSeen = new Set();
        const look = () => {{ window.qrloraSeen.add(JSON.stringify({RECTANGLES})); requestAnimationFrame(look); }};
        look();
        """
    )


def show_parameters(page):
    """Open the panel at the right, where our elements are parameters too, and the last of them in view."""
    page.js("app.canvas.selectNode(app.graph.nodes.find((node) => node.type === 'QRLoRATrain'))")
    shown = "document.querySelector('[data-testid=properties-panel]')"
    if not page.js(f"return !!{shown}"):
        page.js("document.querySelector('button[aria-label*=\"properties panel\" i]').click()")
    page.wait(f"return !!{shown}")
    page.js(f"{shown}.querySelector('[data-testid=panel-tab-parameters]').click()")
    page.js(f"for (const part of {shown}.querySelectorAll('*')) part.scrollTop = 1e6")


def panel_share(page):
    """The width of the training panel as a part of its node's."""
    node = "app.graph.nodes.find((node) => node.type === 'QRLoRATrain')"
    return page.js(f"return {PANEL}.getBoundingClientRect().width / ({node}.size[0] * app.canvas.ds.scale)")


@pytest.mark.parametrize("side_panel", [None, "node-library"], ids=["alone", "side-panel"])
@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_a_training_with_samples_moves_no_node(server, page, vue, side_panel):
    page.fresh({"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": "light" if vue else "dark"})
    page.load(editable(graph(f"{'vue' if vue else 'classic'} {side_panel}"), server.get("/object_info")))
    page.js("app.extensionManager.sidebarTab.activeSidebarTabId = arguments[0]", side_panel)
    page.js(VIEW)
    page.wait(f"return {PANEL}?.dataset.state === 'idle'")
    if side_panel:
        show_parameters(page)
    before = settled(page)
    assert 0.9 < panel_share(page) < 1, "the panel at the right took the training panel's place"
    watch_rectangles(page)
    assert page.js("return app.queuePrompt(0, 1)")
    page.wait(f"return {PANEL}.querySelectorAll('a').length >= 2", 120)
    page.wait(f"return {PANEL}.dataset.state === 'finished'", 120)
    page.wait("return Object.keys(app.nodeOutputs).length >= 4", 60)  # the previews have their pictures
    assert settled(page) == before
    assert 0.9 < panel_share(page) < 1, "the panel at the right gave the training panel its own width"
    seen = [json.loads(text) for text in page.js("return [...window.qrloraSeen]")]
    assert all(one == before for one in seen), "a node moved and came back"
    saved = page.js("return app.graph.serialize()")
    if side_panel:  # that panel is open again after a reload only if a person opens it
        page.fresh({"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": "light" if vue else "dark"})
    else:
        page.open()
    page.load(saved)
    page.js(VIEW)
    page.wait(f"return {PANEL}?.dataset.state === 'finished'")
    assert settled(page) == before, "saved and opened again, a node has another size"
    assert page.errors() == []


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_in_no_template_do_nodes_lie_on_one_another(server, page, vue):
    """As large as the page makes them; a node that gains an input grows in all saved graphs."""
    page.fresh({"Comfy.VueNodes.Enabled": vue})
    found = {}
    for path in sorted((PACK / "example_workflows").glob("*.json")):
        page.load_template(path.stem)
        count = len(json.loads(path.read_text(encoding="utf-8"))["nodes"])
        page.wait("return app.graph.nodes.length === arguments[0]", 60, count)
        boxes = [(name, box[:4]) for name, box in settled(page).items()]
        for index, (name, (left, top, width, height)) in enumerate(boxes):
            for other, (x, y, w, h) in boxes[index + 1 :]:
                above, below = (top + height, y - TITLE) if top < y else (y + h, top - TITLE)
                if min(left + width, x + w) - max(left, x) > 1 and above - below > 1:
                    found.setdefault(path.stem, []).append((name, other, above - below))
    assert not found
