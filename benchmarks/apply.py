"""Patching all 342 FLUX layers: Apply QR-LoRA against ComfyUI's stock LoRA loader, same file, same rank, in one run.

    COMFYUI_PATH=... <ComfyUI's python> -m benchmarks.apply [--hidden 768] [--rank 64] [--rounds 5]

Builds a FLUX with 19 double and 38 single blocks (smaller hidden size, random weights), writes one portable adapter,
and loads it both ways in turn. Time: from the file to the patched model (node and patching). Memory: growth of the
process' peak meanwhile (Linux). On hosts before 0.33 small models are not recognised.
"""

import argparse
import asyncio
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def start_host(base: Path) -> Any:
    """Import ComfyUI and load the pack as ComfyUI does; the pack's module."""
    host = os.environ.get("COMFYUI_PATH")
    if not host:
        sys.exit("set COMFYUI_PATH to ComfyUI's folder, and run this with its interpreter")
    sys.argv = ["main.py", "--base-directory", str(base)]
    sys.path.insert(0, host)
    import torch

    if not torch.cuda.is_available():
        sys.argv.append("--cpu")
    import comfy.options

    comfy.options.enable_args_parsing()
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module
    spec.loader.exec_module(module)
    asyncio.run(module.comfy_entrypoint())
    return module


def random_flux(hidden: int) -> dict[str, Any]:
    """A FLUX of FLUX.1's depth in ComfyUI's layout."""
    import torch

    shapes: dict[str, tuple[int, ...]] = {"img_in": (hidden, 64), "txt_in": (hidden, 64)}
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", 64)):
        shapes |= {f"{name}.in_layer": (hidden, width), f"{name}.out_layer": (hidden, hidden)}
    shapes |= {"final_layer.linear": (64, hidden), "final_layer.adaLN_modulation.1": (2 * hidden, hidden)}
    norms = []
    for block in range(19):
        for side in ("img", "txt"):
            at = f"double_blocks.{block}.{side}"
            shapes |= {f"{at}_attn.qkv": (3 * hidden, hidden), f"{at}_attn.proj": (hidden, hidden)}
            shapes |= {f"{at}_mlp.0": (4 * hidden, hidden), f"{at}_mlp.2": (hidden, 4 * hidden)}
            shapes[f"{at}_mod.lin"] = (6 * hidden, hidden)
            norms += [f"{at}_attn.norm.{kind}_norm.scale" for kind in ("query", "key")]
    for block in range(38):
        at = f"single_blocks.{block}"
        shapes |= {f"{at}.linear1": (7 * hidden, hidden), f"{at}.linear2": (hidden, 5 * hidden)}
        shapes[f"{at}.modulation.lin"] = (3 * hidden, hidden)
        norms += [f"{at}.norm.{kind}_norm.scale" for kind in ("query", "key")]
    state = {f"{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    return state | {name: torch.ones(128) for name in norms}


def peak(reset: bool = False) -> float:
    """Peak resident memory of this process in MB, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 128")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    start_host(folder)
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import torch
    from pack import qrlora_core as core
    from pack.nodes.apply import patch_model

    from benchmarks.common import machine

    print(machine())
    model = comfy.sd.load_diffusion_model_state_dict(random_flux(args.hidden))
    layers = {}
    for target in core.flux_targets(19, 38, args.hidden):
        q = torch.linalg.qr(torch.randn(target.shape[0], args.rank)).Q
        layers[target.name] = core.AdapterLayer(q, 0.01 * torch.randn(args.rank, target.shape[1]))
    file = core.save_adapter(core.Adapter.from_tensors("bench", layers, args.rank), folder / "bench.safetensors")
    del layers

    def stock() -> Any:
        lora = comfy.utils.load_torch_file(str(file), safe_load=True)
        return comfy.sd.load_lora_for_models(model, None, lora, 0.9, 0)[0]

    def ours() -> Any:
        return patch_model(model, core.MergeRecipe.of(core.open_adapter(file)), 0.9)[0]

    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    memory: dict[str, list[float]] = {"stock": [], "ours": []}
    weights = {"bare": model.model.diffusion_model.double_blocks[3].img_mlp[0].weight.clone()}
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    for index in range(args.rounds + 1):
        sides = [("stock", stock), ("ours", ours)]
        for side, make in sides if index % 2 else reversed(sides):
            comfy.model_management.load_models_gpu([model], force_full_load=True)  # back to the bare weights
            gc.collect()
            before, start = peak(reset=True), time.perf_counter()
            patched = make()
            comfy.model_management.load_models_gpu([patched], force_full_load=True)
            elapsed, grown = time.perf_counter() - start, peak() - before
            weights[side] = model.model.diffusion_model.double_blocks[3].img_mlp[0].weight.clone()
            if index:  # the first round warms both up
                seconds[side].append(elapsed)
                memory[side].append(grown)
            del patched
    assert torch.equal(weights["stock"], weights["ours"]) and not torch.equal(weights["ours"], weights["bare"])
    medians = {side: (statistics.median(seconds[side]), statistics.median(memory[side])) for side in seconds}
    for side, (time_taken, grown) in medians.items():
        print(f"{side:>6}  {time_taken:7.3f} s  {grown:8.1f} MB")
    (stock_time, stock_memory), (our_time, our_memory) = medians["stock"], medians["ours"]
    print(f"ratio ours / stock  time {our_time / stock_time:.3f}  memory {our_memory / stock_memory:.3f}")


if __name__ == "__main__":
    main()
