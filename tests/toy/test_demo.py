"""The demo without ComfyUI, shortened: both trainings by the trainer's own command, sheet, similarity, numbers."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from demo import in_comfyui
from demo import story as demo
from demo.concepts import CONTENT, FIT, MORE, PACK, STYLE, read_picture
from demo.graph import demo_page, graph
from demo.judge import Row, experiments, summary, verdict
from demo.pictures import BARRED, HEART, SUNSET
from demo.reader import read
from qrlora_plots import contact_sheet


class Told(NamedTuple):
    """A demo's folder, its exit code, and what it printed."""

    out: Path
    code: int
    printed: str


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The story by its own command line, in four steps of each training: enough to change what is drawn."""
    out = tmp_path_factory.mktemp("demo")
    (out / "toy_style.safetensors").write_bytes(b"of an earlier demo, which is replaced")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = demo.main(["--headless", "--out", str(out), "--steps", "4", "--pictures", "1"])
    return Told(out, code, printed.getvalue())


@pytest.fixture(scope="module")
def adapters(told):
    return demo.opened(told.out)


@pytest.mark.process
def test_both_adapters_are_trained_on_one_picture_each(told, adapters):
    for concept, adapter in ((STYLE, adapters.style), (CONTENT, adapters.content)):
        assert len(adapter.layers) == 36 and adapter.method == "delta_r_triangular"
        assert adapter.metadata["qrlora.steps"] == "4" and adapter.metadata["qrlora.trigger"] == concept.trigger
        assert any(adapter.layer(name).down.abs().max() > 0 for name in adapter.layers)
        assert read(read_picture(told.out / f"{concept.name}.png")) == [concept.look]


@pytest.mark.process
def test_the_sheet_has_a_labelled_cell_for_every_alpha_and_beta(adapters):
    model = demo.load_toy()
    labels, pictures = demo.grid_pictures(model, adapters, "0, 0.5, 1")
    assert labels == [f"alpha={a}, beta={b}" for a in ("0", "0.5", "1") for b in ("0", "0.5", "1")]
    sheet = contact_sheet(pictures, labels)
    assert sheet.row_labels == ("alpha = 0", "alpha = 0.5", "alpha = 1")
    assert sheet.column_labels == ("beta = 0", "beta = 0.5", "beta = 1")
    boxes = [cell.box for cell in sheet.cells]
    assert sheet.image.width > 3 * (boxes[0][2] - boxes[0][0]) and sheet.image.height > 3 * (boxes[0][3] - boxes[0][1])
    cells = [np.asarray(sheet.image.crop(box)).tobytes() for box in boxes]
    assert len(set(cells)) == 9, "every pair of alpha and beta gives another picture"
    again = demo.grid_pictures(model, adapters, "0, 0.5, 1")[1]
    assert all(one.tobytes() == other.tobytes() for one, other in zip(pictures, again))


@pytest.mark.process
def test_it_writes_sheet_similarity_and_numbers_and_ends_with_what_it_found(told):
    assert told.code == 1, "four steps teach nothing"
    rows = json.loads((told.out / demo.NUMBERS).read_text())
    assert [row["title"] for row in rows] == [one.name for one in experiments()]
    assert all(row["title"] in told.printed for row in rows) and "Neither adapter" in told.printed
    assert Image.open(told.out / demo.SHEET).width > 5 * 160
    assert Image.open(told.out / demo.SIMILARITY).size == (1600, 2300)


class StandIn:
    """A ComfyUI that is there at once."""

    url = "http://127.0.0.1:8188"

    def __init__(self, host, base, log):
        self.base, self.log = base, log
        log.write_text("its log")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def get(self, path):
        return {"QRLoRATrain": {}}


def test_in_comfyui_the_address_comes_first_and_the_log_stays(tmp_path, monkeypatch, capsys):
    printed_before_training = []

    def queued(*_, **__):
        printed_before_training.append(capsys.readouterr().out)
        return {}

    monkeypatch.setattr(in_comfyui, "Server", StandIn)
    monkeypatch.setattr(in_comfyui, "queued", queued)
    for name in ("offer_page", "collect"):
        monkeypatch.setattr(in_comfyui, name, lambda *_: None)
    arguments = (Path("a ComfyUI"), tmp_path, {"steps": 1}, 0, "0, 1", lambda: None, lambda: True)
    assert in_comfyui.run(*arguments, wait=False)
    (before,) = printed_before_training
    assert before.startswith("page     http://127.0.0.1:8188/?template=")
    assert "ComfyUI ends with the demo" in before and "ComfyUI ends now" in capsys.readouterr().out
    assert (tmp_path / "comfyui.log").read_text() == "its log" and str(tmp_path / "comfyui.log") in before


def test_a_node_that_fails_ends_the_demo_with_its_sentence(tmp_path, monkeypatch, capsys):
    error = {
        "node_type": "QRLoRATrain",
        "exception_message": "training needs more memory\n",
        "traceback": ["long"] * 99,
    }
    messages = [["execution_start", {}], ["execution_error", error]]

    def failing(*_, **__):
        raise in_comfyui.WorkflowError(in_comfyui.reason(messages))

    monkeypatch.setenv("COMFYUI_PATH", "what main() puts there goes again")
    monkeypatch.setattr(demo, "installed_host", lambda: Path("a ComfyUI"))
    monkeypatch.setattr(in_comfyui, "run", failing)
    assert demo.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "QRLoRATrain: training needs more memory" in said and "long" not in said and "comfyui.log" in said
    assert in_comfyui.reason([["execution_interrupted", {}]]) == "interrupted"


def test_every_node_of_the_demos_page_stands_in_a_group_with_one_note():
    """Page and groups without a host: every kind of node as one without inputs of its own."""
    workflow = graph({**FIT, **MORE}, 3, "0, 1")
    outputs = {"output": ["X"] * 5, "output_name": list("abcde")}
    info = {
        one["class_type"]: {
            "input": {"required": {key: ["X", {}] for key, value in one["inputs"].items() if isinstance(value, list)}},
            **outputs,
        }
        for one in workflow.values()
    }
    made = demo_page(workflow, info)
    assert [one["type"] for one in made["nodes"]].count("MarkdownNote") == 1
    for node in made["nodes"]:
        inside = [group for group in made["groups"] if within(node, group["bounding"])]
        assert len(inside) == 1, node["type"]
    assert {node.get("title") for node in made["nodes"]} >= {"Style: <s>", "Content: <c>", "The sheet"}
    with pytest.raises(ValueError, match="in no group"):
        demo_page({**workflow, "stray": workflow["clip"]}, info)


def within(node, bounding):
    (x, y), (width, height) = node["pos"], node["size"]
    left, top, across, down = bounding
    return left <= x and x + width <= left + across and top <= y and y + height <= top + down


@pytest.mark.process
def test_what_libraries_say_about_themselves_is_not_printed():
    code = "from demo.model import load_toy, new_model; load_toy(), new_model()"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACK, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.process
def test_what_the_trainer_refuses_ends_the_demo(tmp_path, capfd):
    assert demo.main(["--headless", "--out", str(tmp_path), "--steps", "0"]) == 2
    assert "steps" in capfd.readouterr().err


@pytest.mark.parametrize(("content", "style", "good"), [(1.0, 1.0, True), (0.8, 1.0, False), (1.0, 0.8, False)])
def test_the_verdict_needs_both_adapters(content, style, good):
    rows = []
    for one in experiments():
        shows = content if one.beta and "<c>" in one.title else 0.0, style if one.alpha and "<s>" in one.title else 0.0
        rows.append(Row(one.name, 10, *shows, rest=1.0))
    assert verdict(rows) is good
    assert f"{content:.0%}" in summary(rows)
    shown_without = [row._replace(content=0.5) if row.title.endswith("alpha 0, beta 0") else row for row in rows]
    assert not verdict(shown_without)


def test_the_two_concepts_are_what_the_reader_calls_new():
    assert CONTENT.look.shape == HEART and STYLE.look[1:] == (SUNSET, BARRED)
