"""Everything that can go wrong with a trainer, on the real server: the node says what, nothing is left, work goes on.

The trainer is the fake one, started as the owner's interpreter; the graph's CLIP and VAE, the queue, Cancel, the run
folders and the published names are real.
"""

import contextlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
from PIL import Image

from demo.server import PACK, WorkflowError
from tests.host import training
from tests.host.training import (
    adapter_names,
    children,
    interrupt,
    light_graph,
    runs,
    state,
    text_of,
    train_node,
    wait_for,
)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the fake trainer uses signals and limits of POSIX")
MERGE = json.loads((PACK / "tests" / "workflows" / "merge_api.json").read_text())


@pytest.fixture(autouse=True)
def clean(fake):
    yield
    assert not children(fake), "a process is left"
    left = [path for path in fake.base.rglob("*") if path.name.endswith(".tmp") and path.name != "checkpoints.tmp"]
    assert not left, "a half-written file is left"


def usable(server):
    """Another workflow with the same server: the golden merge."""
    return server.queue(MERGE)["status"]["completed"]


def running_step(job):
    return job["state"] == "running" and any(event["event"] == "step" for event in job["events"])


FAILURES = {
    "crash": ["crashed after step 1", "the fake trainer broke", "checkpoint of step 1 is kept"],
    "failed": ["the loss is NaN at step 7; lower learning_rate"],
    "killed": ["was killed after step 1", "RAM runs out"],
    "memory": ["Out of memory after step 1", "MemoryError"],
    "garbage": ["reported no adapter", "events could not be read", "end of garbage"],
    "silent": ["reported no adapter"],
    "wrong_sum": ["says that it finished, but", "another checksum"],
    "cut": ["not a readable safetensors file"],
    "not_finite": ["NaN or Inf"],
    "elsewhere": ["elsewhere.safetensors", "missing"],
    "settings_refused": ["refused its settings", "rank is 0"],
}


@pytest.mark.parametrize("scenario", FAILURES)
def test_failures(server, scenario):
    server.play(scenario)
    with pytest.raises(WorkflowError) as error:
        server.queue(light_graph(scenario))
    text = text_of(error)
    assert all(word in text for word in FAILURES[scenario]), text
    assert "log.txt" in text and "execution_error" in text
    job = state(server)
    assert job["state"] == "failed" and job["text"] and job["run"].startswith(scenario)
    assert not any(name.startswith(scenario) for name in adapter_names(server))
    assert usable(server)


def test_after_a_failure_the_same_inputs_work(server):
    server.play("crash")
    with pytest.raises(WorkflowError):
        server.queue(light_graph("again"))
    server.play("ok")
    entry = server.queue(light_graph("again"))
    assert "finished: again.safetensors" in entry["outputs"]["train"]["text"][0]
    events = [json.loads(line) for line in (runs_of(server, "again")[0] / "events.jsonl").read_text().splitlines()]
    assert [event["first_step"] for event in events if event["event"] == "started"] == [0, 1]


def runs_of(server, name):
    return [path for path in runs(server) if path.name.startswith(name)]


def test_an_adapter_of_an_earlier_run_does_not_pass(server):
    server.play("ok")
    server.queue(light_graph("stale"))
    folder = runs_of(server, "stale")[0]
    (folder / "result.json").unlink()  # as if the earlier run had ended before it was checked
    server.play("stale")
    with pytest.raises(WorkflowError) as error:
        server.queue(light_graph("stale", output_name="stale2"))
    assert "missing" in text_of(error)
    assert (folder / "adapter-00000030.unchecked.safetensors").is_file()
    assert "stale2.safetensors" not in adapter_names(server)


def test_hang(server):
    server.play("hang")
    began = time.monotonic()
    with pytest.raises(WorkflowError) as error:
        server.queue(light_graph("hang", {"silence_seconds": 5.0}))
    assert "reported nothing for" in text_of(error) and 5 < time.monotonic() - began < 25
    assert usable(server)


def test_grandchildren(server):
    server.play("family", then="crash")
    with pytest.raises(WorkflowError):
        server.queue(light_graph("family"))
    marks = [p for p in psutil.process_iter(["cmdline"]) if any("qrlora-fake" in x for x in p.info["cmdline"] or [])]
    assert not marks


def test_problems_are_found_before_anything_starts(server):
    problems = [{"what": "diffusers cannot be imported", "fix": "/the/python -m pip install diffusers"}]
    server.play("ok", problems=problems)
    with pytest.raises(WorkflowError) as error:
        server.queue(light_graph("problems"))
    text = text_of(error)
    assert "diffusers cannot be imported" in text and "/the/python -m pip install diffusers" in text
    assert "fake python" in text and "owner.json" in text
    assert not (runs_of(server, "problems")[0] / "events.jsonl").exists()


def test_a_broken_interpreter_is_named(server):
    server.play("ok", check="broken")
    with pytest.raises(WorkflowError) as error:
        server.queue(light_graph("broken"))
    assert "before it could check anything" in text_of(error) and "No module named 'torch'" in text_of(error)


@pytest.mark.parametrize("phase", ["check", "encode", "start", "train", "deaf"])
def test_cancel_at_every_phase(server, phase):
    server.play("ok", seconds=0.2, check="slow" if phase == "check" else "", deaf=phase == "deaf")
    graph = light_graph(f"cancel {phase}", {"stop_seconds": 2.0})
    if phase == "encode":
        graph["picture"]["inputs"]["image"] = "picture 2.png"
        graph["train"]["inputs"]["resolution"] = 512  # half a second or more for the VAE
    ticket = server.submit(graph)
    ready = {
        "check": lambda job: "checking" in job["text"] and children(server),
        "encode": lambda job: "encoding" in job["text"],
        "start": lambda job: job["state"] == "running",
    }.get(phase, running_step)
    wait_for(server, ready)
    began = time.monotonic()
    interrupt(server)
    if phase in ("train", "deaf"):
        wait_for(server, lambda job: job["state"] in ("stopping", "stopped"), 2.0)  # 0.2 s, and a busy machine
    with pytest.raises(WorkflowError, match="execution_interrupted"):
        server.wait(ticket)
    assert time.monotonic() - began < 12 and not children(server)
    job = state(server)
    assert job["state"] == "stopped" and "queue again" in job["text"]
    assert usable(server)
    server.play("ok")
    entry = server.queue(graph)
    assert "finished" in entry["outputs"]["train"]["text"][0]
    if phase == "train":
        first = [event["first_step"] for event in state(server)["events"] if event["event"] == "started"]
        assert first[-1] > 0


def test_the_stop_button(server):
    server.play("ok", seconds=0.2)
    graph = {**light_graph("button"), "after": node_after()}
    ticket = server.submit(graph)
    wait_for(server, running_step)
    with pytest.raises(WorkflowError, match="not training"):
        server.post("/qrlora/train/stop", {"node": "nobody"})
    with pytest.raises(WorkflowError, match="expected"):
        server.post("/qrlora/train/stop", {"no": "node"})
    assert server.post("/qrlora/train/stop", {"node": "train"}) == {"stopping": "train"}
    with pytest.raises(WorkflowError, match="execution_interrupted"):
        server.wait(ticket)
    assert "stopped at step" in state(server)["text"]
    server.play("ok")
    entry = server.queue(graph)
    assert entry["outputs"]["after"]["text"]


def node_after():
    return training.node("QRLoRASaveDeltaR", delta_r=["train", 0], filename="copy", format="portable")


def test_the_rest_of_the_queue_goes_on(server):
    server.play("ok", seconds=0.2)
    first = server.submit(light_graph("queue one"))
    second = server.submit({**MERGE, "4": {**MERGE["4"], "inputs": {**MERGE["4"]["inputs"], "alpha": 0.123}}})
    wait_for(server, running_step)
    interrupt(server)
    with pytest.raises(WorkflowError, match="execution_interrupted"):
        server.wait(first)
    assert server.wait(second)["status"]["completed"]


def test_same_inputs_are_not_trained_twice(server):
    server.queue(light_graph("same", seed=7))
    starts = count_starts(server, "same")
    graph = light_graph("same", seed=7)
    graph["train"]["inputs"]["options"] = ["other", 0]  # another node, so that ComfyUI's own cache does not answer
    graph["other"] = training.node("QRLoRATrainOptions", **{**training.OPTIONS, "stop_seconds": 9.0})
    entry = server.queue(graph)
    assert "already trained: same.safetensors" in entry["outputs"]["train"]["text"][0]
    renamed = light_graph("renamed", seed=7)
    entry = server.queue(renamed)
    assert "already trained: renamed.safetensors" in entry["outputs"]["train"]["text"][0]
    assert count_starts(server, "same") == starts == 1 and not runs_of(server, "renamed")
    assert {"same.safetensors", "renamed.safetensors"} <= set(adapter_names(server))


def test_a_finished_run_gets_its_name_in_another_folder(server):
    """Without training again: in models/loras, where every LoRA loader finds it, and back in output/qrlora."""
    server.queue(light_graph("placed", seed=17))
    for folder, place in (("models/loras", "models/loras"), ("models/qrlora", "models/qrlora")):
        for _ in range(2):  # the second time it has its name there already
            entry = server.queue(light_graph("sub/placed", {"stop_seconds": 3.0}, seed=17, folder=folder))
            assert "placed.safetensors" in entry["outputs"]["train"]["text"][0]
        names = [path.name for path in (server.base / place / "sub").glob("placed*")]
        assert names == ["placed.safetensors"]
    listed = server.get("/object_info/LoraLoaderModelOnly")["LoraLoaderModelOnly"]["input"]["required"]["lora_name"]
    assert "placed.safetensors" in str(listed)
    assert count_starts(server, "placed") == 1
    for path in runs_of(server, "placed"):
        path.joinpath("adapter-00000030.safetensors").unlink()
    (server.base / "output" / "qrlora" / "placed.safetensors").unlink()
    entry = server.queue(light_graph("placed", {"stop_seconds": 4.0}, seed=17))
    assert "already trained: placed.safetensors" in entry["outputs"]["train"]["text"][0]
    assert count_starts(server, "placed") == 1, "the file in models/loras vouches for the run"


def count_starts(server, name):
    return sum('"started"' in path.joinpath("events.jsonl").read_text() for path in runs_of(server, name))


def test_more_steps_go_on_and_fewer_have_their_own_run(server):
    server.play("ok", seconds=0.05)
    ticket = server.submit(light_graph("steps", seed=8, steps=40))
    wait_for(server, running_step)
    interrupt(server)
    with pytest.raises(WorkflowError):
        server.wait(ticket)
    server.play("ok")
    for steps, folders in ((40, 1), (60, 1), (40, 1), (1, 2)):
        entry = server.queue(light_graph("steps", {"stop_seconds": 1.0 + steps}, seed=8, steps=steps))
        assert len(runs_of(server, "steps")) == folders, steps
        assert ("already" in entry["outputs"]["train"]["text"][0]) == (steps == 40 and folders == 1 and "seen" in seen)
        seen.add("seen")
    assert "samples" in state(server) and not any("runs" in name for name in adapter_names(server))


seen: set[str] = set()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 21},
        {"rank": 8, "alpha": 4.0},
        {"learning_rate": 2e-3},
        {"instance_prompt": "another"},
        {"images": ["second", 0]},
        {"resolution": 128},
        {"gradient_accumulation": 2},
    ],
)
def test_any_other_input_is_another_run(server, change):
    before = len(runs(server))
    graph = {
        **light_graph("other", **{"seed": 20, **change}),
        "second": training.node("LoadImage", image="picture 1.png"),
    }
    server.queue(graph)
    assert len(runs(server)) == before + 1


def test_a_taken_name_gets_a_number(server):
    folder = server.base / "output" / "qrlora"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.safetensors").write_bytes(b"precious")
    entry = server.queue(light_graph("mine", seed=30))
    assert "mine_00002.safetensors" in entry["outputs"]["train"]["text"][0]
    assert (folder / "mine.safetensors").read_bytes() == b"precious"


def test_a_deleted_adapter_is_published_again(server):
    graph = light_graph("deleted", seed=31)
    server.queue(graph)
    path = server.base / "output" / "qrlora" / "deleted.safetensors"
    path.unlink()
    entry = server.queue(graph)
    assert path.is_file() and "already trained" in entry["outputs"]["train"]["text"][0]


def test_an_adapter_has_the_newest_sample_as_its_picture(server):
    server.play("ok", sample_every=2)
    server.queue(light_graph("pictured", {"sample_every": 2}, steps=4))
    with Image.open(server.base / "output" / "qrlora" / "pictured.preview.png") as picture:
        assert picture.format == "PNG" and max(picture.size) <= 512
    with urllib.request.urlopen(f"{server.url}/qrlora/adapter/picture?name=pictured.safetensors", timeout=10) as answer:
        assert answer.headers["Content-Type"] == "image/png"
    for name in ("..%2Fx", "%2Fetc%2Fpasswd", "nul%00", "", "absent.safetensors", "x" * 3000):
        for route in ("adapter", "adapter/picture"):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(f"{server.url}/qrlora/{route}?name={name}", timeout=10)
            assert error.value.code == 404


def test_an_adapter_that_was_overwritten_is_published_again(server):
    """By another file of another size or time: what Train gave before is no longer there."""
    graph = light_graph("overwritten", seed=33)
    server.queue(graph)
    path = server.base / "output" / "qrlora" / "overwritten.safetensors"
    path.unlink()  # a hard link: what is written into it would change the run's own copy, too
    path.write_bytes(b"something else")
    entry = server.queue(graph)
    assert "already trained: overwritten_00002.safetensors" in entry["outputs"]["train"]["text"][0]
    assert path.read_bytes() == b"something else"


@pytest.mark.parametrize(
    "inputs,words",
    [
        ({"output_name": "../x"}, "refused"),
        ({"output_name": "runs/x"}, "run folders"),
        ({"model_name": "../vae/test_vae.safetensors"}, "value_not_in_list"),
        ({"model_name": "absent.safetensors"}, "value_not_in_list"),
        ({"model_name": "/etc/passwd"}, "value_not_in_list"),
        ({"dataset": "../models", "images": None}, "refused"),
        ({"rank": 0}, "smaller than min"),
        ({"steps": 10**9}, "bigger than max"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"resolution": 72}, "multiples of 16"),
        ({"images": None}, "nothing to train on"),
        ({"dataset": "S\u00e4tze \u56fe"}, "both images and a dataset"),
        ({"instance_prompt": "  "}, "instance_prompt is empty"),
        ({"method": "lora"}, "not in"),
    ],
)
def test_wrong_inputs_are_refused(server, inputs, words):
    before = len(runs(server))
    with pytest.raises(WorkflowError) as error:
        server.queue(light_graph("wrong", **inputs))
    assert words in text_of(error), text_of(error)
    assert len(runs(server)) == before


@pytest.mark.parametrize("inputs", [{"dataset": "absent", "images": None}, {"model_name": "absent.safetensors"}])
def test_a_mistake_is_reported_once_on_its_input(server, inputs):
    with pytest.raises(WorkflowError) as error:
        server.queue(light_graph("once", **inputs))
    errors = json.loads(str(error.value))["node_errors"]["train"]["errors"]
    assert [one["extra_info"]["input_name"] for one in errors] == [next(iter(inputs))], errors


def test_a_clock_that_is_wrong_does_not_refuse_an_adapter(server):
    """The disk's time says that the adapter is older than its own start; its checksum is the one that was reported."""
    server.play("touched")
    entry = server.queue(light_graph("skewed", steps=5))
    assert "finished: skewed.safetensors" in entry["outputs"]["train"]["text"][0]


def test_a_failure_right_after_the_start_leaves_no_trainer(server):
    """Here the note about who trains cannot be written."""
    server.play("failed")
    with pytest.raises(WorkflowError):
        server.queue(light_graph("unnoted"))
    note = runs_of(server, "unnoted")[0] / "trainer.json"
    note.unlink()
    note.mkdir()
    server.play("hang")
    with pytest.raises(WorkflowError) as error:
        server.queue(light_graph("unnoted"))
    assert "trainer.json cannot be written" in text_of(error)
    assert not children(server)


@pytest.mark.parametrize(
    "inputs", [{"trigger": "\ud83d"}, {"instance_prompt": "a \udc80 dog"}, {"output_name": "a\ud800"}]
)
def test_half_a_character_is_refused_before_anything_is_trained(server, inputs):
    before = len(runs(server))
    with pytest.raises(WorkflowError) as error:
        server.queue(light_graph("surrogate", **inputs))
    assert f"{next(iter(inputs))} is not valid Unicode text" in text_of(error)
    assert len(runs(server)) == before


def test_alpha_zero_is_as_rank_and_a_missing_trigger_is_said(server):
    entry = server.queue(light_graph("scaled", steps=5, rank=8, alpha=0.0, instance_prompt="a dog", trigger="<c>"))
    text = entry["outputs"]["train"]["text"][0]
    assert "no caption holds the trigger '<c>'" in text, text
    settings = json.loads((runs_of(server, "scaled")[0] / "settings.json").read_text())
    assert settings["alpha"] == 8.0
    assert "no caption holds" in state(server)["warnings"][0]


def test_without_the_cache_of_pictures_a_run_goes_on(server):
    """Encoded again, into the same run."""
    graph = light_graph("recached", steps=5)
    server.queue(graph)
    caches = list((server.base / "output" / "qrlora" / "runs" / "_cache").glob("*.safetensors"))
    shutil.rmtree(caches[0].parent)
    graph["train"]["inputs"]["steps"] = 8
    server.queue(graph)
    (run,) = runs_of(server, "recached")
    assert sorted(path.name for path in run.glob("adapter-*.safetensors")) == [
        "adapter-00000005.safetensors",
        "adapter-00000008.safetensors",
    ]


def test_a_mistake_before_the_trainer_is_on_the_node(server):
    """Also for a page that is opened later, and without the path of a module."""
    broken = server.base / "input" / "unreadable"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    with pytest.raises(WorkflowError):
        server.queue(light_graph("early", dataset="unreadable", images=None))
    shutil.rmtree(broken)
    job = state(server)
    assert job["state"] == "failed" and job["text"].startswith("DatasetError: the picture a.png cannot be read")


def test_a_dataset_folder(server):
    graph = light_graph("folder", dataset="S\u00e4tze \u56fe", images=None)
    server.queue(graph)
    assert runs_of(server, "folder")
    broken = server.base / "input" / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "a.png").write_bytes(b"no picture")
    with pytest.raises(WorkflowError) as error:
        server.queue(light_graph("folder", dataset="broken", images=None))
    assert "the picture a.png cannot be read" in text_of(error)
    shutil.rmtree(broken)
    broken.mkdir()
    with pytest.raises(WorkflowError) as error:
        server.queue(light_graph("folder", dataset="broken", images=None, seed=5))
    assert "no pictures in the folder broken" in text_of(error)


def test_several_train_nodes_run_one_after_another(server):
    server.play("ok", seconds=0.02)
    graph = light_graph("one", seed=40)
    graph["train2"] = train_node("two", seed=41)
    graph["merge"] = training.node(
        "QRLoRAMerge",
        delta_r_style=["train", 0],
        alpha=1.0,
        delta_r_content=["train2", 0],
        beta=1.0,
        on_basis_mismatch="stack",
    )
    graph["save"] = training.node("QRLoRASaveDeltaR", delta_r=["merge", 0], filename="both", format="portable")
    ticket = server.submit(graph)
    most = 0
    while server.get(f"/history/{ticket}") == {}:
        most = max(most, sum("fake_trainer.py" in line for line in command_lines(server)))
        time.sleep(0.02)
    assert server.wait(ticket)["outputs"]["save"]["text"] and most == 1


def command_lines(server):
    """Of the server's children; one may end while it is asked."""
    lines = []
    for child in children(server):
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(child.cmdline()))
    return lines


def test_full_disk(server, tmp_path):
    """The run folder on a disk of 3 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    graph = light_graph("disk", seed=50)
    server.play("crash")
    with pytest.raises(WorkflowError):
        server.queue(graph)
    folder = runs_of(server, "disk")[0]
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no tmpfs here: {made.stderr.decode().strip()}")
    try:
        server.play("full_disk")
        with pytest.raises(WorkflowError) as error:
            server.queue(graph)
        # the trainer may fill it before or after ComfyUI has noted who trains
        assert re.search("The disk is full|trainer.json cannot be written.*No space left", text_of(error))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert usable(server)


def test_two_servers_with_the_same_name_and_inputs(server, other):
    """One trains, the other waits for it and takes its result."""
    server.play("ok", seconds=0.15)
    graph = light_graph("shared", seed=60, steps=20)
    tickets = [(one, one.submit(graph)) for one in (server, other)]
    texts = [one.wait(ticket)["outputs"]["train"]["text"][0] for one, ticket in tickets]
    assert sorted(text.split(":")[0] for text in texts) == ["already trained", "finished"]
    assert len(runs_of(server, "shared")) == 1 and count_starts(server, "shared") == 1


def test_comfyui_killed(server, other):
    """The trainer ends within five seconds, and another ComfyUI over the same folders goes on."""
    server.play("ok", seconds=0.3)
    other.submit(light_graph("orphan"))
    wait_for(other, running_step)
    trainers = children(other)
    assert len(trainers) == 1
    other.process.kill()
    other.process.wait()
    gone, left = psutil.wait_procs(trainers, timeout=5)
    assert gone and not left
    server.play("ok")
    entry = server.queue(light_graph("orphan"))
    assert "finished" in entry["outputs"]["train"]["text"][0]


@pytest.mark.parametrize(
    "body,kind",
    [
        (b"[" * 100_000, "application/json"),
        (b'["node"]', "application/json"),
        (b'{"node": {"x": 1}}', "application/json"),
        (b'{"node": null}', "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"{}", "application/json; charset=no-such-thing"),
        (b"", "text/plain"),
    ],
)
def test_a_wrong_question_is_answered_as_one(server, body, kind):
    request = urllib.request.Request(f"{server.url}/qrlora/train/stop", body, {"Content-Type": kind})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert error.value.code == (415 if kind == "text/plain" else 400) and "expected" in error.value.read().decode()


def test_a_sample_that_is_none_is_not_an_error_of_the_server(server):
    """The model of the run has 16 channels; of a run whose model is gone, any number is served, in grey."""
    folder = server.base / "output" / "qrlora" / "runs" / "odd" / "samples"
    folder.mkdir(parents=True)
    model = next((server.base / "models" / "diffusion_models").glob("flux 768*"))
    (folder.parent / "settings.json").write_text(json.dumps({"model": str(model)}))
    for step, shape in enumerate(([16, 8], [1, 4, 8, 8], [1, 16, 0, 8]), 1):
        size = 4 * math.prod(shape)
        header = json.dumps({"latent": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
        (folder / f"step-{step:08}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
        with pytest.raises(urllib.error.HTTPError) as error:
            server.get(f"/qrlora/train/sample?run=odd&step={step}")
        assert error.value.code == 404
    (folder.parent / "settings.json").write_text(json.dumps({"model": "gone.safetensors"}))
    with urllib.request.urlopen(f"{server.url}/qrlora/train/sample?run=odd&step=2", timeout=10) as answer:
        pixels = np.asarray(Image.open(answer))
    assert (pixels[..., 0] == pixels[..., 2]).all()
    shutil.rmtree(folder.parent)


def test_the_page_can_catch_up(server):
    """What a reloaded page asks for, and what it may not."""
    server.play("ok", seconds=0.03)
    ticket = server.submit(light_graph("page", seed=70))
    job = wait_for(server, running_step)
    assert job["run"].startswith("page-") and job["prompt_id"] == ticket
    assert {"node", "prompt_id", "run", "state", "text", "events", "samples"} <= job.keys()
    server.wait(ticket)
    job = state(server)
    assert job["state"] == "finished" and len([e for e in job["events"] if e["event"] == "step"]) == 30
    for query in ("run=..%2F..&step=1", "run=%2Fetc&step=1", "run=absent&step=1", f"run={job['run']}&step=x", "step=1"):
        with pytest.raises(OSError, match="HTTP Error 40"):
            server.get(f"/qrlora/train/sample?{query}")
