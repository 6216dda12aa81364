"""Holding the base in few bits: the weight W itself, or what is left of it beside its largest directions.

    python -m benchmarks.residual_bits          the toy FLUX, which is a trained model, on this machine's processor

`W ~ few bits of W` against `W ~ Q R in bf16 + few bits of (W - Q R)`, as PiSSA (arXiv 2404.02948) and LoftQ (arXiv
2310.08659) hold it. Compared are the error of W, the error of the model's prediction, and what 100 steps on one picture
learn: the loss on the base as it is held, and on the true base that the adapter is applied to. Bits of bf16 for Q and R
are counted.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import machine
from demo.concepts import CONTENT, FIT, STYLE, draw_picture, write_cache
from demo.model import WEIGHTS
from qrlora_core import TrainingCache, decompose
from train.config import FitConfig
from train.data.batches import Sampler
from train.model.layer import inject, trained_parameters
from train.model.source import BaseModel
from train.model.transformer import load_transformer
from train.run.denoise import denoising_loss, prediction
from train.settings import make_config

CPU = torch.device("cpu")
# the sixteen values of NF4 (arXiv 2305.14314, appendix E)
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
DRAWS, BATCH = 32, 4


def as_fp8(weight: Tensor) -> Tensor:
    return weight.to(torch.float8_e4m3fn).float()


def as_int8(weight: Tensor) -> Tensor:
    """One scale for each row."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round() * scale


def as_nf4(weight: Tensor, size: int = 64) -> Tensor:
    """One scale for so many numbers."""
    blocks = weight.reshape(-1, size)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    nearest = (blocks / scale)[..., None].sub(NF4).abs().argmin(dim=-1)
    return (NF4[nearest] * scale).reshape(weight.shape)


FORMATS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "fp8": (as_fp8, 8),
    "int8": (as_int8, 8),
    "nf4": (as_nf4, 4.5),
    "nf4/16": (lambda weight: as_nf4(weight, 16), 5.0),  # as many bits as nf4 beside Q R of a fiftieth of the width
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16], help="columns of Q that are kept")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    print(machine())
    source = BaseModel(WEIGHTS)
    names = [target.name for target in source.targets()]
    weights = {name: source.weight(name).float() for name in names}
    print(f"{'held as':>10} {'kept':>5} {'bits':>6} {'error: W':>11} {'prediction':>14} {'loss':>8} {'on true W':>10}")
    with TemporaryDirectory() as folder:
        caches = []
        for concept in (STYLE, CONTENT):
            cache = Path(folder) / f"{concept.name}.safetensors"
            caches.append(write_cache(concept, draw_picture(concept, Path(folder)), cache))
        exact = Held("fp32", 0, dict(weights), 32.0)
        print(line(exact, exact, source, caches, args))
        for form, (quantised, bits) in FORMATS.items():
            for rank in (0, *args.ranks) if form in args.formats else ():
                print(line(held(form, rank, quantised, bits, weights), exact, source, caches, args), flush=True)


class Held:
    """Weights as a base is held: name -> the numbers that they stand for."""

    def __init__(self, form: str, rank: int, weights: dict[str, Tensor], bits: float) -> None:
        self.form, self.rank, self.weights, self.bits = form, rank, weights, bits


def held(form: str, rank: int, quantised: Callable[[Tensor], Tensor], bits: float, weights: dict[str, Tensor]) -> Held:
    """Every weight in a format, beside Q R of a rank in bf16; 0: alone."""
    result, spent, numbers = {}, 0.0, 0
    for name, weight in weights.items():
        spent, numbers = spent + bits * weight.numel(), numbers + weight.numel()
        if not rank:
            result[name] = quantised(weight)
            continue
        q, r = (part.bfloat16().float() for part in decompose(weight, rank, method="exact"))
        result[name] = q @ r + quantised(weight - q @ r)
        spent += 16 * rank * sum(weight.shape)
    return Held(form, rank, result, spent / numbers)


def line(held: Held, exact: Held, source: BaseModel, caches: list[Path], args: argparse.Namespace) -> str:
    errors = [float((held.weights[n] - w).norm() / w.norm()) for n, w in exact.weights.items()]
    losses = [learnt(held, exact, source, cache, seed, args.steps) for cache in caches for seed in range(args.seeds)]
    own, true = (statistics.mean(part) for part in zip(*losses))
    return (
        f"{held.form:>10} {held.rank or '-':>5} {held.bits:6.2f} {100 * statistics.mean(errors):10.3f}% "
        f"{100 * predicted(held, exact, source, caches[0]):13.3f}% {own:8.4f} {true:10.4f}"
    )


def model_of(held: Held, source: BaseModel) -> Any:
    model = load_transformer(source, "fp32", "fp32")
    put(model, held)
    return model


def put(model: Any, held: Held) -> None:
    with torch.no_grad():
        for name, weight in held.weights.items():
            layer = model.get_submodule(name)
            getattr(layer, "base", layer).weight.copy_(weight)


@torch.no_grad()
def predicted(held: Held, exact: Held, source: BaseModel, data: Path) -> float:
    """How far a prediction is from that of the true weights, relative to it."""
    sampler = Sampler(TrainingCache(data), config_of(0, 1))
    outputs = []
    for one in (held, exact):
        model, parts = model_of(one, source), []
        for draw in range(8):
            batch = sampler.fixed(draw, 8)
            mixed = source.backbone.process.mixed(batch.latents, batch.noise, batch.sigmas)
            parts.append(
                prediction(model, source.backbone, mixed, batch.sigmas, batch.text, 1.0, CPU, torch.float32).flatten()
            )
        outputs.append(torch.cat(parts))
    return float((outputs[0] - outputs[1]).norm() / outputs[1].norm())


def config_of(seed: int, steps: int) -> FitConfig:
    table = {"model": "-", "data": "-", "run_dir": "-", "steps": steps, "seed": seed}
    wanted = {key: value for key, value in FIT.items() if key in ("rank", "alpha", "learning_rate", "method")}
    return make_config(FitConfig, {**table, **wanted, "batch_size": BATCH})


def learnt(held: Held, exact: Held, source: BaseModel, data: Path, seed: int, steps: int) -> tuple[float, float]:
    """Validation losses after so many steps: on the base as it is held, and on the true one with the same adapter."""
    config = config_of(seed, steps)
    model, sampler = model_of(held, source), Sampler(TrainingCache(data), config)
    bases = {name: decompose(weight, config.rank, method="exact") for name, weight in exact.weights.items()}
    layers = inject(model, source.targets(), bases.__getitem__, config.method, config.scaling)
    optimizer = torch.optim.AdamW(trained_parameters(layers).values(), lr=config.learning_rate, weight_decay=1e-4)
    for number in range(steps):
        denoising_loss(model, source.backbone, sampler.batch(number), config, CPU, torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer in layers.values():
            layer.constrain()
    losses = []
    for one in (held, exact):
        put(model, one)
        with torch.no_grad():
            parts = [
                denoising_loss(model, source.backbone, sampler.fixed(draw, DRAWS), config, CPU, torch.float32)
                for draw in range(DRAWS)
            ]
        losses.append(float(torch.stack(parts).mean()))
    return losses[0], losses[1]


if __name__ == "__main__":
    main()
