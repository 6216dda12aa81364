"""Comparing two FLUX.1 adapters of 342 layers: the published way against ours, time and memory, in one run.

    python -m benchmarks.similarity [--rank 64] [--folder SCRATCH] [--plot]

Published way: both files read whole, then cosines of the flattened Q, dR and R. Ours reads layer by layer, and adds
updates, principal angles, norms and signs. The two adapters are random, in the published format, and are written to a
scratch folder first (1.3 GB each at rank 64). Memory is the anonymous part of the resident set: pages of the files
themselves can be dropped at any time. It is measured on Linux only.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.common import machine
from qrlora_core import Adapter, AdapterLayer, Basis, flux_targets, open_adapter, save_adapter, similarity_report


def adapter(seed: int, rank: int) -> Adapter:
    """Random layers in the shapes of FLUX.1; equal bases for every seed."""
    layers = {}
    for index, target in enumerate(flux_targets(19, 38, 3072)):
        shared = torch.Generator().manual_seed(index)
        q = torch.randn(target.shape[0], rank, generator=shared) / target.shape[0] ** 0.5
        r = torch.randn(rank, target.shape[1], generator=shared).triu()
        own = torch.Generator().manual_seed(1000 * seed + index)
        layers[target.name] = AdapterLayer(q, 1e-3 * torch.randn(r.shape, generator=own), Basis(q, r))
    return Adapter.from_tensors(f"random{seed}", layers, rank)


def anonymous_memory() -> float:
    """Megabytes of memory that belong to no file; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def published(paths: Sequence[Path]) -> tuple[dict[str, float], float]:
    """Cosines of all matrices, and the memory held for them."""
    before = anonymous_memory()
    one, two = (load_file(path) for path in paths)
    cosines = {
        key: float(torch.nn.functional.cosine_similarity(one[key].view(-1), two[key].view(-1), dim=0))
        for key in one
        if key in two
    }
    return cosines, anonymous_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--folder", help="where the two adapters are written; a temporary folder by default")
    parser.add_argument("--plot", action="store_true", help="draw the picture too (needs matplotlib)")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = [Path(folder) / f"random{seed}.safetensors" for seed in (1, 2)]
        for seed, path in enumerate(paths, 1):
            save_adapter(adapter(seed, args.rank), path, format="published")
        for path in paths:
            path.read_bytes()  # both sides find the files in the page cache
        peak, before = 0.0, anonymous_memory()

        def watched(names: Sequence[str]) -> Iterator[str]:
            nonlocal peak
            for name in names:
                yield name
                peak = max(peak, anonymous_memory() - before)

        start = time.perf_counter()
        a, b = (open_adapter(path) for path in paths)
        report = similarity_report(a, b, watched)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        cosines, held = published(paths)
        theirs = time.perf_counter() - start
        gap = max(
            abs(entry["cosine"]["delta_r"] - cosines[f"transformer.{entry['name']}.lora.delta_r.weight"])
            for entry in report["layers"]
            if entry["cosine"]["delta_r"] is not None
        )
        print(f"published  {theirs:6.1f} s  {held:7.0f} MB  three cosines")
        print(f"ours       {ours:6.1f} s  {peak:7.0f} MB  the whole report, {len(report['layers'])} layers")
        print(f"largest difference of a cosine of dR: {gap:.1e}")
        if args.plot:
            from qrlora_plots import similarity_png

            start = time.perf_counter()
            size = len(similarity_png(report))
            print(f"picture    {time.perf_counter() - start:6.1f} s  {size / 1e3:7.0f} kB")


if __name__ == "__main__":
    main()
