"""Comparing two FLUX.1 adapters of 342 layers: the published way against ours, time and memory, in one run.

    python -m benchmarks.similarity [--rank 64] [--folder SCRATCH] [--plot] [--threads 1]

Published way: both files read whole, then cosines of the flattened Q, dR and R. Ours reads layer by layer, and adds
updates, principal angles, norms and signs. The adapters are random, in the published format, and are written to a
scratch folder first (1.3 GB each at rank 64): two on one basis, as adapters of one base are, and one on another. Each
side runs in a process of its own. Memory is the growth of the anonymous part of the resident set: pages of mapped files
can be dropped at any time. It is measured on Linux only (/proc).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import machine
from qrlora_core import Adapter, AdapterLayer, Basis, flux_targets, save_adapter

CHILD = """
import json, sys, time
from pathlib import Path
import torch
from qrlora_core import open_adapter, similarity_report
from safetensors.torch import load_file
side, one, two, threads, plot = sys.argv[1:]
torch.set_num_threads(int(threads))
def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1e3
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak = anonymous()
found = {}
def watched(names):
    global peak
    for name in names:
        yield name
        peak = max(peak, anonymous())
start = time.perf_counter()
if side == "published":
    files = [load_file(path) for path in (one, two)]
    for key in files[0]:
        pair = [file[key].view(-1) for file in files]
        found[key] = float(torch.nn.functional.cosine_similarity(*pair, dim=0))
    peak = anonymous()
else:
    report = similarity_report(open_adapter(Path(one)), open_adapter(Path(two)), watched)
    for entry in report["layers"]:
        found[f"transformer.{entry['name']}.lora.delta_r.weight"] = entry["cosine"]["delta_r"]
seconds = time.perf_counter() - start
if side != "published" and plot == "1":
    from qrlora_plots import similarity_png
    start = time.perf_counter()
    similarity_png(report)
    print(f"picture {time.perf_counter() - start:.1f} s", file=sys.stderr)
print(json.dumps({"seconds": seconds, "mb": peak - before, "cosines": found}))
"""


def adapter(seed: int, basis_seed: int, rank: int) -> Adapter:
    """Random layers in the shapes of FLUX.1; equal basis seeds give equal bases."""
    layers = {}
    for index, target in enumerate(flux_targets(19, 38, 3072)):
        shared = torch.Generator().manual_seed(1000 * basis_seed + index)
        q = torch.randn(target.shape[0], rank, generator=shared) / target.shape[0] ** 0.5
        r = torch.randn(rank, target.shape[1], generator=shared).triu()
        own = torch.Generator().manual_seed(1000 * seed + index)
        layers[target.name] = AdapterLayer(q, 1e-3 * torch.randn(r.shape, generator=own), Basis(q, r))
    return Adapter.from_tensors(f"random{seed}", layers, rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--folder", help="where the adapters are written; a temporary folder by default")
    parser.add_argument("--plot", action="store_true", help="draw the picture too (needs matplotlib)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = [Path(folder) / f"{name}.safetensors" for name in ("one", "same", "other")]
        for path, (seed, basis) in zip(paths, ((1, 0), (2, 0), (3, 1))):
            save_adapter(adapter(seed, basis, args.rank), path, format="published")
            path.read_bytes()  # every side finds the files in the page cache
        for title, second in (("one basis", paths[1]), ("two bases", paths[2])):
            results = {}
            for side in ("published", "ours"):
                command = [sys.executable, "-c", CHILD, side, paths[0], second, str(args.threads), str(int(args.plot))]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results[side] = json.loads(done.stdout)
                print(f"{title}  {side:<9}  {results[side]['seconds']:6.1f} s  {results[side]['mb']:7.0f} MB")
            ours = results["ours"]["cosines"]
            gap = max(abs(value - results["published"]["cosines"][key]) for key, value in ours.items())
            print(f"{title}  largest difference of a cosine of dR: {gap:.1e}")


if __name__ == "__main__":
    main()
