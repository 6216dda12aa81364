"""After Train dR: what the adapter does at several strengths, as a picture, for the page, and with the real trainer."""

import io
import json
import urllib.error
import urllib.parse
import urllib.request

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.host.training import node, state, train_graph


def graph(name, **options):
    made = train_graph(name, options=options.pop("options", None), steps=options.pop("steps", 3), **options)
    made["shown"] = node("SaveImage", images=["train", 5], filename_prefix=name.replace(" ", "_"))
    return made


def picture(server, entry):
    saved = entry["outputs"]["shown"]["images"][0]
    with Image.open(server.base / "output" / saved["subfolder"] / saved["filename"]) as image:
        return image.convert("RGB")


def png(server, run, step):
    query = urllib.parse.urlencode({"run": run, "step": step})
    with urllib.request.urlopen(f"{server.url}/qrlora/train/strengths?{query}", timeout=30) as answer:
        return answer.read()


def colours(image):
    return {colour for _, colour in image.getcolors(1 << 20)}


def test_the_picture_has_samples_and_curves(fake):
    fake.play("ok", strengths=True)
    entry = fake.queue(graph("strengths shown"))
    image = picture(fake, entry)
    assert image.width > 4 * 64 and image.height > 2 * 64 + 300
    assert {(0, 114, 178), (213, 94, 0)} <= colours(image), "both curves"
    job = state(fake)
    (event,) = (one for one in job["events"] if one["event"] == "strengths")
    assert event["shown"] == [0.2, 0.7, 1.0, None] and event["step"] == 3
    served = Image.open(io.BytesIO(png(fake, job["run"], 3)))
    assert served.size == image.size
    again = fake.queue(graph("strengths shown again", seed=graph("strengths shown")["train"]["inputs"]["seed"]))
    assert picture(fake, again).size == image.size, "a run that was there already shows them too"


def test_nothing_was_looked_at(fake):
    entry = fake.queue(graph("strengths off"))
    assert picture(fake, entry).size == (512, 128), "a line that says so"
    run = state(fake)["run"]
    for where, step, code in ((run, "3", 404), ("../..", "3", 404), (run, "x", 400), (run, "1" * 30, 400)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            png(fake, where, step)
        assert refused.value.code == code


@pytest.mark.parametrize("damage", ["{", "[]", '{"strengths": [1], "shown": 3}'])
def test_a_damaged_file_fails_no_training(fake, damage):
    name = f"strengths damaged {len(damage)}"
    fake.play("ok", strengths=True)
    fake.queue(graph(name))
    run = fake.base / "output" / "qrlora" / "runs" / state(fake)["run"]
    (run / "strengths" / "step-00000003.json").write_text(damage)
    again = graph(name, seed=graph(name)["train"]["inputs"]["seed"])
    again["train"]["inputs"]["output_name"] = f"{name} again"
    assert picture(fake, fake.queue(again)).size == (512, 128)


def test_a_vae_that_fails_fails_no_training(fake):
    """As where memory ends: here on latents that it cannot decode."""
    name = "strengths of another vae"
    fake.play("ok", strengths=True)
    fake.queue(graph(name))
    run = fake.base / "output" / "qrlora" / "runs" / state(fake)["run"]
    save_file({"latent": torch.zeros(8, 3, 4, 4)}, run / "strengths" / "step-00000003.safetensors")
    again = graph(name, seed=graph(name)["train"]["inputs"]["seed"])
    again["train"]["inputs"]["output_name"] = f"{name} again"
    assert picture(fake, fake.queue(again)).size == (512, 128)


def test_the_real_trainer_looks(server):
    """Encoded by the graph's CLIP with the trigger and without it; the base's picture is not the adapter's."""
    options = {"strengths": "on", "sample_every": 0}
    entry = server.queue(graph("strengths real", options=options, steps=2, learning_rate=0.01))
    assert {(0, 114, 178), (213, 94, 0)} <= colours(picture(server, entry))
    run = server.base / "output" / "qrlora" / "runs" / state(server)["run"]
    told = json.loads((run / "strengths" / "step-00000002.json").read_text())
    assert told["prompts"] == {"with_trigger": "a photo of a <c> dog", "without": "a photo of a dog"}
    at = dict(zip(told["strengths"], told["shown"]))
    assert at[1.0] == pytest.approx(1) and at[0.2] < at[0.8] and all(one > 0 for one in told["drift"])
