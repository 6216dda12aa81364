"""Products in fp8 against casting an fp8 weight for each product: time, error, and what training makes of it.

    python -m benchmarks.fp8_products [--device cuda] [--tokens 4608] [--steps 100]

Layers have FLUX.1's shapes, weights drawn with FLUX.1's spread and rounded to fp8 on both sides; the error is against
that weight multiplied in float32, so it is that of rounding the inputs. Then the demo's content is trained on the toy
FLUX with its base in float32, in fp8 cast, and in fp8 with products in fp8: the loss of fixed draws at the end, and how
far dR then lies from that of the float32 base. A processor multiplies fp8 slowly; its times say nothing of a card.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.common import machine
from demo.concepts import DEFAULT_PAIR, FIT, PAIRS, draw_picture, write_cache
from demo.model import WEIGHTS
from qrlora_core import open_adapter
from train.model.fp8 import FP8, cast_linear, fp8_linear, require_fp8_products

SHAPES = {"attention": (3072, 3072), "feed-forward up": (12288, 3072), "feed-forward down": (3072, 12288)}
SPREAD = 0.02  # of FLUX.1's weights
SIDES = {
    "fp32": ["--base-storage=fp32", "--precision=bf16"],
    "fp8, cast": ["--base-storage=fp8", "--precision=bf16"],
    "fp8, products in fp8": ["--base-storage=fp8", "--precision=bf16", "--fp8-products"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, help="rows of the input (default: 4608 on a card, 256 on a processor)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100, help="of the trainings, 0: none")
    args = parser.parse_args()
    device = torch.device(args.device)
    require_fp8_products(device)
    print(machine())
    print(f"{'layer':<20}{'cast':>12}{'fp8':>12}{'fp8 / cast':>12}{'error, cast':>14}{'error, fp8':>14}")
    for name, shape in SHAPES.items():
        layer(name, shape, args.tokens or (256 if device.type == "cpu" else 4608), args.rounds, device)
    if args.steps:
        trainings(args.steps, args.device)


def layer(name: str, shape: tuple[int, int], tokens: int, rounds: int, device: torch.device) -> None:
    """One line: seconds of both products, in turn, and their errors."""
    generator = torch.Generator().manual_seed(0)
    weight = (SPREAD * torch.randn(shape, generator=generator)).to(FP8).to(device)
    x = torch.randn(tokens, shape[1], generator=generator).to(device, torch.bfloat16)
    exact = x.float() @ weight.float().mT
    made: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {}
    ways: dict[str, Callable[..., Tensor]] = {"cast": cast_linear, "fp8": fp8_linear}
    for _ in range(rounds):
        for way, product in ways.items():
            start = time.perf_counter()
            made[way] = product(x, weight, None, x.dtype)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.setdefault(way, []).append(time.perf_counter() - start)
    errors = [float((made[way].float() - exact).norm() / exact.norm()) for way in ways]
    cast, fp8 = (median(seconds[way]) for way in ways)
    print(f"{name:<20}{cast:>10.4f} s{fp8:>10.4f} s{fp8 / cast:>12.3f}{errors[0]:>14.4f}{errors[1]:>14.4f}")


def trainings(steps: int, device: str) -> None:
    """The demo's content by the trainer's own command, with the base held in each way."""
    concept = PAIRS[DEFAULT_PAIR].content
    found: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory(prefix="qr-lora-fp8-") as scratch:
        data = write_cache(concept, draw_picture(concept, Path(scratch)), Path(scratch) / "data.safetensors")
        print(f"\n{'base':<24}{'loss before':>14}{'loss after':>14}{'dR from that of fp32':>24}")
        for index, (name, flags) in enumerate(SIDES.items()):
            run = Path(scratch) / str(index)
            settings = {**FIT, "steps": steps, "validate_every": steps, "validation_draws": 64, "device": device}
            paths = {"model": WEIGHTS, "data": data, "run_dir": run, "basis_cache": Path(scratch) / "bases"}
            flags = [f"--{key.replace('_', '-')}={value}" for key, value in {**settings, **paths}.items()] + flags
            events = run.with_suffix(".jsonl")
            subprocess.run(
                [sys.executable, "-m", "train", "fit", *flags, f"--events={events}", "--strengths=off"],
                check=True,
                stderr=subprocess.DEVNULL,
            )
            lines = [json.loads(line) for line in events.read_text().splitlines()]
            losses = [line["loss"] for line in lines if line["event"] == "validation"]
            first = [line["loss"] for line in lines if line["event"] == "step"][:5]
            adapter = open_adapter(run / "adapter.safetensors")
            found[name] = torch.cat([adapter.layer(key).down.flatten() for key in adapter.layers])
            reference = next(iter(found.values()))
            away = float((found[name] - reference).norm() / reference.norm())
            print(f"{name:<24}{sum(first) / len(first):>14.5f}{losses[-1]:>14.5f}{100 * away:>22.1f} %")


if __name__ == "__main__":
    main()
