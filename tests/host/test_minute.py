"""The template QR-LoRA in a minute, as it ships: from its file to pictures, and what a page shows before Run."""

import json

import numpy as np
import pytest
from PIL import Image

from demo import minute
from demo.concepts import read_picture
from demo.pictures import BARRED, HEART, SUNSET
from demo.reader import read
from demo.workflow import prompt_of
from tests.host import browser

TEMPLATE = minute.FOLDER / f"{minute.NAME}.json"
WINDOW = (1920, 1080)
EXAMPLE = "app.graph.nodes.find((one) => one.type === 'QRLoRAContactSheet')"


@pytest.fixture(scope="module")
def saved():
    return json.loads(TEMPLATE.read_text(encoding="utf-8"))


def picture_of(server, entry, node):
    shown = entry["outputs"][node]["images"][0]
    return server.base / shown["type"] / shown["subfolder"] / shown["filename"]


def test_its_prompt_as_it_ships_draws_what_its_thumbnail_shows(server, saved):
    prompt = prompt_of(saved, server.get("/object_info"))
    assert not any(one["class_type"].endswith("Loader") for one in prompt.values()), "nothing to download"
    entry = server.queue(prompt)
    nodes = {one["class_type"]: name for name, one in prompt.items()}
    sheet = Image.open(picture_of(server, entry, nodes["QRLoRAContactSheet"])).convert("RGB")
    thumbnail = Image.open(TEMPLATE.with_suffix(".jpg")).convert("RGB")
    sheet.thumbnail(minute.THUMBNAIL)
    assert sheet.size == thumbnail.size
    difference = np.abs(np.asarray(sheet, dtype=float) - np.asarray(thumbnail, dtype=float))
    assert difference.mean() < 8, (
        "as a JPEG of a small size, and drawn by another processor; renew it with python -m demo.minute"
    )
    (seen,) = read(read_picture(picture_of(server, entry, nodes["PreviewImage"])))
    assert seen == (HEART, SUNSET, BARRED), "both adapters show"


def test_the_registrys_archive_is_enough(bare_server, saved):
    """Installed from the archive, without diffusers, accelerate and matplotlib: every node runs, for one cell."""
    assert not (bare_server.base / "custom_nodes" / "qr-lora" / "tests").exists()
    prompt = prompt_of(saved, bare_server.get("/object_info"))
    (sweep,) = (one["inputs"] for one in prompt.values() if one["class_type"] == "QRLoRAScaleSweep")
    sweep |= {"alphas": "1", "betas": "1"}
    entry = bare_server.queue(prompt)
    shown = {prompt[name]["class_type"] for name, one in entry["outputs"].items() if "images" in one}
    assert shown == {"QRLoRAContactSheet", "PreviewImage"}


@pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO)
@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_it_shows_its_picture_before_run_and_needs_one_click(server, page, saved, vue):
    browser.set_settings(server, {"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": "light" if vue else "dark"})
    page.open()
    page.load_template(TEMPLATE.stem)
    page.wait("return app.graph.nodes.length === arguments[0]", 30, len(saved["nodes"]))
    page.wait("return document.querySelector('figure img')?.naturalWidth > 0")
    before = page.js(f"return [...{EXAMPLE}.pos, ...{EXAMPLE}.size]")
    inside = page.js(
        """
        const [width, height] = [window.innerWidth, window.innerHeight];
        return app.graph.nodes.map((node) => {
          const [left, top] = app.canvas.ds.convertOffsetToCanvas(node.pos);
          return left >= 0 && top >= 0 && left + node.size[0] * app.canvas.ds.scale <= width;
        });
        """
    )
    assert all(inside), "the page opens on everything"
    made = page.js("return app.graphToPrompt().then((made) => made.output)")
    assert "qrlora_example" not in json.dumps(made), "the picture is no input"
    assert page.js("return app.queuePrompt(0, 1)")
    page.wait("return !document.querySelector('figure img')", 90)
    page.wait(f"return app.nodeOutputs[{EXAMPLE}.id]?.images?.length", 30)
    assert page.js(f"return [...{EXAMPLE}.pos, ...{EXAMPLE}.size]") == before, "the graph moved"
    assert page.errors() == []


def test_a_property_names_a_picture_of_this_pack_and_nothing_else(server):
    script = (minute.PACK / "web" / "qrlora_example.js").read_text(encoding="utf-8")
    assert r"/^[a-z_]+\.jpg$/" in script and "innerHTML" not in script
    assert (minute.PACK / "web" / minute.PICTURE).is_file()
