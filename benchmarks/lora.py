"""Load LoRA as dR against ComfyUI's stock loader: a LoRA of FLUX.1's size, from the file to what a node hands on.

    COMFYUI_PATH=... <ComfyUI's python> -m benchmarks.lora [--ranks 32,128] [--rounds 3] [--hidden 3072]

Writes a LoRA of every linear layer of the blocks as kohya's trainer does (304 modules of fused weights, bf16, with
alpha), and loads it in turn by both. The stock loader maps the file; ours reads it into memory, checks every number and
knows all layers. Orthonormal bases are made later, layer by layer, where a merge or a patch asks for them: the time for
all of them is printed, too.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.comfy import FLUX_1, flux_shapes, peak, start_host, write_flux

MOST = 2.0  # seconds that ours may take beyond the stock loader


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="32,128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--double", type=int, default=FLUX_1[0])
    parser.add_argument("--single", type=int, default=FLUX_1[1])
    parser.add_argument("--hidden", type=int, default=FLUX_1[2], help="a multiple of 128")
    parser.add_argument("--folder", type=Path, help="where files go (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> int:
    start_host(folder)
    import comfy.sd
    import torch

    from benchmarks.common import machine

    print(machine())
    # the stock loader asks the model for names only, so that a narrow one will do
    narrow = write_flux(folder / "flux.safetensors", (args.double, args.single, 128), torch.float32)
    model, slow = comfy.sd.load_diffusion_model(str(narrow)), 0
    for rank in map(int, args.ranks.split(",")):
        path = write_lora(folder / f"rank {rank}.safetensors", (args.double, args.single, args.hidden), rank)
        print(f"rank {rank}: {path.stat().st_size / 1e6:.0f} MB", flush=True)
        (stock, _), (ours, memory), (bases, most) = times(model, path, args.rounds)
        verdict = "" if ours - stock <= MOST else f", more than {MOST:g} s"
        print(f"stock {stock:.2f} s, ours {ours:.2f} s ({memory:.0f} MB at the peak): {ours - stock:+.2f} s{verdict}")
        print(f"all bases {bases:.2f} s ({most:.0f} MB at the peak)", flush=True)
        slow += ours - stock > MOST
        path.unlink()
    return slow


def times(model: Any, path: Path, rounds: int) -> list[tuple[float, float]]:
    """(median seconds, largest growth of memory in MB) of the stock loader, of ours, and of all bases then."""
    import comfy.sd
    import comfy.utils
    import folder_paths
    from pack.nodes.load_lora import LoadLoRA

    folder_paths.add_model_folder_path("loras", str(path.parent))
    held: list[Any] = []

    def stock() -> Any:
        lora = comfy.utils.load_torch_file(str(path), safe_load=True)
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)

    def ours() -> None:
        node = LoadLoRA.execute(path.name)
        held[:] = [node.args[0] if hasattr(node, "args") else node.result[0]]

    def bases() -> None:
        (adapter,) = held[0].adapters
        for name in adapter.layers:
            adapter.layer(name)

    ways: tuple[Callable[[], Any], ...] = (stock, ours, bases)
    seconds: list[list[float]] = [[] for _ in ways]
    grown: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for index, way in enumerate(ways):
            gc.collect()
            before, start = peak(reset=True), time.perf_counter()
            way()
            seconds[index].append(time.perf_counter() - start)
            grown[index].append(peak() - before)
        held.clear()
    return [(statistics.median(one), max(other)) for one, other in zip(seconds, grown)]


def write_lora(path: Path, size: tuple[int, int, int], rank: int) -> Path:
    """A LoRA in kohya's names with random numbers, one tensor in memory at a time."""
    import torch

    from qrlora_core.storage import TensorSpec
    from qrlora_core.writing import write_tensors

    shapes = {
        name.removesuffix(".weight").replace(".", "_"): shape
        for name, shape in flux_shapes(*size, 64, 64).items()
        if "_blocks." in name and len(shape) == 2
    }
    specs = {}
    for name, (out, width) in shapes.items():
        specs[f"lora_unet_{name}.lora_up.weight"] = TensorSpec(torch.bfloat16, (out, rank))
        specs[f"lora_unet_{name}.lora_down.weight"] = TensorSpec(torch.bfloat16, (rank, width))
        specs[f"lora_unet_{name}.alpha"] = TensorSpec(torch.float32, ())

    def tensors() -> Iterator[tuple[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        for name, spec in specs.items():
            drawn = torch.randn(spec.shape, generator=generator) * 0.01 if spec.shape else torch.tensor(rank / 2)
            yield name, drawn.to(spec.dtype)

    return write_tensors(path, specs, tensors(), {}, overwrite=True)


if __name__ == "__main__":
    raise SystemExit(main())
