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

from tests.host import instance
from tests.host.graph import editable, input_specs, is_widget
from tests.host.instance import Server, WorkflowError

from .comfy_pack.features import SIZE
from .concepts import CONTENT, ENLARGED, FIT, MERGED_PROMPT, PACK, STYLE, Settings, draw_picture
from .model import STEPS, WEIGHTS

PAGE, PAGE_PACK = "toy_flux", "qrlora_demo"  # a workflow, and a pack without nodes that offers it as a template
CONCEPTS = {"style": STYLE, "content": CONTENT}
Graph = dict[str, dict[str, Any]]


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
    instance.link(PACK / "benchmarks" / "toy" / "comfy_pack", packs / "qrlora_toy")
    (packs / PAGE_PACK / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")
    return folder


def graph(settings: Settings, seed: int, grid: str, in_graph: bool = True) -> Graph:
    """The workflow in API form: train (or load) both, then one merge to play with, and the sweep."""
    side = SIZE * ENLARGED
    widgets = {name: value for name, value in settings.items() if name in FIT}
    options = {name: value for name, value in settings.items() if name not in FIT}
    nodes: Graph = {
        "model": node("UNETLoader", unet_name=WEIGHTS.name, weight_dtype="default"),
        "clip": node("QRLoRAToyTextEncoder"),
        "vae": node("QRLoRAToyVAE"),
        **(trained(widgets, options) if in_graph else loaded()),
        "prompt": node("CLIPTextEncode", text=MERGED_PROMPT, clip=["clip", 0]),
        "noise": node("EmptySD3LatentImage", width=side, height=side, batch_size=1),
        "merge": node(
            "QRLoRAMerge",
            delta_r_style=["style", 0],
            alpha=1.0,
            delta_r_content=["content", 0],
            beta=1.0,
            on_basis_mismatch="stack",
        ),
        "sweep": node(
            "QRLoRAScaleSweep",
            delta_r_style=["style", 0],
            alphas=grid,
            delta_r_content=["content", 0],
            betas=grid,
            on_basis_mismatch="stack",
        ),
    }
    for name in ("merge", "sweep"):
        nodes[f"{name}_apply"] = node("QRLoRAApply", model=["model", 0], delta_r=[name, 0], strength=1.0)
        nodes[f"{name}_sample"] = node(
            "KSampler",
            model=[f"{name}_apply", 0],
            positive=["prompt", 0],
            negative=["prompt", 0],
            latent_image=["noise", 0],
            seed=seed,
            steps=STEPS,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )
        nodes[f"{name}_decode"] = node("VAEDecode", samples=[f"{name}_sample", 0], vae=["vae", 0])
    nodes["merge_picture"] = node("SaveImage", images=["merge_decode", 0], filename_prefix="merged")
    nodes["sweep_sheet"] = node(
        "QRLoRAContactSheet",
        images=["sweep_decode", 0],
        labels=["sweep", 1],
        columns=0,
        max_size=512,
        title=["sweep", 2],
        filename_prefix="sheet",
    )
    return nodes


def trained(widgets: Settings, options: Settings) -> Graph:
    """The two pictures, and a Train node for each."""
    nodes: Graph = {"options": node("QRLoRATrainOptions", **options)}
    for name, concept in CONCEPTS.items():
        nodes[f"{name}_picture"] = node("LoadImage", image=f"{concept.name}.png")
        nodes[name] = node(
            "QRLoRATrain",
            model_name=WEIGHTS.name,
            clip=["clip", 0],
            vae=["vae", 0],
            dataset="none",
            instance_prompt=concept.prompt,
            trigger=concept.trigger,
            resolution=SIZE * ENLARGED,
            output_name=concept.name,
            images=[f"{name}_picture", 0],
            options=["options", 0],
            **widgets,
        )
    return nodes


def loaded() -> Graph:
    """The two adapters from their files."""
    return {
        name: node("QRLoRALoadDeltaR", delta_r_name=f"{concept.name}.safetensors") for name, concept in CONCEPTS.items()
    }


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


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


def renamed(workflow: Graph, names: dict[str, str]) -> Graph:
    """The same workflow with other ids."""
    return {
        names[name]: {
            **one,
            "inputs": {
                key: [names[value[0]], value[1]] if isinstance(value, list) else value
                for key, value in one["inputs"].items()
            },
        }
        for name, one in workflow.items()
    }


def with_defaults(workflow: Graph, object_info: dict[str, Any]) -> Graph:
    """The workflow with every widget that it does not mention at its default, as the browser would send it."""
    result: Graph = {}
    for name, one in workflow.items():
        specs = input_specs(object_info[one["class_type"]])
        widgets = {key: spec[1] for key, spec in specs.items() if is_widget(spec) and len(spec) > 1}
        defaults = {key: options["default"] for key, options in widgets.items() if "default" in options}
        result[name] = {**one, "inputs": {**defaults, **one["inputs"]}}
    return result


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
