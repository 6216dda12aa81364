"""A real ComfyUI for the tests and the demo: found, given a scratch folder of its own, started, asked, ended."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

PACK = Path(__file__).resolve().parents[1]
GOLDEN = PACK / "tests" / "golden"
FRONTEND = "COMFYUI_FRONTEND"  # the folder `static` of a comfyui-frontend-package, where it is not to be the host's own
HOW_TO = "no ComfyUI found: set COMFYUI_PATH to its folder (and COMFYUI_PYTHON to its interpreter)"


def find_host() -> Path | None:
    """COMFYUI_PATH, or the folder two levels up when the pack sits in custom_nodes."""
    if os.environ.get("COMFYUI_PATH"):
        path = Path(os.environ["COMFYUI_PATH"]).expanduser()
        if not (path / "main.py").is_file():
            raise FileNotFoundError(f"COMFYUI_PATH is {path}, where there is no main.py")
        return path
    above = PACK.parents[1]
    return above if PACK.parent.name == "custom_nodes" and (above / "main.py").is_file() else None


def interpreter(host: Path) -> str:
    """COMFYUI_PYTHON, or the host's own environment, or that of the main host (for older ones), or this one."""
    if os.environ.get("COMFYUI_PYTHON"):
        return os.environ["COMFYUI_PYTHON"]
    for home in (host, find_host()):
        for folder in (".venv", "venv"):
            own = home and home / folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
            if own and own.is_file():
                return str(own)
    return sys.executable


def make_base(folder: Path) -> Path:
    """A base directory with the golden files, a small VAE, this pack and the helper pack. Nothing else is touched."""
    models = {"diffusion_models": ["base_bfl"], "qrlora": [], "loras": [], "vae": []}
    models["qrlora"] = [path.stem for path in GOLDEN.glob("official_*.safetensors") if "merged" not in path.name]
    for kind, names in models.items():
        (folder / "models" / kind).mkdir(parents=True)
        for name in names:
            shutil.copy(GOLDEN / f"{name}.safetensors", folder / "models" / kind)
    for name in ("input", "output", "custom_nodes", "user/default/workflows"):
        (folder / name).mkdir(parents=True)
    shutil.copy(GOLDEN / "tensors.safetensors", folder / "input")
    save_file(small_vae(), folder / "models" / "vae" / "test_vae.safetensors")
    link(PACK, folder / "custom_nodes" / "qr-lora")
    link(PACK / "tests" / "host" / "helper_pack", folder / "custom_nodes" / "qrlora_test_helpers")
    return folder


def link(source: Path, target: Path) -> None:
    """A link, or where links need a privilege (Windows) a copy of what git tracks."""
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))


def small_vae() -> dict[str, torch.Tensor]:
    """Random weights in the layout of a 16-channel tiny autoencoder, which VAELoader takes like any other VAE."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def conv(name: str, out: int, width: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = 0.06 * torch.randn(out, width, 3, 3, generator=generator)
        if bias:
            state[f"{name}.bias"] = torch.zeros(out)

    def block(name: str) -> None:
        for part in (0, 2, 4):
            conv(f"{name}.conv.{part}", 64, 64)

    conv("taesd_decoder.1", 64, 16)
    for index in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        block(f"taesd_decoder.{index}")
    for index in (7, 12, 17):
        conv(f"taesd_decoder.{index}", 64, 64, bias=False)
    conv("taesd_decoder.19", 3, 64)
    conv("taesd_encoder.0", 64, 3)
    for index in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        block(f"taesd_encoder.{index}")
    for index in (2, 6, 10):
        conv(f"taesd_encoder.{index}", 64, 64, bias=False)
    conv("taesd_encoder.14", 16, 64)
    state["vae_scale"], state["vae_shift"] = torch.tensor(0.3611), torch.tensor(0.1159)
    return state


class Server:
    """A ComfyUI server on loopback, over a base directory of its own."""

    def __init__(
        self,
        host: Path,
        base: Path,
        environment: dict[str, str] | None = None,
        log: Path | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.base, self.log = f"http://127.0.0.1:{port}", base, log or base / "server.log"
        command = [interpreter(host), "main.py", "--cpu", "--disable-api-nodes", "--base-directory", str(base)]
        command += ["--listen", "127.0.0.1", "--port", str(port), "--database-url", "sqlite:///:memory:", *arguments]
        if frontend := os.environ.get(FRONTEND):
            command += ["--front-end-root", frontend]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=host, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
            )

    def __enter__(self) -> "Server":
        until = time.monotonic() + 180
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not start:\n{self.tail()}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, values: dict):
        """The answer to a JSON body, None when it is empty.

        Raises:
            WorkflowError: an error status, with the host's words.
        """
        body = json.dumps(values).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise WorkflowError(error.read().decode()) from error
        return json.loads(text) if text.strip() else None

    def queue(self, workflow: dict) -> dict:
        """Run a workflow in API form; its history entry: `outputs`, `status` with the messages.

        Raises:
            WorkflowError: it was refused or a node failed, with the host's words.
        """
        return self.wait(self.submit(workflow))

    def submit(self, workflow: dict, client: str = "") -> str:
        """Queue a workflow; its prompt id."""
        return self.post("/prompt", {"prompt": workflow, "client_id": client or uuid.uuid4().hex})["prompt_id"]

    patience = 120.0  # seconds for a prompt

    def wait(self, ticket: str) -> dict:
        """The history entry of a prompt, once it ended."""
        until = time.monotonic() + self.patience
        while time.monotonic() < until and self.process.poll() is None:
            entry = self.get(f"/history/{ticket}").get(ticket)
            if entry and entry["status"]["completed"]:
                return entry
            if entry and entry["status"]["status_str"] == "error":
                raise WorkflowError(json.dumps(entry["status"]["messages"]))
            time.sleep(0.1)
        raise WorkflowError(f"no answer within {self.patience:.0f} s:\n{self.tail()}")


class WorkflowError(RuntimeError):
    """A workflow was refused, or one of its nodes failed."""


def ran(entry: dict) -> set[str]:
    """Ids of the nodes that were executed, not taken from the cache."""
    cached = {
        node for kind, data in entry["status"]["messages"] if kind == "execution_cached" for node in data["nodes"]
    }
    return set(entry["prompt"][2]) - cached
