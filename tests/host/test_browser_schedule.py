"""The curve on the schedule node: drawn as it is typed, in both renderers, after a load, never part of the workflow."""

import uuid

import pytest

from tests.host import browser

pytestmark = pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO)

RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
NODE = {
    "id": 1, "type": "QRLoRASchedule", "pos": [100, 100], "size": [330, 330], "flags": {}, "order": 0, "mode": 0,
    "widgets_values": ["points", "0: 1, 0.5: 0", "steps", 0.5],
}  # fmt: skip
WORKFLOW = {"last_node_id": 1, "last_link_id": 0, "nodes": [NODE], "links": [], "groups": [], "version": 0.4}
CURVE = "document.querySelector('svg[aria-label^=strength] polyline')"
CHANGE = """
    const widget = app.graph.getNodeById(1).widgets.find((one) => one.name === arguments[0]);
    widget.value = arguments[1];
    widget.callback?.(arguments[1]);
"""


def curve(page):
    """(x, y) of the drawn points."""
    text = page.js(f"return {CURVE}?.getAttribute('points')")
    return text and [tuple(float(part) for part in point.split(",")) for point in text.split(" ")]


@RENDERERS
def test_the_curve_follows_the_widgets(page, vue, tmp_path):
    page.fresh({"Comfy.VueNodes.Enabled": vue})
    page.load({**WORKFLOW, "id": str(uuid.uuid4())})
    page.js("app.canvas.ds.scale = 1; app.canvas.ds.offset = [200, 0]; app.canvas.setDirty(true, true)")
    page.wait(f"return {CURVE}?.getBoundingClientRect().width > 100")
    first = curve(page)
    assert first[0][1] < first[-1][1], "it was saved as a fade, and is drawn so after a load"
    page.js(CHANGE, "preset", "fade in")
    assert curve(page)[0][1] > curve(page)[-1][1]
    page.js(CHANGE, "preset", "content first")
    page.js(CHANGE, "switch", 0.25)
    xs = [x for x, _ in curve(page)]
    assert xs[1] == xs[2] == pytest.approx(6 + 0.75 * 208), "sigma falls: a switch at 0.25 is late"
    page.js(CHANGE, "preset", "points")
    page.js(CHANGE, "points", "0.5: 1, 0.2: much")
    assert curve(page) is None
    assert "places and factors" in page.js("return document.querySelector('svg[aria-label^=strength]').textContent")
    page.js(CHANGE, "points", "0: 0.5; 1: 2")
    assert len(curve(page)) == 4
    saved = page.js("return app.graphToPrompt().then((made) => [made.workflow.nodes[0].widgets_values, made.output])")
    assert saved[0] == ["points", "0: 0.5; 1: 2", "steps", 0.25]
    assert set(saved[1]["1"]["inputs"]) == {"preset", "points", "over", "switch"}
    page.screenshot(tmp_path / "schedule.png")
    assert page.errors() == []


def test_the_template_opens_whole(page):
    page.fresh()
    page.load_template("Content first, then style")
    rectangles = page.js("""
        return app.graph.nodes.map((one) => [one.title, ...one.getBounding()]);
    """)
    assert len(rectangles) == 17
    for index, (title, x, y, width, height) in enumerate(rectangles):
        for other, a, b, wide, high in rectangles[index + 1 :]:
            apart = x + width <= a or a + wide <= x or y + height <= b or b + high <= y
            assert apart, f"{title} covers {other}"
