"""A stand-in for the trainer that behaves as badly as it is told, without torch: it starts in a tenth of a second.

As `python` in the owner's file it gets the command line that the real interpreter would get; which part it plays is
in the JSON file that QRLORA_FAKE names: {"scenario": ..., "seconds": ..., ...}. Standard library only.
"""

import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

ADAPTER = Path(__file__).resolve().parent / "golden" / "official_style.safetensors"
CHECK = {
    "python": "fake",
    "versions": {"torch": "0", "diffusers": "0", "accelerate": "0"},
    "device": "cpu",
    "vram_free": None,
    "ram_free": 1,
    "disk_free": 1,
    "model": {
        "family": "FLUX.1",
        "blocks": "1+1",
        "dtype": "float32",
        "fingerprint": "0",
        "channels": 16,
        "text": {"embeds": 768, "pooled": 768},
    },
    "estimate": {"vram": 0, "ram": 0, "disk": 0},
    "problems": [],
}


class Fake:
    def __init__(self, arguments):
        self.part = json.loads(Path(os.environ["QRLORA_FAKE"]).read_text(encoding="utf-8"))
        value = dict(itertools.pairwise(arguments))
        self.settings = json.loads(Path(value["--settings"]).read_text(encoding="utf-8"))
        self.run = Path(self.settings["run_dir"])
        self.output = Path(self.settings["output"])
        self.events = Path(value.get("--events", os.devnull))
        self.stop_file = Path(value.get("--stop-file", os.devnull + "x"))
        self.steps = self.settings["steps"]

    def emit(self, kind, **data):
        line = json.dumps({"v": 1, "event": kind, "time": time.time(), **data})
        with self.events.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def started(self, first=0):
        self.emit(
            "started", pid=os.getpid(), steps=self.steps, first_step=first, pack_version="0", run_dir=str(self.run)
        )

    def step(self, number):
        loss = 1.0 / (number + 1)
        self.emit(
            "step",
            step=number,
            steps=self.steps,
            loss=loss,
            smoothed_loss=loss,
            lr=1e-4,
            seconds=0.1,
            eta=1.0,
            peak_memory=0,
        )

    def checkpoint(self, number):
        folder = self.run / "checkpoints"
        folder.mkdir(exist_ok=True)
        (folder / f"step-{number:08}.safetensors").write_bytes(b"checkpoint")
        self.emit("saved", step=number, what="checkpoint", file=f"checkpoints/step-{number:08}.safetensors")

    def sample(self, number):
        """Latents (1, 16, 8, 8) of zeros, as the trainer leaves them."""
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        size = 4 * 16 * 8 * 8
        header = json.dumps({"latent": {"dtype": "F32", "shape": [1, 16, 8, 8], "data_offsets": [0, size]}}).encode()
        path = folder / f"step-{number:08}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
        self.emit("sample", step=number, file=f"samples/{path.name}")

    def strengths(self, number):
        """Curves, and latents (8, 16, 8, 8) of zeros."""
        folder = self.run / "strengths"
        folder.mkdir(exist_ok=True)
        lists = {"strengths": [0.2, 0.6, 1.0, 1.2], "shown": [0.2, 0.7, 1.0, None], "drift": [0.1, 0.3, 0.45, 0.5]}
        pictures = {"file": f"step-{number:08}.safetensors", "strengths": [0.0, 0.6, 0.8, 1.0]}
        prompts = {"with_trigger": "a <c> dog", "without": "a dog"}
        table = {"schema": "qr-lora/strengths", "version": 1, **lists, "prompts": prompts, "pictures": pictures}
        (folder / f"step-{number:08}.json").write_text(json.dumps(table))
        size = 8 * 4 * 16 * 8 * 8
        header = json.dumps({"latent": {"dtype": "F32", "shape": [8, 16, 8, 8], "data_offsets": [0, size]}}).encode()
        path = folder / pictures["file"]
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
        self.emit("strengths", step=number, file=f"strengths/step-{number:08}.json", **lists)

    def newest(self):
        names = sorted(path.stem for path in (self.run / "checkpoints").glob("step-*.safetensors"))
        return int(names[-1].split("-")[1]) if names else 0

    def finish(self, source=ADAPTER, digest=None):
        if source is not None:
            shutil.copyfile(source, self.output)
        digest = digest or hashlib.sha256(self.output.read_bytes()).hexdigest()
        self.emit("finished", step=self.steps, file=self.output.name, sha256=digest)


def ok(fake):
    """Steps, a checkpoint on request, an adapter; goes on from its checkpoint."""
    first = fake.newest()
    fake.started(first)
    for number in range(first + 1, fake.steps + 1):
        if fake.stop_file.exists():
            if fake.part.get("deaf"):
                time.sleep(3600)
            fake.checkpoint(number - 1)
            fake.emit("stopped", step=number - 1, checkpoint=f"checkpoints/step-{number - 1:08}.safetensors")
            return 3
        fake.step(number)
        if fake.part.get("sample_every") and number % fake.part["sample_every"] == 0:
            fake.sample(number)
        print(f"step {number}", flush=True)
        time.sleep(fake.part.get("seconds", 0.001))
    if fake.part.get("strengths"):
        fake.strengths(fake.steps)
    fake.finish()
    return 0


def crash(fake):
    fake.started()
    fake.step(1)
    fake.checkpoint(1)
    raise RuntimeError("the fake trainer broke")


def failed(fake):
    fake.started()
    fake.emit("failed", reason="loss", message="the loss is NaN at step 7; lower learning_rate")
    return 1


def killed(fake):
    fake.started()
    fake.step(1)
    print("about to be killed", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def memory(fake):
    fake.started()
    fake.step(1)
    resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
    return len(bytearray(2 << 30))


def garbage(fake):
    with fake.events.open("ab") as file:
        for _ in range(200):
            file.write(os.urandom(300) + b"\n{]}\n" + b'{"v": 1, "event": "step"}\n')
        file.write(b"x" * (3 << 20))
    sys.stdout.buffer.write(os.urandom(200_000))
    print("end of garbage", flush=True)
    return 0


def hang(fake):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fake.started()
    print("hanging", flush=True)
    time.sleep(3600)


def silent(fake):
    return 0


def stale(fake):
    """Reports the adapter that lies there already, of an earlier start."""
    fake.started()
    digest = hashlib.sha256(fake.output.read_bytes()).hexdigest() if fake.output.exists() else "0" * 64
    fake.emit("finished", step=fake.steps, file=fake.output.name, sha256=digest)
    return 0


def touched(fake):
    """Brings an old file back under the reported name."""
    fake.started()
    fake.finish()
    os.utime(fake.output, (1e9, 1e9))
    return 0


def wrong_sum(fake):
    fake.started()
    fake.finish(digest="0" * 64)
    return 0


def cut(fake):
    fake.started()
    fake.output.write_bytes(ADAPTER.read_bytes()[:5000])
    fake.finish(source=None)
    return 0


def not_finite(fake):
    """A NaN in the last four bytes of the last tensor."""
    fake.started()
    fake.output.write_bytes(ADAPTER.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    fake.finish(source=None)
    return 0


def elsewhere(fake):
    fake.started()
    fake.emit("finished", step=fake.steps, file="../../elsewhere.safetensors", sha256="0" * 64)
    return 0


def full_disk(fake):
    fake.started()
    fake.step(1)
    with (fake.run / "checkpoints.tmp").open("wb") as file:
        while True:
            file.write(b"\0" * (1 << 20))


def family(fake):
    """Children and grandchildren, in sessions of their own too; then it crashes, or hangs."""
    fake.started()
    sleep = [sys.executable, "-c", "import time; time.sleep(3600)  # qrlora-fake-child"]
    nest = [sys.executable, "-c", f"import subprocess; subprocess.run({sleep!r})"]
    subprocess.Popen(nest)
    subprocess.Popen(nest, start_new_session=True)
    subprocess.Popen(sleep)
    time.sleep(1.5)
    fake.step(1)
    if fake.part.get("then") == "crash":
        os._exit(1)
    time.sleep(3600)


def settings_refused(fake):
    print("settings: rank is 0, expected 1 to 3072", file=sys.stderr, flush=True)
    return 2


def check(fake):
    if fake.part.get("check") == "slow":
        time.sleep(3600)
    if fake.part.get("check") == "broken":
        raise ImportError("No module named 'torch'")
    report = {**CHECK, "problems": fake.part.get("problems", [])}
    print("a library says hello")
    print(json.dumps(report), flush=True)
    return 1 if report["problems"] else 0


def hold_lifeline():
    """End when whoever holds the other end of standard input is gone."""
    while os.read(0, 65_536):  # not sys.stdin: its lock would break the end of the interpreter
        pass
    os._exit(7)


def main():
    arguments = sys.argv[1:]
    start = next(index for index, value in enumerate(arguments) if value.endswith("start.py"))
    command, arguments = arguments[start + 1], arguments[start + 2 :]
    fake = Fake(arguments)
    if command == "check":
        return check(fake)
    if "--lifeline" in arguments and not fake.part.get("deaf"):
        threading.Thread(target=hold_lifeline, daemon=True).start()
    return globals()[fake.part["scenario"]](fake)


if __name__ == "__main__":
    sys.exit(main())
