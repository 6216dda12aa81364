"""Pictures to picture on the real server with the real trainer: encode, train, merge, apply, sample.

A small FLUX, CLIP-L and FLUX's 16-channel VAE, all with random weights in their real layouts, on a CPU, in folders with
spaces, umlauts and Chinese characters.
"""

import json
import shutil
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from demo.server import WorkflowError
from tests.host import training
from tests.host.training import (
    Client,
    adapter_names,
    children,
    interrupt,
    node,
    runs,
    state,
    train_graph,
    train_node,
    wait_for,
)

VAE = "ae.safetensors"
CONTENT, STYLE = "M\u00fcller \u732b/content", "M\u00fcller \u732b/style"


STEPS = 100  # so many that a Cancel after the first one comes before the last


def whole_graph(steps=STEPS, style_steps=None, processes=1):
    """Two Train nodes, a merge, the patched model, a sampler, pictures; the style by several processes, if so."""
    graph = train_graph(CONTENT, {"sample_every": STEPS // 2}, vae=VAE, steps=steps, trigger="<c>", seed=1)
    graph["batch"] = node("ImageBatch", image1=["picture", 0], image2=["picture", 0])
    graph["train"]["inputs"]["images"] = ["batch", 0]
    graph["style"] = train_node(
        STYLE, trigger="<s>", steps=style_steps or steps, seed=1, dataset="S\u00e4tze \u56fe", images=None
    )
    graph["style"]["inputs"]["options"] = ["options of style", 0]
    graph["options of style"] = node("QRLoRATrainOptions", **(graph["options"]["inputs"] | {"processes": processes}))
    graph |= {
        "model": node("UNETLoader", unet_name="flux 768 \u00e9.safetensors", weight_dtype="default"),
        "merge": node(
            "QRLoRAMerge",
            delta_r_style=["style", 0],
            alpha=0.9,
            delta_r_content=["train", 0],
            beta=1.0,
            on_basis_mismatch="raise",
        ),
        "apply": node("QRLoRAApply", model=["model", 0], delta_r=["merge", 0], strength=1.0),
        "prompt": node("CLIPTextEncode", clip=["clip", 0], text="a <c> dog in <s> style"),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["apply", 0],
            positive=["prompt", 0],
            negative=["prompt", 0],
            latent_image=["empty", 0],
            seed=1,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="out"),
        "curve": node("SaveImage", images=["train", 1], filename_prefix="curve"),
        "samples": node("SaveImage", images=["train", 2], filename_prefix="samples"),
        "name": node("PreviewAny", source=["train", 3]),
        "log": node("PreviewAny", source=["train", 4]),
    }
    return graph


class Whole(NamedTuple):
    """What came of the whole graph: its history entry, its ticket, and what a page heard."""

    entry: dict
    ticket: str
    client: Client


@pytest.fixture(scope="module")
def whole(server):
    """Everything in one graph, once, watched as a page would watch it; the tests below read what came of it.

    Its trainers are started as on any machine, by an interpreter that has to import everything.
    """
    client = Client(server)
    server.train_really(cold=True)
    ticket = server.submit(whole_graph(style_steps=10, processes=2), client.id)
    for _ in range(2):  # in whichever order the host takes them
        ended = client.listen(240, lambda data: data["state"] in ("finished", "failed", "stopped"))
        assert ended and ended["state"] == "finished", ended
    entry = server.wait(ticket)
    server.train_really()
    client.close()
    return Whole(entry, ticket, client)


def test_pictures_to_picture(server, whole):
    outputs = whole.entry["outputs"]
    assert len(outputs["save"]["images"]) == 1 and len(outputs["curve"]["images"]) == 1
    assert len(outputs["samples"]["images"]) == 2
    assert outputs["name"]["text"] == [f"{CONTENT}.safetensors"]
    assert "adapter written" in outputs["log"]["text"][0]
    assert "15 layers" in outputs["apply"]["text"][0] and "one basis" in outputs["merge"]["text"][0]
    listed = {one.replace("\\", "/") for one in adapter_names(server)}
    assert {f"{CONTENT}.safetensors", f"{STYLE}.safetensors"} <= listed and not any("runs/" in one for one in listed)


def test_messages(whole):
    """At most five messages a second, all steps, in order, with queue entry and run; progress, but no picture."""
    client = whole.client
    ours = [(when, one["data"]) for when, one in client.heard if one["type"] == "qrlora.train"]
    mine = [data for _, data in ours if data["node"] == "train"]
    assert all(data["prompt_id"] == whole.ticket for _, data in ours)
    states = [data["state"] for data in mine]
    assert states[0] == "preparing" and states[-1] == "finished" and "running" in states
    events = [event for data in mine for event in data["events"]]
    assert [event["step"] for event in events if event["event"] == "step"] == [*range(1, STEPS + 1)]
    assert [event["step"] for event in events if event["event"] == "sample"] == [STEPS // 2, STEPS]
    running = [when for when, data in ours if data["state"] == "running"]
    assert all(later - earlier > 0.1 for earlier, later in zip(running, running[3:]))
    progress = [one["data"] for _, one in client.heard if one["type"] == "progress" and one["data"]["node"] == "train"]
    assert any(data["value"] == data["max"] == STEPS for data in progress)
    assert not any(one["type"] == "preview" for _, one in client.heard), "the host would show it below the panel"


def test_adapter(server, whole):
    """Rank, trigger and prompt; trained, and not at any absolute path."""
    path = server.base / "output" / "qrlora" / f"{CONTENT}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["qrlora.trigger"] == "<c>" and metadata["qrlora.prompt"] == "a photo of a <c> dog"
    assert metadata["qrlora.steps"] == str(STEPS) and metadata["modelspec.title"] == "content"
    assert str(server.base) not in json.dumps(metadata)
    down = [tensor for key, tensor in load_file(path).items() if "lora_A" in key]
    assert len(down) == 15 and all(float(tensor.abs().max()) > 0 for tensor in down)


def test_training_sees_what_sampling_sees(fake):
    """The cache holds the very conditioning and latents of the stock nodes. No trainer has to open it for that."""
    server = fake
    graph = train_graph("seen", vae=VAE, steps=1)
    graph["crop"] = node(
        "ImageScale", image=["picture", 0], upscale_method="lanczos", width=64, height=64, crop="center"
    )
    graph["train"]["inputs"]["images"] = ["crop", 0]
    graph["encode"] = node("VAEEncode", pixels=["crop", 0], vae=["vae", 0])
    graph["latent"] = node("SaveLatent", samples=["encode", 0], filename_prefix="seen")
    graph["prompt"] = node("CLIPTextEncode", clip=["clip", 0], text="a photo of a <c> dog")
    graph["conditioning"] = node("QRLoRATestSaveConditioning", conditioning=["prompt", 0], output="seen")
    server.queue(graph)
    settings = json.loads((run_of(server, "seen") / "settings.json").read_text(encoding="utf-8"))
    cache = load_file(settings["data"])
    latent = load_file(next(server.base.glob("output/seen*.latent")))["latent_tensor"]
    stock = load_file(server.base / "output" / "seen.safetensors")
    assert torch.equal(cache["latent.0"], (latent[0] - 0.1159) * 0.3611)
    assert torch.equal(cache["text.0.embeds"], stock["embeds"][0])
    assert torch.equal(cache["text.0.pooled"], stock["pooled"][0])
    assert cache["text.0.embeds"].shape == (77, 768)


def run_of(server, name):
    return [path for path in runs(server) if path.name.startswith(f"{name}-")][-1]


def test_interrupted_and_resumed_equals_uninterrupted(server, whole):
    """Cancel in the middle, queue again: the adapter is bit-equal to that of the whole graph, trained in one go.

    The cache of encoded pictures is deleted meanwhile, as the help page invites to: it is encoded again.
    """
    run_of(server, "content").rename(server.base / "elsewhere")  # otherwise its result would be found
    graph = whole_graph()
    for name in ("style", "options of style", "merge", "apply", "sampler", "decode", "save", "samples", "curve"):
        del graph[name]
    graph["train"]["inputs"]["output_name"] = "paused"
    graph["options"]["inputs"] |= {"stop_seconds": 60.0, "checkpoint_every": 0}
    ticket = server.submit(graph)
    wait_for(server, lambda job: job["run"].startswith("paused") and steps_of(job), 120)
    interrupt(server)
    with pytest.raises(WorkflowError, match="execution_interrupted"):
        server.wait(ticket)
    job = state(server)
    assert job["state"] == "stopped" and not children(server)
    stopped = next(event for event in job["events"] if event["event"] == "stopped")
    assert 0 < stopped["step"] < STEPS
    shutil.rmtree(server.base / "output" / "qrlora" / "runs" / "_cache")
    server.queue(graph)
    started = next(event for event in state(server)["events"] if event["event"] == "started")
    assert started["first_step"] == stopped["step"]
    (server.base / "elsewhere").rename(server.base / "output" / "qrlora" / "runs" / "content-moved")
    folder = server.base / "output" / "qrlora"
    one, other = (load_file(folder / f"{name}.safetensors") for name in ("paused", CONTENT))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def steps_of(job):
    return [event["step"] for event in job["events"] if event["event"] == "step"]


def test_two_processes(server, whole):
    """accelerate launch from the node: one training of two processes, not two trainings."""
    events = (run_of(server, "style") / "events.jsonl").read_text(encoding="utf-8")
    assert events.count('"event":"started"') == events.count('"event":"finished"') == 1, "each trained by itself"


def test_a_model_that_is_not_flux(server):
    target = server.base / "models" / "diffusion_models" / "no flux.safetensors"
    target.write_bytes((server.base / "models" / "vae" / "test_vae.safetensors").read_bytes())
    with pytest.raises(WorkflowError) as error:
        server.queue(train_graph("no flux", model_name="no flux.safetensors"))
    text = training.text_of(error)
    assert "Training cannot start" in text and "choose a model of" in text


def test_a_sample_is_served_as_a_picture(server, whole):
    import urllib.parse
    import urllib.request

    name = urllib.parse.quote(run_of(server, "content").name)
    with urllib.request.urlopen(f"{server.url}/qrlora/train/sample?run={name}&step={STEPS}", timeout=10) as answer:
        assert answer.headers["Content-Type"] == "image/png" and answer.read().startswith(b"\x89PNG")


def test_class_pictures_several_sizes_and_a_validation_loss(server):
    """Each picture in each size, those of the class marked; losses of validation are told."""
    more = {"repeats": 2, "resolutions": "128, 64", "prior_weight": 0.5, "validate_every": 2}
    graph = train_graph("prior", more, vae=VAE, steps=4, class_images=["other", 0], class_prompt="a photo of a dog")
    graph["other"] = node("LoadImage", image="picture 1.png")
    server.queue(graph)
    run = next(path for path in runs(server) if path.name.startswith("prior-"))
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "validation"]
    assert [line["step"] for line in lines if line["event"] == "validation"] == [2, 4]
    assert all(0 < loss < 100 for loss in losses) and losses[0] != losses[1]
    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    assert settings["prior_weight"] == 0.5
    with safe_open(settings["data"], "pt") as file:
        items = json.loads(file.metadata()["qrlora.cache"])["items"]
        sizes = [file.get_slice(f"latent.{index}").get_shape()[1:] for index in range(len(items))]
    assert [item["is_class"] for item in items] == [False, False, True, True]
    assert [item["repeats"] for item in items] == [2] * 4
    assert len({tuple(size) for size in sizes[:2]}) == 2 and max(max(size) for size in sizes[1::2]) > 8


def test_class_pictures_need_a_prompt(server):
    graph = train_graph("alone", {}, vae=VAE, steps=4, class_images=["picture", 0])
    with pytest.raises(WorkflowError) as error:
        server.queue(graph)
    assert "class_images need a class_prompt" in training.text_of(error)


def test_class_pictures_that_are_bypassed_count_as_nothing(fake):
    """What is left of them is the prompt; people bypass to compare."""
    entry = fake.queue(train_graph("without", {}, steps=4, class_prompt="a photo of a dog"))
    assert "class_images is empty or bypassed: trained without" in entry["outputs"]["train"]["text"][0]


def test_resolutions_that_are_no_numbers_are_refused(server):
    graph = train_graph("sizes", {"resolutions": "large"}, vae=VAE, steps=4)
    with pytest.raises(WorkflowError) as error:
        server.queue(graph)
    assert "resolutions holds 'large'" in training.text_of(error)
