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

from demo import in_comfyui, minute
from demo import judge as judging
from demo import story as demo
from demo.concepts import ACT, CONTENT, FIT, MORE, PACK, PAIRS, STYLE, SUM, draw_picture, read_picture
from demo.fused import Fused
from demo.graph import demo_page, graph
from demo.judge import Row, experiments, summary, verdict
from demo.model import patched, sample
from demo.noise import distances
from demo.pictures import BARRED, HEART, SUNSET
from demo.reader import LOOKS, looks_with, read
from demo.toy.features import text_features
from demo.toy.files import FOLDER
from qrlora_core import MergeRecipe, merge_acting, merged_adapter, open_adapter
from qrlora_plots import contact_sheet
from tests.warm import warm_python


class Told(NamedTuple):
    """A demo's folder, its exit code, what it printed, and labels and pictures of its sheet."""

    out: Path
    code: int
    printed: str
    sheet: tuple


def shorten(patch, grid):
    """A sheet of a smaller grid, and all experiments with two prompts each; trainers are forked where that can be."""
    for name in ("content_prompts", "style_prompts", "plain_prompts"):
        prompts, looks = getattr(judging, name)()
        patch.setattr(judging, name, lambda found=(prompts[:2], looks[:2]): found)
    patch.setattr(demo, "GRID", grid)
    patch.setattr(sys, "executable", warm_python(purpose="demo"))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The story by its own command line, in four steps of each training: enough to change what is drawn."""
    out = tmp_path_factory.mktemp("demo")
    (out / "toy_style.safetensors").write_bytes(b"of an earlier demo, which is replaced")
    drawn, draw = [], demo.grid_pictures

    def grid_pictures(*given):
        drawn.append(draw(*given))
        return drawn[-1]

    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        shorten(patch, "0, 0.5, 1")
        patch.setattr(demo, "grid_pictures", grid_pictures)
        code = demo.main(["--headless", "--out", str(out), "--steps", "4", "--pictures", "1"])
    (sheet,) = drawn
    return Told(out, code, printed.getvalue(), sheet)


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
def test_the_sheet_has_a_labelled_cell_for_every_alpha_and_beta(told, adapters):
    labels, pictures = told.sheet
    assert labels == [f"alpha={a}, beta={b}" for a in ("0", "0.5", "1") for b in ("0", "0.5", "1")]
    sheet = contact_sheet(pictures, labels)
    assert sheet.row_labels == ("alpha = 0", "alpha = 0.5", "alpha = 1")
    assert sheet.column_labels == ("beta = 0", "beta = 0.5", "beta = 1")
    boxes = [cell.box for cell in sheet.cells]
    assert sheet.image.width > 3 * (boxes[0][2] - boxes[0][0]) and sheet.image.height > 3 * (boxes[0][3] - boxes[0][1])
    cells = [np.asarray(sheet.image.crop(box)).tobytes() for box in boxes]
    assert len(set(cells)) == 9, "every pair of alpha and beta gives another picture"
    of = dict(zip(labels, pictures))
    again = zip(*demo.grid_pictures(demo.load_toy(), adapters, "0.5, 1"))
    assert [picture.tobytes() == of[label].tobytes() for label, picture in again] == [True] * 4


@pytest.mark.process
def test_it_writes_sheet_similarity_and_numbers_and_ends_with_what_it_found(told):
    assert told.code == 1, "four steps teach nothing"
    rows = json.loads((told.out / demo.NUMBERS).read_text())
    assert [row["title"] for row in rows] == [one.name for one in experiments()]
    assert all(row["title"] in told.printed for row in rows) and "Neither adapter" in told.printed
    assert "more --steps may help" in told.printed
    assert Image.open(told.out / demo.SHEET).width > 3 * 160
    assert Image.open(told.out / demo.BESIDE).height > 4 * 128
    assert Image.open(told.out / demo.SIMILARITY).size == (1600, 2300)


def test_every_prompt_of_the_experiments_can_be_drawn_and_judged():
    """That of all of them some pictures are drawn and read is in the stories."""
    asked = {prompt: look for one in experiments() for prompt, look in zip(one.prompts, one.looks, strict=True)}
    assert len(asked) == 23 + 5 + 1 + 7
    known = [set(words) | {""} for words in zip(*LOOKS)]
    for prompt, look in asked.items():
        features, pooled = text_features(prompt)
        assert features.any() and pooled.any()
        assert all(word in words for word, words in zip(look, known)), look


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


@pytest.fixture(scope="module")
def shipped():
    return demo.Adapters(*(open_adapter(FOLDER / f"{one.name}.safetensors") for one in (STYLE, CONTENT)))


def merged(adapters, alpha, beta, act):
    return merge_acting(MergeRecipe.of(adapters.style), alpha, MergeRecipe.of(adapters.content), beta, act=act)


def test_a_plain_sum_beside_the_weights_is_one_in_the_weights(shipped):
    model, recipe = demo.load_toy(), merged(shipped, 0.7, -0.4, SUM)
    prompts, seeds = ["a <c> in <s> style", "a ring in blue plain style"], [1, 2]
    wanted = sample(patched(model, merged_adapter(recipe)), prompts, seeds, steps=4)
    found = Fused(model, shipped).sample(recipe, prompts, seeds, steps=4)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_each_prompt_of_a_batch_meets_the_adapters_that_it_asks_for(shipped):
    model = demo.load_toy()
    fused = Fused(model, shipped)
    prompts = ["a <c> in <s> style", "a <c> in blue dotted style", "a ring in green checked style"]
    drawn = fused.sample(merged(shipped, 1, 1, ACT), prompts, [5, 5, 5], steps=4)
    content = fused.sample(merged(shipped, 0, 1, SUM), prompts, [5, 5, 5], steps=4)
    none = sample(model, prompts, [5, 5, 5], steps=4)
    np.testing.assert_allclose(drawn[1], content[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(drawn[2], none[2], rtol=0, atol=1e-4)
    always = fused.sample(merged(shipped, 1, 2, "always, one pass each"), prompts[:1], [5], steps=4)
    np.testing.assert_allclose(drawn[0], always[0], rtol=0, atol=1e-4)  # content counts twice beside a style
    assert float((drawn[0] - fused.sample(merged(shipped, 1, 1, SUM), prompts[:1], [5], steps=4)[0]).abs().max()) > 0.1


def test_the_sheets_corner_is_its_best_picture(shipped):
    """By the distance to the drawing of both; from the noise of the demo and of the template."""
    assert demo.SEED == minute.SEED
    fused = Fused(demo.load_toy(), shipped)
    found = {
        (alpha, beta): fused.sample(merged(shipped, alpha, beta, ACT), [demo.MERGED_PROMPT], [demo.SEED])
        for alpha in (0.5, 0.75, 1)
        for beta in (0.25, 0.5, 0.75, 1)
    }
    far = {place: float(distances(picture, PAIRS["heart-sunset"].look)) for place, picture in found.items()}
    assert min(far, key=far.get) == (1, 1), far
    assert read(found[1, 1]) == [PAIRS["heart-sunset"].look]


def test_every_pair_is_drawn_apart_and_read(tmp_path):
    """Among all that any pair could be read as, which is more than a pair's own reader chooses from."""
    assert len(PAIRS) == 25 and next(iter(PAIRS.values())) == (STYLE, CONTENT)
    concepts = {concept.name: concept for pair in PAIRS.values() for concept in pair}
    contents = {pair.content.name for pair in PAIRS.values()}
    assert len(contents) == 5 and len(concepts) == 10
    looks = tuple(dict.fromkeys(look for pair in PAIRS.values() for look in looks_with(pair.look)))
    for name, concept in concepts.items():
        (seen,) = read(read_picture(draw_picture(concept, tmp_path)), looks)
        assert seen == concept.look, name
        assert concept.words


@pytest.mark.process
def test_another_pair_is_trained_and_judged(tmp_path, capsys, monkeypatch):
    shorten(monkeypatch, "1")
    code = demo.main(["--headless", "--pair", "tee-brown", "--out", str(tmp_path), "--steps", "2", "--pictures", "1"])
    assert code == 1 and "toy_content_tee" in capsys.readouterr().out
    for name, look in (
        ("toy_content_tee", ("tee", "red", "plain")),
        ("toy_style_brown", ("circle", "brown", "blocks")),
    ):
        assert open_adapter(tmp_path / f"{name}.safetensors").metadata["qrlora.steps"] == "2"
        assert read(read_picture(tmp_path / f"{name}.png"), looks_with(PAIRS["tee-brown"].look)) == [look]
    rows = json.loads((tmp_path / demo.NUMBERS).read_text())
    assert [row["title"] for row in rows] == [one.name for one in experiments()]


def test_a_pair_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--pair", "heart"])
    assert "heart-sunset" in capsys.readouterr().err


def test_the_two_concepts_are_what_the_reader_calls_new():
    assert CONTENT.look.shape == HEART and STYLE.look[1:] == (SUNSET, BARRED)
