"""The demo in a real ComfyUI: the graph trains, merges, samples and draws the sheet, in a scratch base directory."""

import json
import shutil
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import websocket
from tqdm import tqdm

from demo import server as instance
from demo.server import Server, WorkflowError
from qrlora_core import parse_scales

from .concepts import DEFAULT_PAIR, PACK, PAIRS, Pair, Settings, draw_picture
from .graph import MERGES, Graph, demo_page, graph, renamed, with_defaults
from .model import WEIGHTS

PAGE, PAGE_PACK = "toy_flux", "qrlora_demo"  # a workflow, and a pack without nodes that offers it as a template
CLIENT = "demo"


def run(
    host: Path,
    out: Path,
    settings: Settings,
    seed: int,
    grid: str,
    train: Callable[[], None],
    show: Callable[[], bool],
    wait: bool,
    pair: Pair = PAIRS[DEFAULT_PAIR],
) -> bool:
    """The story in ComfyUI; sheet, pictures, adapters and log go to `out`, and `show` then tells the numbers.

    Args:
        host: ComfyUI's folder.
        out: where results go.
        settings: of the training, widgets of Train and of its options.
        seed, grid: of the sheet.
        train: trains from the shell into `out`; for a pack without a Train node.
        show: what comes after the sheet; its answer is this function's.
        wait: keep the server, with its page open, until Ctrl-C.
        pair: what is trained and merged.
    """
    with tempfile.TemporaryDirectory(prefix="qr-lora-demo-", ignore_cleanup_errors=True) as scratch:
        base = make_base(Path(scratch) / "base", pair)
        server = Server(host, base, log=out / "comfyui.log")
        address = f"{server.url}/?template={PAGE}&source={PAGE_PACK}"
        print(f"page     {address}\n         answers in some ten seconds; watch the training there")
        print(f"log      {server.log}")
        if not wait:
            print("         ComfyUI ends with the demo: --no-wait was given, or this is not a terminal")
        print(f"starting ComfyUI from {host}", flush=True)
        with server:
            in_graph = "QRLoRATrain" in server.get("/object_info")
            if not in_graph:
                train()
                for concept in pair:
                    shutil.copy(out / f"{concept.name}.safetensors", base / "models" / "qrlora")
            workflow = graph(settings, seed, grid, in_graph, pair)
            offer_page(server, workflow, pair)
            print("the page is there", flush=True)
            if wait:
                webbrowser.open(address)
            pictures = len(MERGES) + len(parse_scales(grid, "")) ** 2
            entry = queued(server, workflow, int(settings["steps"]), pictures=pictures)
            collect(base, entry, out, in_graph, pair)
            good = show()
            print(f"\npage     {address}\n         turn alpha and beta, press Run")
            print(f"log      {server.log}", flush=True)
            if wait:
                keep(server)
            else:
                print("ComfyUI ends now, and the page with it", flush=True)
    return good


def make_base(folder: Path, pair: Pair = PAIRS[DEFAULT_PAIR]) -> Path:
    """A base directory with this pack, the toy and its two pictures. Nothing else is touched."""
    for name in ("models/diffusion_models", "models/qrlora", "models/loras", "models/vae", "input", "output"):
        (folder / name).mkdir(parents=True)
    for name in ("custom_nodes", "user/default/workflows"):
        (folder / name).mkdir(parents=True)
    instance.link(PACK, folder / "custom_nodes" / "qr-lora")
    add_toy(folder, pair)
    return folder


def add_toy(base: Path, pair: Pair = PAIRS[DEFAULT_PAIR]) -> None:
    """The toy's weights, its two pictures, and a pack without nodes that offers the demo's page as a template."""
    shutil.copy(WEIGHTS, base / "models" / "diffusion_models")
    for concept in pair:
        draw_picture(concept, base / "input")
    pack = base / "custom_nodes" / PAGE_PACK
    (pack / "example_workflows").mkdir(parents=True)
    (pack / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")


def offer_page(server: Server, workflow: Graph, pair: Pair = PAIRS[DEFAULT_PAIR]) -> None:
    """The workflow in the browser's own form: as a template, and in the list of workflows."""
    text = json.dumps(demo_page(workflow, server.get("/object_info"), pair), indent=1)
    for folder in (f"custom_nodes/{PAGE_PACK}/example_workflows", "user/default/workflows"):
        (server.base / folder / f"{PAGE}.json").write_text(text, encoding="utf-8")


def queued(
    server: Server, workflow: Graph, steps: int, timeout: float = 1800, pictures: int | None = None
) -> dict[str, Any]:
    """Run the workflow with a progress bar for each training and one for the pictures; its history entry.

    Raises:
        WorkflowError: it was refused, a node failed, or it took longer than `timeout` seconds.
    """
    workflow = with_defaults(workflow, server.get("/object_info"))
    numbers = {name: str(number) for number, name in enumerate(workflow, 1)}  # as on the page, whose panels then know
    names = {number: name for name, number in numbers.items()}
    socket = websocket.create_connection(f"ws{server.url[4:]}/ws?clientId={CLIENT}", timeout=0.5)
    bars = Bars(steps, pictures, names)
    try:
        ticket = server.submit(renamed(workflow, numbers), CLIENT)
        until = time.monotonic() + timeout
        while time.monotonic() < until and server.process.poll() is None:
            bars.hear(next_message(socket))
            entry = server.get(f"/history/{ticket}").get(ticket) if bars.quiet else None
            if entry and entry["status"]["status_str"] == "error":
                raise WorkflowError(reason(entry["status"]["messages"]))
            if entry and entry["status"]["completed"]:
                return {**entry, "outputs": {names[number]: value for number, value in entry["outputs"].items()}}
    finally:
        bars.close()
        socket.close()
    raise WorkflowError(f"no answer within {timeout:g} s:\n{server.tail()}")


def reason(messages: list[list[Any]]) -> str:
    """Which node failed, and why, in the host's messages about a prompt."""
    for kind, data in reversed(messages):
        if kind == "execution_error":
            return f"{data.get('node_type', 'a node')}: {data.get('exception_message', '').strip()}"
    return "interrupted" if any(kind == "execution_interrupted" for kind, _ in messages) else json.dumps(messages)


def next_message(socket: Any) -> dict[str, Any]:
    """What the server says next, {} when it says nothing for half a second or sends a picture."""
    try:
        data = socket.recv()
    except websocket.WebSocketTimeoutException:
        return {}
    return json.loads(data) if isinstance(data, str) and data else {"type": "preview"}


class Bars:
    """Progress in the terminal, from what the server tells a page: each training's steps, then pictures drawn.

    `quiet` says whether nothing was heard of late or a prompt ended: the moment to ask for the result.
    """

    def __init__(self, steps: int, pictures: int | None, names: dict[str, str]) -> None:
        self._steps, self._pictures, self._names = steps, pictures, names
        self._bars: dict[str, Any] = {}
        self.quiet = True

    def hear(self, message: dict[str, Any]) -> None:
        kind, data = message.get("type"), message.get("data", {})
        self.quiet = kind in (None, "execution_success", "execution_error", "execution_interrupted")
        if kind == "qrlora.train":
            taken = [event for event in data["events"] if event["event"] == "step"]
            if taken:
                bar = self._bar(data["node"], f"training {self._names[data['node']]}", "step", self._steps)
                bar.update(taken[-1]["step"] - bar.n)
                bar.set_postfix(loss=f"{taken[-1]['smoothed_loss']:.4f}")
        elif kind == "progress" and self._names.get(data.get("node"), "").endswith("_sample"):
            bar = self._bar("pictures", "drawing", "picture", self._pictures)
            bar.update(int(data["value"] == data["max"]))

    def _bar(self, key: str, title: str, unit: str, total: int | None) -> Any:
        if key not in self._bars:
            self._bars[key] = tqdm(total=total, desc=title, unit=unit)
        return self._bars[key]

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()


def keep(server: Server) -> None:
    """Leave the server running until Ctrl-C."""
    print("\nComfyUI keeps running; press Ctrl-C to end it and remove the scratch folder.", flush=True)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        return
    print(f"ComfyUI ended by itself:\n{server.tail()}", file=sys.stderr)


def collect(base: Path, entry: dict[str, Any], out: Path, in_graph: bool, pair: Pair = PAIRS[DEFAULT_PAIR]) -> None:
    """Copy what the run made to the folder of the results: the sheet, a picture of each merge, what was learned."""
    pictures = {"sweep_sheet": "sheet.png", **{f"{name}_picture": f"{name}.png" for name in MERGES}}
    for name, target in pictures.items():
        saved = entry["outputs"][name]["images"][0]
        shutil.copy(base / "output" / saved["subfolder"] / saved["filename"], out / target)
    for concept in pair:
        shutil.copy(base / "input" / f"{concept.name}.png", out)
        if in_graph:
            shutil.copy(base / "output" / "qrlora" / f"{concept.name}.safetensors", out)
