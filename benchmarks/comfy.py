"""ComfyUI inside a benchmark: the host and the pack imported, FLUX models of any size with random weights, adapters."""

import argparse
import asyncio
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEAD = 128
_DRAWN = 3_145_739  # a prime, so that rows do not repeat
FLUX_1 = (19, 38, 3072)  # double blocks, single blocks, hidden size


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


def size_arguments(parser: argparse.ArgumentParser) -> None:
    """`--double`, `--single`, `--hidden`, `--rank`, and `--real` for FLUX.1's own."""
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 128")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--real", action="store_true", help="FLUX.1-dev's size, stored in fp8: 12 GB of disk and RAM")


def flux_shapes(double: int, single: int, hidden: int, text: int, pooled: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a FLUX.1 in ComfyUI's layout."""
    layers: dict[str, tuple[int, int]] = {"img_in": (hidden, 64), "txt_in": (hidden, text)}
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", pooled)):
        layers |= {f"{name}.in_layer": (hidden, width), f"{name}.out_layer": (hidden, hidden)}
    layers |= {"final_layer.linear": (64, hidden), "final_layer.adaLN_modulation.1": (2 * hidden, hidden)}
    norms = []
    for block in range(double):
        for side in ("img", "txt"):
            at = f"double_blocks.{block}.{side}"
            layers |= {f"{at}_attn.qkv": (3 * hidden, hidden), f"{at}_attn.proj": (hidden, hidden)}
            layers |= {f"{at}_mlp.0": (4 * hidden, hidden), f"{at}_mlp.2": (hidden, 4 * hidden)}
            layers[f"{at}_mod.lin"] = (6 * hidden, hidden)
            norms += [f"{at}_attn.norm.{kind}_norm.scale" for kind in ("query", "key")]
    for block in range(single):
        at = f"single_blocks.{block}"
        layers |= {f"{at}.linear1": (7 * hidden, hidden), f"{at}.linear2": (hidden, 5 * hidden)}
        layers[f"{at}.modulation.lin"] = (3 * hidden, hidden)
        norms += [f"{at}.norm.{kind}_norm.scale" for kind in ("query", "key")]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | dict.fromkeys(norms, (HEAD,))


def write_flux(path: Path, size: tuple[int, int, int], dtype: Any, text: int = 64, pooled: int = 64) -> Path:
    """A FLUX with random weights as a single file, matrices of blocks in `dtype`; one tensor in memory at a time.

    One block of random numbers fills all of them: drawing 12 billion takes minutes, and their values do not matter.
    """
    import torch

    from qrlora_core.storage import TensorSpec
    from qrlora_core.writing import write_tensors

    shapes = flux_shapes(*size, text, pooled)
    specs = {
        name: TensorSpec(dtype if len(shape) == 2 and "blocks" in name else torch.bfloat16, shape)
        for name, shape in shapes.items()
    }

    def tensors() -> Iterator[tuple[str, Any]]:
        drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0))
        for name, shape in shapes.items():
            if len(shape) == 1:
                yield name, torch.ones(shape) if name.endswith("scale") else torch.zeros(shape)
            else:
                numbers = shape[0] * shape[1]
                filled = (drawn / math.sqrt(shape[1])).to(specs[name].dtype).repeat(-(-numbers // _DRAWN))
                yield name, filled[:numbers].view(shape)

    return write_tensors(path, specs, tensors(), {}, overwrite=True)


def write_adapter(path: Path, size: tuple[int, int, int], rank: int, seed: int, scale: float = 0.01) -> Path:
    """A portable adapter on a random basis; equal seeds give equal bases."""
    import torch

    import qrlora_core as core

    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for target in core.flux_targets(*size):
        q = torch.linalg.qr(torch.randn(target.shape[0], rank, generator=generator)).Q
        layers[target.name] = core.AdapterLayer(q, scale * torch.randn(rank, target.shape[1], generator=generator))
    return core.save_adapter(core.Adapter.from_tensors(path.stem, layers, rank), path, overwrite=True)


def peak(reset: bool = False) -> float:
    """Peak resident memory of this process in MB, since the last reset (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0.0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3


def resident() -> float:
    """Memory of this process that is its own, in MB, files it has mapped left out (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("RssAnon:")[1].split()[0]) / 1e3 if status.is_file() else 0.0
