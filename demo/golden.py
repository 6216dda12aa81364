"""The demo: the main job on a small FLUX, and a table of differences to what the published code computed.

python -m demo.golden [--no-wait] [--headless]    in a real ComfyUI where one is found, otherwise with diffusers

COMFYUI_PATH says where ComfyUI is; without it, the folder two levels up (a pack inside custom_nodes) and ~/ComfyUI
are tried.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from demo import golden_in_comfyui as demo_host
from demo.server import find_host
from demo.small_flux import ALPHA_BETA, GOLDEN, golden_flux, golden_output, golden_tensors, own_weight, with_weights
from qrlora_core import Adapter, MergeRecipe, merge, merge_report, merged_adapter, open_adapter

TOLERANCE = 1e-4


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 when every output equals the published one to 1e-4, 1 when one does not, 2 on a wrong setting."""
    parser = argparse.ArgumentParser(
        prog="dev.py demo --golden", description="The merge, in ComfyUI or with diffusers."
    )
    parser.add_argument("--no-wait", action="store_true", help="end after the table instead of keeping ComfyUI open")
    parser.add_argument("--headless", action="store_true", help="use diffusers even where a ComfyUI is found")
    args = parser.parse_args(argv)
    try:
        host = None if args.headless else installed_host()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    if host is not None:
        os.environ["COMFYUI_PATH"] = str(host)  # where the host's part of the demo looks
        return demo_host.main(["--no-wait"] if args.no_wait else [])
    print("with diffusers" + ("" if args.headless else "; no ComfyUI found (COMFYUI_PATH may name one)"), flush=True)
    return headless()


def installed_host() -> Path | None:
    """The ComfyUI to use: the one that `find_host` knows, or the one in the home folder."""
    home = Path.home() / "ComfyUI"
    return find_host() or (home if (home / "main.py").is_file() else None)


def headless() -> int:
    """Merge the two published adapters at each alpha and beta, run the model, print the table."""
    style, content = (
        MergeRecipe.of(open_adapter(GOLDEN / f"official_{name}.safetensors")) for name in ("style", "content")
    )
    golden = golden_tensors()
    print(f"\n{'job':<34} {'difference':>11} {'what it changes':>16}")
    worst = row("base model, no adapter", golden_output(golden_flux()), golden["base.out"])
    for alpha, beta in ALPHA_BETA:
        recipe = merge(style, alpha, content, beta)
        output = golden_output(with_weights(patched_weights(merged_adapter(recipe))))
        worst = max(worst, row(f"alpha {alpha:g}, beta {beta:g}", output, golden[f"merged.{alpha}.{beta}.out"]))
    report = merge_report(merge(style, 1.0, content, 1.0))
    bases = f"{report.shared} on one basis, {report.joint} on a joint basis"
    print(f"\n{report.layers} layers, {bases}, rank {report.rank}")
    print(f"{'equal' if worst <= TOLERANCE else 'NOT EQUAL'} to the published outputs within {TOLERANCE:g}")
    return 0 if worst <= TOLERANCE else 1


def row(title: str, output: Tensor, expected: Tensor) -> float:
    """Print one line of the table; the largest difference, infinite when the output is not finite."""
    difference = float((output - expected).abs().max())
    effect = float((expected - golden_tensors()["base.out"]).abs().max())
    print(f"{title:<34} {difference:>11.2e} {effect:>16.2e}", flush=True)
    return difference if math.isfinite(difference) else math.inf  # max() would drop a NaN


def patched_weights(adapter: Adapter) -> dict[str, Tensor]:
    """Layer name -> W + alpha / k * up @ down, (out, in), for the golden base."""
    weights = {}
    for name in adapter.layers:
        up, down, alpha = adapter.update(name)
        weights[name] = torch.addmm(own_weight(name, adapter), up.float(), down.float(), alpha=alpha / up.shape[1])
    return weights


if __name__ == "__main__":
    sys.exit(main())
