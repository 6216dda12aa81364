"""Decomposing FLUX.1's 342 weights: our fast way against the published one, energy and time, in one run.

    python -m benchmarks.decompose [--device cuda] [--repeat 2] [--all]

Published way: full SVD, the core U_r S_r V_r^T formed, QR of the whole core. Weights are random Gaussian matrices: the
flattest spectrum there is, so the hardest case for an iterative method. A few of each shape are measured, and the
totals are extrapolated to FLUX.1's counts; `--all` really decomposes all 342 the fast way.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import machine
from qrlora_core import Basis, core_energy, decompose

SHAPES = {(3072, 3072): 266, (12288, 3072): 38, (3072, 12288): 38}


def published(weight: Tensor, rank: int) -> Basis:
    """As the published scripts do it: everything at full size."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    core = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    q, r = torch.linalg.qr(core)
    return Basis(q[:, :rank], r[:rank])


def timed(work: Callable[[], Basis], device: torch.device) -> tuple[float, Basis]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=2, help="weights of each shape")
    parser.add_argument("--all", action="store_true", help="decompose all 342 the fast way, one after another")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(machine())
    decompose(torch.randn(1024, 1024, device=device), args.rank, method="fast")  # load the libraries
    totals = {"published": 0.0, "ours": 0.0}
    worst = 1.0
    for shape, count in SHAPES.items():
        seconds: dict[str, list[float]] = {"published": [], "ours": []}
        for seed in range(args.repeat):
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
            ours, fast = timed(lambda w=weight: decompose(w, args.rank, method="fast"), device)
            theirs, exact = timed(lambda w=weight: published(w, args.rank), device)
            seconds["ours"].append(ours)
            seconds["published"].append(theirs)
            worst = min(worst, core_energy(weight, fast.q) / core_energy(weight, exact.q))
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        for side, value in medians.items():
            totals[side] += count * value
        ratio = medians["published"] / medians["ours"]
        print(f"{shape!s:>15}  published {medians['published']:7.3f} s  ours {medians['ours']:7.3f} s  {ratio:5.1f} x")
    print(f"342 layers (extrapolated)  published {totals['published']:.0f} s  ours {totals['ours']:.0f} s")
    print(f"ratio {totals['published'] / totals['ours']:.1f} x at {worst:.5f} of the optimal energy or more")
    if args.all:
        start = time.perf_counter()
        for shape, count in SHAPES.items():
            weight = torch.randn(shape, device=device)
            for _ in range(count):
                decompose(weight, args.rank, method="fast")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(f"342 layers (measured)  ours {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
