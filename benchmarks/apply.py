"""Apply QR-LoRA against ComfyUI's stock LoRA loaders: from two files to a model that samples, and after turning alpha.

    COMFYUI_PATH=... <ComfyUI's python> -m benchmarks.apply [--hidden 768] [--rank 64] [--rounds 5] [--real]

Builds a FLUX with random weights and two adapters on different bases, and does in one run, in turn:

- nodes: load, merge and apply (ours: patch and live; stock: two LoRA loaders), and again after turning alpha;
- patching: what the host then does to the weights (ours and stock patch; live touches none);
- a step: one evaluation of the model, bare, patched, live, and with the host's bypass loader;
- a sweep: memory that 25 merges and their patches hold.

With --real at FLUX.1-dev's size in fp8 (generated; patching is left out, it takes minutes on a processor).
"""

import argparse
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.comfy import FLUX_1, peak, resident, size_arguments, start_host, write_adapter, write_flux

REAL_DISK, REAL_RAM, NODES_RAM = 16e9, 20e9, 6e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latent", type=int, default=32, help="side of the latents in the step")
    parser.add_argument("--no-step", action="store_true", help="leave the evaluations of the model out")
    parser.add_argument("--folder", type=Path, help="where files go (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.real and (missing := lacking(Path(folder), args.no_step)):
            raise SystemExit(f"--real is skipped: {missing}")
        measure(args, Path(folder))


def lacking(folder: Path, no_step: bool) -> str:
    """What this machine lacks for FLUX.1's size, or an empty string."""
    import psutil

    disk, ram = shutil.disk_usage(folder).free, psutil.virtual_memory().available
    if disk < REAL_DISK:
        return f"it needs {REAL_DISK / 1e9:.0f} GB of disk, {disk / 1e9:.0f} GB are free"
    needed = NODES_RAM if no_step else REAL_RAM
    return f"it needs {needed / 1e9:.0f} GB of RAM, {ram / 1e9:.0f} GB are free" if ram < needed else ""


def measure(args: argparse.Namespace, folder: Path) -> None:
    start_host(folder)
    import comfy.model_management as management
    import comfy.sd
    import torch

    from benchmarks.common import machine

    size = FLUX_1 if args.real else (args.double, args.single, args.hidden)
    print(machine())
    file = write_flux(folder / "flux.safetensors", size, torch.float8_e4m3fn if args.real else torch.float32)
    paths = [write_adapter(folder / f"{seed}.safetensors", size, args.rank, seed) for seed in (1, 2)]
    model = comfy.sd.load_diffusion_model(str(file))
    rounds = 1 if args.real else args.rounds
    table = node_times(model, paths, rounds)
    print(f"25 merges of two bases and their patches hold {sweep_memory(model, paths):.1f} MB", flush=True)
    if not args.no_step:
        table |= step_times(model, paths, rounds, args.latent)
    if not args.real:
        table |= patch_times(model, paths, rounds)
    for name, (seconds, memory) in table.items():
        print(f"{name:<38} {seconds:9.3f} s {memory:10.1f} MB")
    print_ratios(table)
    management.unload_all_models()


def sides(model: Any, paths: list[Path]) -> dict[str, Callable[[float], Any]]:
    """Name -> what the nodes of one way do, from files to a model, with that alpha."""
    import comfy.sd
    import comfy.utils
    from pack import qrlora_core as core
    from pack.nodes.host.application import apply_recipe

    held: list[Any] = []  # as ComfyUI's cache holds what nodes gave

    def ours(mode: str) -> Callable[[float], Any]:
        def run(alpha: float) -> Any:
            style, content = (core.MergeRecipe.of(core.open_adapter(path)) for path in paths)
            for adapter in (*style.adapters, *content.adapters):
                adapter.basis_fingerprint  # noqa: B018 - shown by the loader
            merged = core.merge(style, alpha, content, 1.0)
            core.merge_report(merged)
            patched = apply_recipe(model, merged, 1.0, None, mode)[0]
            held[:] = [style, content, patched]  # until the next run has made its own
            return patched

        return run

    def stock(load: Any) -> Callable[[float], Any]:
        def run(alpha: float) -> Any:
            patched = model
            for path, strength in zip(paths, (alpha, 1.0)):
                lora = comfy.utils.load_torch_file(str(path), safe_load=True)
                patched = load(patched, None, lora, strength, 0)[0]
            return patched

        return run

    found = {"patch": ours("patch"), "live": ours("live"), "stock": stock(comfy.sd.load_lora_for_models)}
    bypass = getattr(comfy.sd, "load_bypass_lora_for_models", None)
    return found | ({"bypass": stock(bypass)} if bypass else {})


def node_times(model: Any, paths: list[Path], rounds: int) -> dict[str, tuple[float, float]]:
    """From the files to the patched model, and after turning alpha; nothing is loaded to a device here."""
    table = {}
    for name, run in sides(model, paths).items():
        first, turned, grown = [], [], []
        for index in range(rounds):
            gc.collect()
            before = peak(reset=True)
            first.append(timed(run, 0.5))
            grown.append(peak() - before)
            turned.append(timed(run, 0.75 + index))
        table[f"nodes, {name}, from two files"] = (statistics.median(first), statistics.median(grown))
        table[f"nodes, {name}, after turning alpha"] = (statistics.median(turned), 0.0)
    return table


def step_times(model: Any, paths: list[Path], rounds: int, latent: int) -> dict[str, tuple[float, float]]:
    """One evaluation of the model; the ways in turn, so that other work on the machine meets all alike."""

    ways = {"bare": lambda _: model, **sides(model, paths)}
    if rounds == 1:
        ways = {name: ways[name] for name in ("bare", "live")}  # patching FLUX.1 takes minutes on a processor
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    grown: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, make in ways.items():
            patched = make(0.5)
            load(patched)
            if rounds > 1:  # the first evaluation of a way warms it up
                evaluate(patched, latent)
            before = peak(reset=True)
            seconds[name].append(timed(evaluate, patched, latent))
            grown[name].append(peak() - before)
            gc.collect()
    return {f"step, {name}": (statistics.median(seconds[name]), statistics.median(grown[name])) for name in ways}


def evaluate(model: Any, latent: int) -> Any:
    """One forward pass as the sampler makes it."""
    import torch

    device, dtype = model.load_device, torch.float32
    width = model.model.diffusion_model.txt_in.weight.shape[1]
    pooled = model.model.diffusion_model.vector_in.in_layer.weight.shape[1]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(device, dtype)

    options = {"wrappers": model.wrappers, **model.model_options.get("transformer_options", {})}
    model.pre_run()
    with torch.inference_mode():
        result = model.model.apply_model(
            draw(1, 16, latent, latent),
            torch.tensor([0.7], device=device),
            c_crossattn=draw(1, 64, width),
            y=draw(1, pooled),
            guidance=torch.tensor([3.5], device=device),
            transformer_options=options,
        )
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result


def patch_times(model: Any, paths: list[Path], rounds: int) -> dict[str, tuple[float, float]]:
    """What the host does to the weights when the model is loaded."""

    chosen = {name: run for name, run in sides(model, paths).items() if name in ("patch", "stock", "live")}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    grown: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, make in chosen.items():
            load(model)  # back to the bare weights
            patched = make(0.5)
            gc.collect()
            before = peak(reset=True)
            seconds[name].append(timed(load, patched))
            grown[name].append(peak() - before)
    return {f"patching, {name}": (statistics.median(seconds[name]), statistics.median(grown[name])) for name in chosen}


def sweep_memory(model: Any, paths: list[Path]) -> float:
    """MB that 25 merges and the patches of each hold, beside the two adapters."""
    from pack import qrlora_core as core
    from pack.nodes.host.application import patch_model

    style, content = (core.MergeRecipe.of(core.open_adapter(path)) for path in paths)
    patch_model(model, core.merge(style, 1.0, content, 1.0), 1.0)  # everything is read once
    gc.collect()
    before = resident()
    cells = core.sweep(style, "0:1:0.25", content, "0:1:0.25")
    clones = [patch_model(model, cell.recipe, 1.0)[0] for cell in cells]
    held = resident() - before
    assert len(clones) == 25
    return held


def load(model: Any) -> None:
    """As the sampler does before it starts: the model and what belongs to it."""
    import comfy.model_management as management

    management.load_models_gpu([model, *model.get_nested_additional_models()], force_full_load=True)


def timed(work: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def print_ratios(table: dict[str, tuple[float, float]]) -> None:
    pairs = [
        ("nodes, patch, from two files", "nodes, stock, from two files"),
        ("nodes, live, after turning alpha", "nodes, stock, after turning alpha"),
        ("patching, patch", "patching, stock"),
        ("step, live", "step, bare"),
        ("step, patch", "step, bare"),
        ("step, bypass", "step, bare"),
    ]
    for one, other in pairs:
        if one in table and other in table:
            print(f"{one} / {other.split(', ')[1]}: {table[one][0] / max(table[other][0], 1e-9):.3f}")


if __name__ == "__main__":
    main()
