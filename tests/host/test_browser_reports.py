"""What the nodes say in the real page: reports, errors, nothing of a node that is bypassed; and how they are found."""

import json
import os
import re
import shutil

import pytest
from selenium.webdriver.common.keys import Keys

from demo.server import GOLDEN, PACK
from demo.workflow import editable
from tests.host import browser, training
from tests.host.training import node, train_graph

pytestmark = [
    pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO),
    pytest.mark.skipif(os.name == "nt", reason="the fake trainer is started by a shell script"),
]

RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
PANEL = "document.querySelector('[data-qrlora-train]')"
BYPASSED, ACTIVE = 4, 0
WINDOW = (1900, 1500)


@pytest.fixture(autouse=True)
def quick_steps(fake):
    """The fake trainer, as the tests of errors need it."""


def opened(page, graph, vue):
    """The graph in the page, in one of the renderers, light or dark."""
    page.fresh({"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": "light" if vue else "dark"})
    page.load(editable(graph, page.server.get("/object_info")))
    page.js("app.canvas.ds.scale = 0.8; app.canvas.ds.offset = [100, 80]; app.canvas.setDirty(true, true)")


def run(page):
    """What the Run button does, and wait until the server is done."""
    assert page.js("return app.queuePrompt(0, 1)")
    page.wait(
        "return fetch('/queue').then((answer) => answer.json())"
        ".then((queue) => !queue.queue_running.length && !queue.queue_pending.length)",
        60,
    )


def report(page, kind):
    """Text and colour of the report box of the first node of a kind, "" when there is none."""
    return page.js(
        """
        const node = app.graph.nodes.find((one) => one.type === arguments[0]);
        const box = node.widgets?.find((one) => one.name === "qrlora_report")?.element;
        return [box?.textContent ?? "", box ? getComputedStyle(box).color : ""];
        """,
        kind,
    )


def reported(page, kind, word):
    return page.wait(
        """
        const node = app.graph.nodes.find((one) => one.type === arguments[0]);
        const text = node.widgets?.find((one) => one.name === "qrlora_report")?.element.textContent ?? "";
        return text.includes(arguments[1]) && text;
        """,
        30,
        kind,
        word,
    )


def set_mode(page, kind, mode):
    page.js("app.graph.nodes.find((one) => one.type === arguments[0]).mode = arguments[1]", kind, mode)


def merge_graph(alpha=1.0, content="official_content.safetensors"):
    return {
        "style": node("QRLoRALoadDeltaR", delta_r_name="official_style.safetensors"),
        "content": node("QRLoRALoadDeltaR", delta_r_name=content),
        "merge": node(
            "QRLoRAMerge",
            delta_r_style=["style", 0],
            alpha=alpha,
            delta_r_content=["content", 0],
            beta=1.0,
            on_basis_mismatch="stack",
        ),
        "save": node("QRLoRASaveDeltaR", delta_r=["merge", 0], filename="reported", format="portable"),
    }


def test_the_panel_speaks_the_language_of_the_page(server, page):
    """Of a page that is opened in a language, and after each change of it."""
    page.fresh({"Comfy.Locale": "zh", "Comfy.VueNodes.Enabled": True})
    page.load(editable(train_graph("words"), server.get("/object_info")))
    said = f"return {PANEL}?.innerText.includes(arguments[0])"
    page.wait(said, 30, "\u5c1a\u672a\u8bad\u7ec3")
    for locale, words in (("ja", "\u672a\u5b66\u7fd2"), ("en", "Not trained yet")):
        page.js("return app.extensionManager.setting.set('Comfy.Locale', arguments[0])", locale)
        page.wait(said, 30, words)
    page.spoil()  # the front end may still be at work on the last change


@RENDERERS
def test_an_error_stands_on_the_node_until_it_runs_again(server, page, vue):
    name = f"changing {vue}.safetensors"
    path = server.base / "models" / "qrlora" / name
    good = GOLDEN / "official_content.safetensors"
    shutil.copy(good, path)
    graph = merge_graph(content=name)
    graph = {"content": graph["content"], **graph}  # the first node of its kind is the one that fails
    opened(page, graph, vue)
    run(page)
    reported(page, "QRLoRALoadDeltaR", "rank 8")
    _, plain = report(page, "QRLoRALoadDeltaR")
    path.write_bytes(b"no adapter at all")
    run(page)
    text = reported(page, "QRLoRALoadDeltaR", "FileFormatError")
    assert text.startswith("FileFormatError: ") and "qrlora_core" not in text and "rank 8" not in text
    assert report(page, "QRLoRALoadDeltaR")[1] != plain, "an error looks like a report"
    page.js("return app.loadGraphData(app.graph.serialize()).then(() => null)")  # as undo does
    reported(page, "QRLoRALoadDeltaR", "FileFormatError")
    shutil.copy(good, path)
    os.utime(path, (1e9, 1e9))  # the same content at another time
    run(page)
    reported(page, "QRLoRALoadDeltaR", "rank 8")
    assert report(page, "QRLoRALoadDeltaR")[1] == plain
    assert page.errors() == []


@RENDERERS
def test_a_bypassed_merge_says_nothing(server, page, vue):
    opened(page, merge_graph(alpha=0.5 + vue / 10), vue)
    run(page)
    text = reported(page, "QRLoRAMerge", "15 layers")
    set_mode(page, "QRLoRAMerge", BYPASSED)
    page.js("app.graph.nodes.find((one) => one.type === 'QRLoRASaveDeltaR').widgets[0].value = arguments[0]", f"b{vue}")
    run(page)
    page.wait(
        "return app.graph.nodes.find((one) => one.type === 'QRLoRAMerge').widgets.at(-1).element.textContent === ''"
    )
    set_mode(page, "QRLoRAMerge", ACTIVE)
    run(page)
    assert reported(page, "QRLoRAMerge", "15 layers") == text, "of a merge that the server has cached"
    assert page.errors() == []


@RENDERERS
def test_an_error_before_the_trainer_starts_is_on_the_panel(server, page, vue):
    dataset = server.base / "input" / f"set {vue}"
    dataset.mkdir()
    (dataset / "a.png").write_bytes(b"no picture")
    opened(page, train_graph(f"panel {vue}", dataset=dataset.name, images=None, steps=5), vue)
    run(page)
    page.wait(f"return {PANEL}.dataset.state === 'failed'")
    text = page.js(f"return {PANEL}.innerText")
    assert "DatasetError: the picture a.png cannot be read" in text and "nodes.training" not in text

    training.picture((64, 64), 1).save(dataset / "a.png")
    run(page)
    page.wait(f"return {PANEL}.dataset.state === 'finished'", 60)
    assert "DatasetError" not in page.js(f"return {PANEL}.innerText")
    (dataset / "a.png").write_bytes(b"no picture again")
    run(page)
    page.wait(f"return {PANEL}.dataset.state === 'failed'")
    assert "finished:" not in page.js(f"return {PANEL}.innerText"), "the success before is not shown any more"
    assert page.errors() == []


@RENDERERS
def test_an_adapter_is_described_as_soon_as_it_is_chosen(server, page, vue):
    """Facts, picture, and what is wrong with the file, without a run."""
    folder = server.base / "models" / "qrlora"
    training.picture((64, 64), 3).save(folder / "official_style.preview.png")
    (folder / "no adapter.safetensors").write_bytes(b"nothing")
    opened(page, {"style": node("QRLoRALoadDeltaR", delta_r_name="official_content.safetensors")}, vue)
    reported(page, "QRLoRALoadDeltaR", "rank 8")
    size = page.js("return [...app.graph.nodes[0].size]")
    choose = """
        const widget = app.graph.nodes[0].widgets.find((one) => one.name === "delta_r_name");
        widget.value = arguments[0];
        widget.callback?.(widget.value);
    """
    image = "app.graph.nodes[0].widgets.find((one) => one.name === 'qrlora_report').element.querySelector('img')"
    assert page.js(f"return {image} === null")
    page.js(choose, "official_style.safetensors")
    page.wait(f"return {image}?.naturalWidth === 64")
    page.js(choose, "no adapter.safetensors")
    assert "FileFormatError" in reported(page, "QRLoRALoadDeltaR", "not a readable safetensors file")
    assert page.js(f"return {image} === null") and page.js("return [...app.graph.nodes[0].size]") == size
    (folder / "no adapter.safetensors").unlink()
    (folder / "official_style.preview.png").unlink()
    assert page.errors() == []


@RENDERERS
def test_a_first_run_makes_no_node_grow(server, page, vue):
    """Nodes as they are when they are put into a graph, one below the other."""
    opened(page, merge_graph(alpha=0.25 + vue / 10), vue)
    page.js("for (const node of app.graph.nodes) node.setSize(node.computeSize())")
    sizes = "app.graph.nodes.map((node) => [node.type, ...[...node.size].map(Math.round)])"

    def settled():
        """The sizes, once they have been the same for a second: the new renderer lays out when it has time."""
        return page.driver.execute_async_script(
            f"""
            const done = arguments[0];
            let [before, since] = ["", performance.now()];
            const look = () => {{
              const now = JSON.stringify({sizes});
              if (now !== before) [before, since] = [now, performance.now()];
              if (performance.now() - since > 1000) return done(JSON.parse(now));
              requestAnimationFrame(look);
            }};
            look();
            """
        )

    before = settled()
    run(page)
    reported(page, "QRLoRAMerge", "15 layers")
    reported(page, "QRLoRASaveDeltaR", "reported")
    assert settled() == before
    page.js(
        "for (const node of app.graph.nodes)"
        "  node.widgets.find((one) => one.name === 'qrlora_report').element.textContent = 'a long report '.repeat(200)"
    )
    assert settled() == before, "what is long scrolls"


def test_every_sentence_of_the_page_is_translated():
    """Each text that the scripts ask for, in each language, with the same values in it; and none too many."""
    words = json.loads((PACK / "web" / "qrlora_words.json").read_text(encoding="utf-8"))
    scripts = "".join(path.read_text(encoding="utf-8") for path in sorted((PACK / "web").glob("*.js")))
    for language, sentences in words.items():
        for english, sentence in sentences.items():
            assert f'"{english}"' in scripts or f"{english}:" in scripts, f"{language}: nobody says {english!r}"
            assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", sentence)), sentence
        asked = set(re.findall(r'translated\("([^"]+)"', scripts))
        assert asked <= sentences.keys(), asked - sentences.keys()
    assert words["zh"].keys() == words["ja"].keys()


SEARCHES = {
    "delta": "Merge \u0394R",
    "delta r": "Load \u0394R Adapter",
    "merge delta": "Merge \u0394R",
    "train lora": "Train \u0394R",
    "create hook": "Create Hook \u0394R",
    "qr-lora": "Apply QR-LoRA",
    "qr lora": "Apply QR-LoRA",
    "save lora": "Export as LoRA",
    "train delta": "Train \u0394R",
    "block weight": "\u0394R Block Scale",
}


def test_the_search_of_nodes_finds_ours(server, page):
    """In the page's own search box, by what people type who have no Greek letters."""
    page.fresh()
    page.js("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait("return document.querySelector('input[role=combobox]')")
    box = page.driver.find_element("css selector", "input[role=combobox]")
    missing = {}
    for words, title in SEARCHES.items():
        box.send_keys(Keys.CONTROL, "a")
        page.driver.execute_cdp_cmd("Input.insertText", {"text": words})  # as one that is pasted, not letter by letter
        shown = "[...document.querySelectorAll('[role=option]')].map((one) => one.innerText.split('\\n')[0])"
        try:
            page.wait(f"return {shown}.includes(arguments[0])", 3, title)
        except TimeoutError:
            missing[words] = page.js(f"return {shown}")
    assert not missing
