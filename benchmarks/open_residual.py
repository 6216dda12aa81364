"""Opening a residual of FLUX.1's real size: seconds and memory, against reading it.

    python -m benchmarks.open_residual [--folder DIR] [--layers 342]

Writes a sparse file of about 21.5 GB with the right header (it takes next to no room on a file system with sparse
files), opens it in a fresh process and looks at the growth of that process. The other side, the library's load_file, is
run on the first layers only, and extrapolated: reading all of it is what must not happen. Linux only (/proc).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import machine
from qrlora_core import flux_targets
from qrlora_core.formats import RESIDUAL
from qrlora_core.storage import TensorSpec
from qrlora_core.writing import header_bytes

CHILD = """
import json, sys, time
from pathlib import Path
from qrlora_core import Residual
from safetensors.torch import load_file
def resident():
    pages = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]
    return int(pages) / 1e3
before, start = resident(), time.perf_counter()
if sys.argv[1] == "ours":
    residual = Residual(Path(sys.argv[2]))
    held, layers = residual, len(residual.layers)
else:
    held = {key: value.clone() for key, value in load_file(sys.argv[2]).items()}
    layers = len(held)
print(json.dumps({"seconds": time.perf_counter() - start, "mb": resident() - before, "layers": layers}))
"""


def sparse_file(path: Path, layers: int) -> int:
    """A residual file whose data are a hole; its size in bytes."""
    targets = flux_targets(19, 38, 3072)[:layers]
    specs = {RESIDUAL.format(target.name): TensorSpec(torch.float32, target.shape) for target in targets}
    with path.open("wb") as file:
        header = header_bytes(specs, {})
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))
    return path.stat().st_size


def measured(side: str, path: Path) -> dict[str, float]:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, side, str(path)], cwd=root, capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the sparse file is made (default: the temporary folder)")
    parser.add_argument("--layers", type=int, default=342)
    parser.add_argument("--read", type=int, default=24, help="layers that are really read on the other side")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        whole, part = Path(folder) / "whole.safetensors", Path(folder) / "part.safetensors"
        size, part_size = sparse_file(whole, args.layers), sparse_file(part, args.read)
        ours, theirs = measured("ours", whole), measured("read", part)
    scale = size / part_size
    print(f"file {size / 1e9:.1f} GB, {ours['layers']} layers")
    print(f"opened  {ours['seconds']:8.3f} s  {ours['mb']:10.1f} MB")
    print(
        f"read    {theirs['seconds'] * scale:8.3f} s  {theirs['mb'] * scale:10.1f} MB  (from {part_size / 1e9:.1f} GB)"
    )
    times, sizes = theirs["seconds"] * scale / ours["seconds"], theirs["mb"] * scale / max(ours["mb"], 0.1)
    print(f"ratio   {times:.0f} x  {sizes:.0f} x")


if __name__ == "__main__":
    main()
