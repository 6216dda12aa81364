"""Training from the real front end: queue, watch, reload, stop, queue again, a picture.

Page, queue, encoders, run folders and the graph that follows are real; the steps are those of a fake trainer.
"""

import json
import time

import pytest

from demo.server import PACK
from demo.workflow import editable
from tests.host import browser
from tests.host.test_train import whole_graph
from tests.host.training import children

pytestmark = pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO)

EXAMPLE = PACK / "example_workflows" / "Train and merge.json"
WINDOW = (1600, 1000)
LONG = 100_000  # steps that nobody waits for
PANELS = "[...document.querySelectorAll('[data-qrlora-train]')]"
# The panel of the node that trains now, or trained last.
BUSY = f"{PANELS}.find((one) => !['idle', 'queued', 'finished'].includes(one.dataset.state))"


@pytest.fixture(autouse=True)
def steps_that_take_a_while(fake):
    fake.play("ok", seconds=0.05, sample_every=20, strengths=True)


def set_steps(page, run, steps, others):
    """Steps of the node that trained a run, and of the other Train nodes, as a person would set them."""
    page.js(
        """
        const [run, steps, others] = arguments;
        for (const node of app.graph.nodes.filter((one) => one.type === "QRLoRATrain")) {
          const widget = (name) => node.widgets.find((one) => one.name === name);
          widget("steps").value = run.startsWith(`${widget("output_name").value}-`) ? steps : others;
        }
        """,
        run,
        steps,
        others,
    )


def queue(page):
    """What the Run button does."""
    assert page.js("return app.queuePrompt(0, 1)")


def points(page):
    script = f"return {BUSY}?.querySelector('[data-series=smoothed]').getAttribute('d').match(/[ML]/g)?.length ?? 0"
    return page.js(script)


def step(page):
    return int(page.js(f"return {BUSY}?.dataset.step ?? 0"))


def grown(page, beyond, seconds=300):
    """Wait until the curve reaches further than a step."""
    page.wait(f"const at = {BUSY}?.dataset; return at?.state === 'running' && at.step > arguments[0]", seconds, beyond)
    return step(page)


@pytest.mark.parametrize("vue", [True, False], ids=["vue", "classic"])
def test_queue_watch_reload_stop_resume(server, page, vue):
    graph = whole_graph(steps=LONG)
    graph["vae"]["inputs"]["vae_name"] = "test_vae.safetensors"  # a small one: there is a sample every second
    for name in ("train", "style"):  # each renderer trains runs of its own
        graph[name]["inputs"] |= {"seed": 20 + vue, "output_name": f"{name} {vue}"}
    workflow = editable(graph, server.get("/object_info"))
    page.fresh({"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": "dark" if vue else "light"})
    page.load(workflow)
    page.js("app.canvas.ds.scale = 0.35; app.canvas.ds.offset = [80, 80]; app.canvas.setDirty(true, true)")
    page.wait(f"return {PANELS}.length === 2 && {PANELS}.every((one) => one.dataset.state === 'idle')")

    queue(page)
    first = grown(page, 10)
    drawn = points(page)
    assert drawn >= 5
    later = grown(page, first + 5)
    assert points(page) > drawn, "the curve does not grow"
    assert page.js(f"return {PANELS}.filter((one) => one.dataset.state === 'queued').length") == 1, "one after another"

    page.open()  # in the middle
    page.wait(f"return {PANELS}.length === 2", 60)
    again = grown(page, later)
    assert points(page) >= min(later, 50), "after a reload the curve begins anew"

    # looked at before the page hears of the end, which may take no longer than a second question to the browser
    assert page.js(f"const one = {BUSY}; one.querySelector('button').click(); return one.dataset.state") == "stopping"
    page.wait(f"return {BUSY}?.dataset.state === 'stopped'", 60)
    stopped = step(page)
    assert stopped >= again and f"Queue again to go on from step {stopped}." in page.js(f"return {BUSY}.innerText")
    assert not children(server)

    set_steps(page, page.js(f"return {BUSY}.dataset.run"), stopped + 8, 8)
    queue(page)
    page.wait(f"return {PANELS}.every((one) => one.dataset.state === 'finished')", 420)
    steps = page.js(f"return {PANELS}.map((one) => [one.dataset.step, one.dataset.steps].map(Number))")
    assert sorted(steps) == [[8, 8], [stopped + 8] * 2]
    events = [event for job in server.get("/qrlora/train/state")["jobs"] for event in job["events"]]
    starts = {event["first_step"] for event in events if event["event"] == "started"}
    assert starts == {0, stopped}, "the run was begun again instead of gone on with"
    page.wait(f"return {PANELS}.some((one) => one.querySelector('img')?.naturalWidth > 0)", 60)  # a sample's picture
    row = f"{PANELS}[0].querySelector('[data-qrlora-strengths]')"
    assert page.js(f"return getComputedStyle({row}).display") == "flex"
    assert page.js(f"return {row}.querySelector('[data-series=shown]').getAttribute('d').match(/L/g).length") == 3
    assert "concept shown 1.00" in page.js(f"return {row}.innerText")
    assert page.js(f"return fetch({row}.href).then((answer) => answer.headers.get('content-type'))") == "image/png"
    until = time.monotonic() + 120
    while not list((server.base / "output").glob("out_*.png")) and time.monotonic() < until:
        time.sleep(0.2)
    assert list((server.base / "output").glob("out_*.png")), "no picture from the trained adapters"
    for path in (server.base / "output").glob("out_*.png"):
        path.unlink()
    assert page.errors() == []


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="the example is not in this copy of the pack")
def test_the_example_opens(server, page):
    """As the front end opens a template: both Train nodes have a panel, no input is lost."""
    saved = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    page.fresh({"Comfy.VueNodes.Enabled": True})
    page.load_template(EXAMPLE.stem)
    page.wait("return app.graph.nodes.length === arguments[0]", 30, len(saved["nodes"]))
    page.wait(f"return {PANELS}.length === 2")
    assert page.js("return Object.keys(app.graph.links).length || app.graph.links.size") == len(saved["links"])
    assert page.errors() == []
