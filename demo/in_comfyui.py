"""The demo in a real ComfyUI: the graph trains, merges, samples and draws the sheet, in a scratch base directory."""

import json
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from demo import server as instance
from demo.server import Server, WorkflowError
from demo.workflow import editable

from .concepts import CONTENT, PACK, STYLE, Settings, draw_picture
from .graph import CONCEPTS, Graph, graph, renamed, with_defaults
from .model import WEIGHTS

PAGE, PAGE_PACK = "toy_flux", "qrlora_demo"  # a workflow, and a pack without nodes that offers it as a template


def run(
    host: Path,
    out: Path,
    settings: Settings,
    seed: int,
    grid: str,
    train: Callable[[], None],
    show: Callable[[], bool],
    wait: bool,
) -> bool:
    """The story in ComfyUI; sheet, pictures and adapters are copied to `out`, and `show` then tells the numbers.

    Args:
        host: ComfyUI's folder.
        out: where results go.
        settings: of the training, widgets of Train and of its options.
        seed, grid: of the sheet.
        train: trains from the shell into `out`; for a pack without a Train node.
        show: what comes after the sheet; its answer is this function's.
        wait: keep the server, with its page open, until Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="qr-lora-demo-", ignore_cleanup_errors=True) as scratch:
        base = make_base(Path(scratch) / "base")
        print(f"starting ComfyUI from {host} (the first time takes a while)", flush=True)
        with Server(host, base) as server:
            in_graph = "QRLoRATrain" in server.get("/object_info")
            if not in_graph:
                train()
                for concept in CONCEPTS.values():
                    shutil.copy(out / f"{concept.name}.safetensors", base / "models" / "qrlora")
            workflow = graph(settings, seed, grid, in_graph)
            offer_page(server, workflow)
            entry = queued(server, workflow, int(settings["steps"]))
            collect(base, entry, out, in_graph)
            good = show()
            print(f"\nlog      {server.log}")
            print(f"page     {server.url}/?template={PAGE}&source={PAGE_PACK}   (turn alpha and beta, press Run)")
            if wait and sys.stdin.isatty():
                keep(server)
    return good


def make_base(folder: Path) -> Path:
    """A base directory with the toy, its two pictures, this pack and the toy's helper pack. Nothing else is touched."""
    names = ("models/diffusion_models", "models/qrlora", "models/loras", "models/vae", "input", "output")
    for name in (*names, f"custom_nodes/{PAGE_PACK}/example_workflows", "user/default/workflows"):
        (folder / name).mkdir(parents=True)
    shutil.copy(WEIGHTS, folder / "models" / "diffusion_models")
    for concept in (CONTENT, STYLE):
        draw_picture(concept, folder / "input")
    packs = folder / "custom_nodes"
    instance.link(PACK, packs / "qr-lora")
    instance.link(PACK / "demo" / "comfy_pack", packs / "qrlora_toy")
    (packs / PAGE_PACK / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")
    return folder


def offer_page(server: Server, workflow: Graph) -> None:
    """The workflow in the browser's own form: as a template, and in the list of workflows."""
    text = json.dumps(editable(workflow, server.get("/object_info")), indent=1)
    for folder in (f"custom_nodes/{PAGE_PACK}/example_workflows", "user/default/workflows"):
        (server.base / folder / f"{PAGE}.json").write_text(text, encoding="utf-8")


def queued(server: Server, workflow: Graph, steps: int, timeout: float = 1800) -> dict[str, Any]:
    """Run the workflow with a progress bar for each training; its history entry.

    Raises:
        WorkflowError: it was refused, a node failed, or it took longer than `timeout` seconds.
    """
    workflow = with_defaults(workflow, server.get("/object_info"))
    numbers = {name: str(number) for number, name in enumerate(workflow, 1)}  # as on the page, whose panels then know
    names = {number: name for name, number in numbers.items()}
    body = json.dumps({"prompt": renamed(workflow, numbers), "client_id": "demo"}).encode()
    request = urllib.request.Request(f"{server.url}/prompt", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            ticket = json.load(answer)["prompt_id"]
    except urllib.error.HTTPError as error:
        raise WorkflowError(error.read().decode()) from error
    trains = any(one["class_type"] == "QRLoRATrain" for one in workflow.values())
    bars: dict[str, Any] = {}
    until = time.monotonic() + timeout
    try:
        while time.monotonic() < until and server.process.poll() is None:
            entry = server.get(f"/history/{ticket}").get(ticket)
            if trains:
                show_progress(server.get("/qrlora/train/state")["jobs"], steps, bars, names)
            if entry and entry["status"]["status_str"] == "error":
                raise WorkflowError(json.dumps(entry["status"]["messages"]))
            if entry and entry["status"]["completed"]:
                return {**entry, "outputs": {names[number]: value for number, value in entry["outputs"].items()}}
            time.sleep(0.5)
    finally:
        for bar in bars.values():
            bar.close()
    raise WorkflowError(f"no answer within {timeout:g} s:\n{server.tail()}")


def show_progress(jobs: list[dict[str, Any]], steps: int, bars: dict[str, Any], names: dict[str, str]) -> None:
    """One bar per training, made when its first step is done."""
    for job in jobs:
        taken = [event for event in job["events"] if event["event"] == "step"]
        if taken and job["node"] not in bars:
            bars[job["node"]] = tqdm(total=steps, desc=f"training {names[job['node']]}", unit="step")
        if taken:
            bars[job["node"]].update(taken[-1]["step"] - bars[job["node"]].n)
            bars[job["node"]].set_postfix(loss=f"{taken[-1]['smoothed_loss']:.4f}")


def keep(server: Server) -> None:
    """Leave the server running, with its page open, until Ctrl-C."""
    webbrowser.open(f"{server.url}/?template={PAGE}&source={PAGE_PACK}")
    print("\nComfyUI keeps running; press Ctrl-C to end it and remove the scratch folder.", flush=True)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        return
    print(f"ComfyUI ended by itself:\n{server.tail()}", file=sys.stderr)


def collect(base: Path, entry: dict[str, Any], out: Path, in_graph: bool) -> None:
    """Copy what the run made to the folder of the results."""
    sheet = entry["outputs"]["sweep_sheet"]["images"][0]
    shutil.copy(base / "output" / sheet["subfolder"] / sheet["filename"], out / "sheet.png")
    for concept in CONCEPTS.values():
        shutil.copy(base / "input" / f"{concept.name}.png", out)
        if in_graph:
            shutil.copy(base / "output" / "qrlora" / f"{concept.name}.safetensors", out)
