"""The Train node's panel in the real front end: fed with events, in both renderers and in every palette."""

import itertools
import json

import pytest
from selenium.webdriver.common.keys import Keys

from tests.host import browser

pytestmark = pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO)

RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
PALETTES = ("dark", "light", "solarized", "arc", "nord", "github")
JOB_MODULE = "/extensions/qr-lora/qrlora_train_job.js"
GIB = 1024**3
NODE = {"type": "QRLoRATrain", "pos": [100, 100], "size": [400, 100], "flags": {}, "order": 0, "mode": 0}
NUMBERS = itertools.count(10, 10)  # of each test's own node: the page remembers what the earlier ones showed
TRAIN = "app.graph.nodes[0]"
PANEL = "document.querySelector('[data-qrlora-train]')"


@pytest.fixture
def train(page, request):
    """A graph with one Train node in the renderer that the test asks for; what the page posts is kept."""
    vue = request.node.callspec.params.get("vue", False) if hasattr(request.node, "callspec") else False
    page.fresh({"Comfy.VueNodes.Enabled": vue})
    one = {**NODE, "id": next(NUMBERS)}
    page.load({"last_node_id": one["id"], "last_link_id": 0, "nodes": [one], "links": [], "groups": [], "version": 0.4})
    page.js("""
        app.canvas.ds.scale = 1;
        app.canvas.ds.offset = [200, 0];
        app.canvas.setDirty(true, true);
        window.qrloraTest = { posted: [], refusal: "" };
        const { api } = window.comfyAPI.api;
        const fetchApi = api.fetchApi.bind(api);
        api.fetchApi = (path, options) => {
          if (path !== "/qrlora/train/stop") return fetchApi(path, options);
          qrloraTest.posted.push(JSON.parse(options.body));
          const [body, status] = qrloraTest.refusal ? [{ error: qrloraTest.refusal }, 404] : [{}, 200];
          return Promise.resolve(new Response(JSON.stringify(body), { status }));
        };
    """)
    page.wait(f"return Math.abs({PANEL}?.getBoundingClientRect().height - 380) < 20")  # drawn at scale 1
    return page


def number(page):
    """The id of the Train node, as the server names it."""
    return page.js(f"return String({TRAIN}.id)")


def send(page, state, *events, text="", node=None, run="name-0123456789ab", prompt=None):
    message = {
        "node": node or number(page),
        "prompt_id": prompt,
        "run": run,
        "state": state,
        "events": list(events),
        "text": text,
    }
    page.js("window.comfyAPI.api.api.dispatchCustomEvent('qrlora.train', arguments[0])", message)
    page.driver.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
    )


def started(steps=1000, first=0):
    return {"event": "started", "time": 1.0, "pid": 1, "steps": steps, "first_step": first}


def phase(name, done=0, total=0):
    return {"event": "phase", "time": 1.5, "phase": name, "done": done, "total": total, "text": ""}


def step(number, loss=0.5, steps=1000):
    return {
        **{"event": "step", "time": 2.0 + number, "step": number, "steps": steps, "loss": loss, "lr": 1e-4},
        **{"smoothed_loss": loss, "seconds": 2.5, "eta": 2.5 * (steps - number), "peak_memory": 18 * GIB},
    }


def panel(page):
    """What the panel shows: its data attributes and its text."""
    return page.js(f"const panel = {PANEL}; return {{ ...panel.dataset, text: panel.innerText }}")


def points(page, series="smoothed"):
    return page.js(
        f"return {PANEL}.querySelector('[data-series={series}]').getAttribute('d').match(/[ML]/g)?.length ?? 0"
    )


def module(page, script):
    """Run a script with the classes of the module."""
    return page.driver.execute_async_script(
        f"const done = arguments[0]; import('{JOB_MODULE}').then(({{ Curve, Job }}) => {{ {script} }}).then(done, done)"
    )


def test_a_million_steps_cost_no_more_than_a_thousand(page):
    result = module(
        page.fresh(),
        """
        const curve = new Curve();
        for (let step = 1; step <= 1e6; step++) curve.add(step, step === 654321 ? 9 : 1 + (step % 2), 1e6 - step);
        const { buckets } = curve;
        return {
          kept: buckets.length, first: buckets[0].step, last: curve.last,
          low: Math.min(...buckets.map((one) => one.low)), high: Math.max(...buckets.map((one) => one.high)),
          peak: curve.nearest(654321).high,
          ordered: buckets.every((one, index) => !index || buckets[index - 1].step < one.step),
        };
        """,
    )
    assert 500 < result["kept"] <= 1024 and result["ordered"]
    assert result["first"] <= 1024 and result["last"]["step"] == 1_000_000 and result["last"]["smoothed"] == 0
    assert result["low"] == 1 and result["high"] == result["peak"] == 9, "an outlier was lost"


def test_events_that_come_twice_or_late_change_nothing(page):
    result = module(
        page.fresh(),
        """
        const event = (step) => ({ event: "step", time: step, step, steps: 50, loss: step, smoothed_loss: step });
        const all = Array.from({ length: 40 }, (_, index) => event(index + 1));
        const once = new Job("1", "run");
        once.take({ events: all, state: "running" });
        const twice = new Job("1", "run");
        twice.take({ events: [all[39], all[3], ...all.slice(0, 20)], state: "running" });
        twice.take({ events: all, state: "running" });
        const same = JSON.stringify(once.curve.buckets) === JSON.stringify(twice.curve.buckets);
        // a page that was opened late gets the start of the second half last
        const late = new Job("1", "run");
        late.take({ events: [...all, { event: "started", time: 30.5, first_step: 30, steps: 50 }] }, true);
        const resumed = late.curve.last.step;
        once.take({ events: [{ event: "started", time: 99, first_step: 10, steps: 50 }] });
        const cut = once.curve.last.step;
        once.take({ events: [{ ...event(11), loss: null, smoothed_loss: null }, event(12)] });
        return { same, resumed, cut, gap: once.curve.buckets.map((one) => one.step).slice(-2), step: once.step };
        """,
    )
    assert result == {"same": True, "resumed": 40, "cut": 10, "gap": [10, 12], "step": 12}


@RENDERERS
def test_a_run_from_start_to_end_moves_nothing(train, vue):
    """Numbers, curve, samples and an error come and go; the node and the button stay where they are."""
    place = f"""
        const round = (...numbers) => numbers.map(Math.round);
        const box = {PANEL}.getBoundingClientRect();
        const {{ x, y }} = {PANEL}.querySelector("button").getBoundingClientRect();
        return [round(...{TRAIN}.size), round(box.x, box.y, box.width, box.height), round(x, y)];
    """
    before = train.js(place)
    assert panel(train)["state"] == "idle" and points(train) == 0
    send(train, "preparing", run="", text="checking the trainer")
    assert panel(train)["state"] == "preparing" and "checking the trainer" in panel(train)["text"]
    send(train, "running", phase("model", 1, 4), text="reading")
    assert "Loading the model" in panel(train)["text"]
    assert train.js(f"return {PANEL}.querySelector('[role=progressbar]').getAttribute('aria-valuenow')") == "25"
    send(train, "running", started(), phase("train"), *[step(one, 1 / one) for one in range(1, 101)], text="one line")
    shown = panel(train)
    assert (shown["state"], shown["step"], shown["steps"]) == ("running", "100", "1000")
    for expected in (
        "Training",
        "step 100 / 1000",
        "37:30 min left",
        "2.50 s/step",
        "peak 19.3 GB",
        "smoothed loss 0.01, learning rate 1.0e-4",
    ):
        assert expected in shown["text"], shown["text"]
    assert points(train) == points(train, "raw") == 100
    assert train.js(f"return {PANEL}.querySelector('svg').dataset.scale") == "log", "a loss that falls by 100"
    send(train, "running", {"event": "validation", "time": 200, "step": 100, "loss": 0.2}, step(101))
    assert "validation" in panel(train)["text"] and points(train, "validation") == 1
    send(train, "running", *[{"event": "sample", "time": 201, "step": one, "file": "x"} for one in (50, 100)])
    samples = f"""[...{PANEL}.querySelectorAll('a[href*="step="]')]"""
    links = train.js(f"return {samples}.map((one) => one.getAttribute('href'))")
    assert [link.split("step=")[1] for link in links] == ["100", "50"], "the newest comes first"
    assert train.js(place) == before
    send(train, "failed", {"event": "failed", "time": 300, "reason": "memory", "message": "m"}, text="line\n" * 30)
    assert panel(train)["state"] == "failed" and train.js(f"return {PANEL}.querySelector('button').disabled")
    assert train.js(place) == before
    send(train, "running", started(first=60), step(61))
    assert (points(train), panel(train)["step"]) == (61, "61"), "the steps that are done again are drawn once"
    assert train.errors() == []


@RENDERERS
def test_the_scaling_stands_on_the_node(train, vue):
    """Of the widgets as they are: alpha 0, the default, follows rank."""
    assert "scaling 1 (alpha as rank)" in panel(train)["text"]
    change = """
        const widget = app.graph.nodes[0].widgets.find((one) => one.name === arguments[0]);
        widget.value = arguments[1];
        widget.callback?.(widget.value);
    """
    train.js(change, "rank", 16)
    assert "scaling 1 (alpha as rank)" in panel(train)["text"]
    train.js(change, "alpha", 64)
    assert "scaling 4 (alpha 64 / rank 16)" in panel(train)["text"]
    saved = train.js("return app.graph.serialize()")
    train.load(saved)
    train.wait(f"return {PANEL}?.innerText.includes('scaling 4 (alpha 64 / rank 16)')")
    send(train, "running", started(), step(5))
    assert "scaling" not in panel(train)["text"] and "left" in panel(train)["text"]
    assert train.errors() == []


def test_a_warning_is_read_while_it_trains(train):
    message = {
        "node": number(train),
        "prompt_id": None,
        "run": "n-0123456789ab",
        "state": "running",
        "events": [started(), step(3)],
    }
    message |= {"text": "step", "warnings": ["no caption holds the trigger '<c>'"]}
    train.js("window.comfyAPI.api.api.dispatchCustomEvent('qrlora.train', arguments[0])", message)
    train.wait(f"return {PANEL}.innerText.includes(\"no caption holds the trigger '<c>'\")")
    assert "smoothed loss" in panel(train)["text"]


@RENDERERS
def test_stop_by_keyboard_and_a_refused_stop(train, vue):
    send(train, "running", started(), step(1))
    button = train.driver.find_element("css selector", "[data-qrlora-train] button")
    train.js("arguments[0].focus()", button)
    assert button.get_property("tabIndex") == 0
    button.send_keys(Keys.ENTER)
    train.wait("return qrloraTest.posted.length")
    assert train.js("return qrloraTest.posted") == [{"node": number(train)}]
    shown = panel(train)
    assert shown["state"] == "stopping" and "queueing again resumes" in shown["text"] and not button.is_enabled()
    send(train, "stopped", {"event": "stopped", "time": 9, "step": 7, "checkpoint": "c"}, text="stopped")
    assert "Queue again to go on from step 7." in panel(train)["text"]
    send(train, "running", started(first=7), step(8))
    assert panel(train)["state"] == "running" and button.is_enabled()
    train.js("qrloraTest.refusal = 'this node is not training'")
    button.click()
    train.wait(f"return {PANEL}.innerText.includes('this node is not training')")
    assert panel(train)["state"] == "running" and button.is_enabled(), "it can be pressed again"


@RENDERERS
def test_inside_a_subgraph(train, vue):
    train.js(f"app.canvas.graph.convertToSubgraph(new Set([{TRAIN}]))")
    host, inner = train.js("const host = app.graph.nodes[0]; return [host.id, host.subgraph.nodes[0].id].map(String)")
    send(train, "running", started(), step(5), node=f"{host}:{inner}")
    send(train, "running", started(), step(999), node=inner if inner != host else "77")  # of another graph
    train.js("const host = app.graph.nodes[0]; app.canvas.openSubgraph(host.subgraph, host)")
    train.wait(f"return {PANEL}?.getBoundingClientRect().height > 100")
    assert panel(train)["step"] == "5"
    train.js(f"{PANEL}.querySelector('button').click()")
    train.wait("return qrloraTest.posted.length")
    assert train.js("return qrloraTest.posted") == [{"node": f"{host}:{inner}"}]


def test_text_stays_text(train):
    bad = "<img src=x onerror='window.broken=1'><script>window.broken=1</script>"
    send(train, "running", started(), phase(bad), step(3), text=bad, run=f"{bad}-0123")
    send(train, "failed", {"event": "failed", "time": 1, "reason": bad, "message": bad}, text=bad, run=f"{bad}-0123")
    assert bad in train.js(f"return {PANEL}.textContent")
    assert train.js(f"return {PANEL}.querySelectorAll('img, script').length") == 0
    assert not train.js("return window.broken")
    for odd in (
        {},
        {"node": number(train)},
        {"node": number(train), "run": "r", "events": [None, {}, {"event": "step"}, {"event": "new"}]},
    ):
        train.js("window.comfyAPI.api.api.dispatchCustomEvent('qrlora.train', arguments[0])", odd)
    assert train.errors() == []


def test_a_run_of_another_workflow_is_not_shown(train):
    train.js("""
        const { api } = window.comfyAPI.api;
        const fetchApi = api.fetchApi;
        const entry = (prompt, id) => [0, prompt, {}, { extra_pnginfo: { workflow: { id } } }];
        const queue = { queue_running: [entry("mine", app.graph.id), entry("theirs", "other")], queue_pending: [] };
        api.fetchApi = (path, options) =>
          path === "/queue" ? Promise.resolve(new Response(JSON.stringify(queue))) : fetchApi(path, options);
    """)
    send(train, "running", started(), step(40), prompt="theirs")
    train.js("return new Promise((done) => setTimeout(done, 300))")
    assert panel(train)["state"] == "idle"
    send(train, "running", started(), step(41), prompt="mine")
    train.wait(f"return {PANEL}.dataset.step === '41'")


def test_nothing_of_it_is_in_the_workflow(train):
    clean = train.js(f"return JSON.stringify({TRAIN}.serialize().widgets_values)")
    send(train, "running", started(), *map(step, range(1, 50)), text="nowhere-else")
    saved, prompt = train.js("return app.graphToPrompt().then((made) => [made.workflow, made.output])")
    assert json.dumps(saved["nodes"][0]["widgets_values"]) == json.dumps(json.loads(clean))
    assert "qrlora_train" not in prompt[number(train)]["inputs"]
    assert "nowhere-else" not in json.dumps([saved, prompt]) and "0123456789ab" not in json.dumps([saved, prompt])


def luminance(colour):
    """WCAG relative luminance of (red, green, blue) from 0 to 1."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_readable_in_every_palette(train):
    """Contrast by WCAG: 4.5 for text, 3 for what is drawn; blue and orange differ for every kind of colour vision."""
    send(train, "running", started(), *map(step, range(1, 50)), {"event": "validation", "step": 9, "loss": 0.5})
    least = {"text": 4.5, "labels": 4.5, "button": 4.5, "smoothed": 3.0, "validation": 3.0, "raw": 2.0}
    for palette in PALETTES:
        found = contrasts(train, palette)
        assert all(found[name] >= limit for name, limit in least.items()), (palette, found)


def contrasts(train, palette):
    """Contrast of everything in the panel with its background, once the page wears a palette."""
    train.js("return app.extensionManager.setting.set('Comfy.ColorPalette', arguments[0])", palette)
    colours = train.js(f"""
        const pixel = document.createElement("canvas").getContext("2d", {{ willReadFrequently: true }});
        const rgb = (colour) => {{
          pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1);
          return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255);
        }};
        const back = getComputedStyle({PANEL}).backgroundColor;
        const over = (element, name) => {{ rgb(back); return rgb(getComputedStyle(element)[name]); }};
        const one = (selector) => {PANEL}.querySelector(selector);
        return {{
          back: rgb(back), text: over(one("strong"), "color"), labels: over(one("svg text"), "fill"),
          button: over(one("button"), "color"), raw: over(one("[data-series=raw]"), "stroke"),
          smoothed: over(one("[data-series=smoothed]"), "stroke"),
          validation: over(one("[data-series=validation]"), "stroke"),
        }};
    """)
    back = colours.pop("back")
    return {name: round(contrast(colour, back), 2) for name, colour in colours.items()}
