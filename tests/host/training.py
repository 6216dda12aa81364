"""What the tests of training need besides a server: encoders with random weights in real layouts, a graph, a client."""

import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
import zlib

import numpy as np
import psutil
import torch
import websocket
from PIL import Image
from safetensors.torch import load_file, save_file

from demo import server as instance
from demo.server import GOLDEN, PACK
from tests.warm import warm_python

NAME = "K\u00fcche \u8bad\u7ec3 folder"
WIDTH = 768  # of CLIP-L, whose output the small FLUX takes as context and as vector
FAKE = PACK / "tests" / "fake_trainer.py"


def make_base(folder, clip, vae=None):
    """A base directory for training, in a folder with a space, an umlaut and Chinese characters."""
    base = instance.make_base(folder / NAME)
    (base / "models" / "text_encoders").mkdir()
    instance_link(clip, base / "models" / "text_encoders" / "clip_l.safetensors")
    if vae is not None:
        instance_link(vae, base / "models" / "vae" / "ae.safetensors")
    save_file(wide_flux(), base / "models" / "diffusion_models" / "flux 768 \u00e9.safetensors")
    for number, size in enumerate(((96, 64), (64, 64), (70, 130))):
        picture(size, number).save(base / "input" / f"picture {number}.png")
    dataset = base / "input" / "S\u00e4tze \u56fe"
    dataset.mkdir()
    for number in range(2):
        picture((80, 64), 10 + number).save(dataset / f"{number} \u00fc.jpg")
    (dataset / "0 \u00fc.txt").write_text("a [trigger] cat, \u00e9t\u00e9", encoding="utf-8")
    return base


def instance_link(source, target):
    """Large files are not copied for every server."""
    try:
        os.link(source, target)
    except OSError:
        target.write_bytes(source.read_bytes())


def picture(size, seed):
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def wide_flux():
    """The golden FLUX with context and vector inputs of CLIP-L's width."""
    state = load_file(GOLDEN / "base_bfl.safetensors")
    generator = torch.Generator().manual_seed(7)
    for key in ("txt_in.weight", "vector_in.in_layer.weight"):
        state[key] = torch.randn(state[key].shape[0], WIDTH, generator=generator) / WIDTH**0.5
    return state


def write_clip_l(path):
    """Random weights in the layout of CLIP-L's text encoder, 123 M parameters."""
    make = Maker()
    make.tensor("text_model.embeddings.token_embedding.weight", 49408, WIDTH, scale=0.02)
    make.tensor("text_model.embeddings.position_embedding.weight", 77, WIDTH, scale=0.01)
    for index in range(12):
        layer = f"text_model.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            make.linear(f"{layer}.self_attn.{name}", WIDTH, WIDTH)
        make.linear(f"{layer}.mlp.fc1", 4 * WIDTH, WIDTH)
        make.linear(f"{layer}.mlp.fc2", WIDTH, 4 * WIDTH)
        make.norm(f"{layer}.layer_norm1", WIDTH)
        make.norm(f"{layer}.layer_norm2", WIDTH)
    make.norm("text_model.final_layer_norm", WIDTH)
    make.tensor("text_projection.weight", WIDTH, WIDTH, scale=WIDTH**-0.5)
    save_file(make.state, path)
    return path


def write_vae(path, channels=16, statistics=False):
    """Random weights in the layout of FLUX.1's 16-channel autoencoder (ae.safetensors), 84 M parameters.

    FLUX.2's has 32 channels, and the statistics of its latents in patches of 2x2.
    """
    make, widths = Maker(), (128, 256, 512, 512)
    make.conv("encoder.conv_in", 128, 3)
    width = 128
    for level, out in enumerate(widths):
        for block in range(2):
            make.block(f"encoder.down.{level}.block.{block}", width, out)
            width = out
        if level < 3:
            make.conv(f"encoder.down.{level}.downsample.conv", width, width)
    make.middle("encoder.mid", width)
    make.norm("encoder.norm_out", width)
    make.conv("encoder.conv_out", 2 * channels, width)
    make.conv("decoder.conv_in", width, channels)
    make.middle("decoder.mid", width)
    for level in reversed(range(4)):
        for block in range(3):
            make.block(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
        if level:
            make.conv(f"decoder.up.{level}.upsample.conv", width, width)
    make.norm("decoder.norm_out", width)
    make.conv("decoder.conv_out", 3, width)
    if statistics:
        make.conv("quant_conv", 2 * channels, 2 * channels, 1)
        make.conv("post_quant_conv", channels, channels, 1)
        make.tensor("bn.running_mean", 4 * channels, scale=0.5)
        make.state["bn.running_var"] = torch.rand(4 * channels, generator=make.generator) + 0.5
    save_file(make.state, path)
    return path


class Maker:
    """Random fp16 tensors by name, scaled so that activations keep their size."""

    def __init__(self):
        self.state, self.generator = {}, torch.Generator().manual_seed(1)

    def tensor(self, name, *shape, scale):
        self.state[name] = (torch.randn(*shape, generator=self.generator) * scale).half()

    def linear(self, name, out, width):
        self.tensor(f"{name}.weight", out, width, scale=width**-0.5)
        self.state[f"{name}.bias"] = torch.zeros(out).half()

    def conv(self, name, out, width, kernel=3):
        self.tensor(f"{name}.weight", out, width, kernel, kernel, scale=(width * kernel**2) ** -0.5)
        self.state[f"{name}.bias"] = torch.zeros(out).half()

    def norm(self, name, width):
        self.state[f"{name}.weight"] = torch.ones(width).half()
        self.state[f"{name}.bias"] = torch.zeros(width).half()

    def block(self, name, width, out):
        self.norm(f"{name}.norm1", width)
        self.conv(f"{name}.conv1", out, width)
        self.norm(f"{name}.norm2", out)
        self.conv(f"{name}.conv2", out, out)
        if width != out:
            self.conv(f"{name}.nin_shortcut", out, width, 1)

    def middle(self, name, width):
        self.block(f"{name}.block_1", width, width)
        self.norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.attn_1.{part}", width, width, 1)
        self.block(f"{name}.block_2", width, width)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


OPTIONS = {
    "preset": "auto",
    "base_storage": "fp32",
    "gradient_checkpointing": "preset",
    "offload": "preset",
    "precision": "fp32",
    "optimizer": "adamw",
    "scheduler": "constant",
    "warmup_steps": 0,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "timestep_sampling": "uniform",
    "shift": "none",
    "guidance": 1.0,
    "caption_dropout": 0.0,
    "keep_aspect": True,
    "flip": False,
    "use_mask": True,
    "targets": "",
    "checkpoint_every": 5,
    "keep_checkpoints": 2,
    "sample_every": 0,
    "resume": "auto",
    "processes": 1,
    "stop_seconds": 5.0,
    "silence_seconds": 60.0,
}


def train_graph(name="adapter", options=None, vae="test_vae.safetensors", **inputs):
    """Load a picture, train on it; node "train" is the output."""
    return {
        "clip": node("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion"),
        "vae": node("VAELoader", vae_name=vae),
        "picture": node("LoadImage", image="picture 0.png"),
        "options": node("QRLoRATrainOptions", **{**OPTIONS, **(options or {})}),
        "train": train_node(name, **inputs),
    }


def light_graph(name="adapter", options=None, **inputs):
    """The same with an encoder that takes no time, where it is not encoding that is looked at."""
    graph = train_graph(name, options, **inputs)
    graph["clip"] = node("QRLoRATestClip", width=WIDTH, pooled=True)
    return graph


def train_node(name, **inputs):
    values = {
        "model_name": "flux 768 \u00e9.safetensors",
        "clip": ["clip", 0],
        "vae": ["vae", 0],
        "dataset": "none",
        "instance_prompt": "a photo of a [trigger] dog",
        "trigger": "<c>",
        "method": "delta_r_triangular",
        "rank": 8,
        "alpha": 8.0,
        "steps": 30,
        "learning_rate": 1e-3,
        "resolution": 64,
        "batch_size": 1,
        "gradient_accumulation": 1,
        "seed": zlib.crc32(name.encode()),  # every test its own run
        "output_name": name,
        "images": ["picture", 0],
        "options": ["options", 0],
        **inputs,
    }
    return node("QRLoRATrain", **{key: value for key, value in values.items() if value is not None})


class Client:
    """A page: it hears what the server sends, and asks for the state."""

    def __init__(self, server):
        self.server, self.id, self.heard = server, uuid.uuid4().hex, []
        self._socket = websocket.create_connection(f"ws{server.url[4:]}/ws?clientId={self.id}", timeout=0.2)

    def listen(self, seconds=0.0, until=None, kind="qrlora.train"):
        """Take in messages; the first of a kind for which `until` holds, None after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            try:
                data = self._socket.recv()
            except websocket.WebSocketTimeoutException:
                data = None
            if isinstance(data, str):
                message = json.loads(data)
                self.heard.append((time.monotonic(), message))
                if message["type"] == kind and until is not None and until(message["data"]):
                    return message["data"]
            elif data is not None:
                self.heard.append((time.monotonic(), {"type": "preview", "data": len(data)}))
            if time.monotonic() > end:
                return None

    def close(self):
        self._socket.close()


def state(server, node="train"):
    """The newest job of a node."""
    jobs = [job for job in server.get("/qrlora/train/state")["jobs"] if job["node"] == node]
    return jobs[-1] if jobs else None


def wait_for(server, test, seconds=60, node="train"):
    """The job once `test` holds for it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = state(server, node)
        if job is not None and test(job):
            return job
        time.sleep(0.05)
    raise AssertionError(f"never came: {state(server, node)}\n{server.tail()}")


def children(server):
    """Living processes that the server has started."""
    found = psutil.Process(server.process.pid).children(recursive=True)
    return [one for one in found if one.status() != psutil.STATUS_ZOMBIE]


def interrupt(server):
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/interrupt", b"{}"), timeout=10).read()


def runs(server):
    return sorted(path for path in (server.base / "output" / "qrlora" / "runs").glob("*") if path.name[0] != "_")


class TrainingServer(instance.Server):
    """A server whose owner's file names the real trainer, or the fake one for as long as a test plays it."""

    def __init__(self, host, base, environment=None, log=None, arguments=()):
        self.part, self._owner, self._real = base / "part.json", base / "owner.json", real_python(host)
        self._warm = warm_python(self._real, "host")
        self._fake = base / "fake python"
        self._fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
        self._fake.chmod(0o755)
        if not self._owner.is_file():  # a second server over the same folders plays what the first one does
            self.train_really()
        environment = {"QRLORA_CONFIG": str(self._owner), "QRLORA_FAKE": str(self.part), **(environment or {})}
        super().__init__(host, base, environment, log, arguments)

    def play(self, scenario, **more):
        """What the next trainer does: a scenario of the fake one."""
        self.part.write_text(json.dumps({"scenario": scenario, **more}))
        os.utime(self._fake)  # as if it were installed anew: what it answered before does not count
        self._owner.write_text(json.dumps({"python": str(self._fake)}))

    def train_really(self, cold=False):
        """The next trainer is the real one, forked where that can be; `cold`: started as it starts on any machine."""
        self._owner.write_text(json.dumps({"python": self._real if cold else self._warm}))


def real_python(host):
    """ComfyUI's own interpreter where it has the trainer's packages, otherwise that of the tests."""
    code = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('diffusers', 'accelerate'))))"
    own = instance.interpreter(host)
    return own if subprocess.run([own, "-c", code], check=False).returncode == 0 else sys.executable


def text_of(error):
    """The host's words in a WorkflowError: a failed node's kind of message and its text, or the refusal."""
    found = json.loads(str(error.value))
    if isinstance(found, dict):
        return json.dumps(found, ensure_ascii=False)
    return "\n".join(kind + " " + str(data.get("exception_message", "")) for kind, data in found)


def adapter_names(server):
    listed = server.get("/object_info/QRLoRALoadDeltaR")["QRLoRALoadDeltaR"]["input"]["required"]["delta_r_name"]
    return listed[1]["options"] if isinstance(listed[0], str) else listed[0]
