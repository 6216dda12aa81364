"""One training step: ours, a peft LoRA of the same rank on the same layers, and the published layer, in one run.

    python -m benchmarks.train_step                                   a mid-size FLUX on this machine's processor
    python -m benchmarks.train_step --families                        a small model of every family in turn
    python -m benchmarks.train_step --real --device cuda --storage fp8 --pixels 1024          FLUX.1-dev's size

All sides run in turn on one frozen base model with random weights, with the same batch, loss and AdamW. Time: forward,
backward and optimizer; on a processor in seconds of it that this process used, so that other work beside it does not
count. Memory: the most that one step needs above the frozen base and what is trained (GPU: the allocator's peak;
processor: growth of the process' peak, Linux). Published layer: `W_res x + Q (R + dR) x`, with W_res in the place of W
and R + dR in the base's precision.
"""

import argparse
import ctypes
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.common import machine
from benchmarks.families import FAMILIES, POOLED
from benchmarks.flux import RandomSource
from qrlora_core import Basis, EncodedText, LayerTarget
from train.config import FitConfig
from train.data.batches import Batch
from train.model.backbones import Backbone
from train.model.backbones.flux import FLUX
from train.model.layer import inject
from train.model.source import BaseModel
from train.model.transformer import DTYPES, load_transformer
from train.run.denoise import denoising_loss
from train.run.optim import make_optimizer
from train.settings import make_config


class PublishedLinear(nn.Module):
    """The published layer: a residual weight plus Q (R + dR)."""

    def __init__(self, base: nn.Module, basis: Basis, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("q", basis.q.to(dtype))
        self.register_buffer("r", basis.r.to(dtype))
        self.delta_r = nn.Parameter(torch.zeros_like(basis.r, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        moved = self.r + self.delta_r.to(x.dtype)
        result: Tensor = self.base(x) + nn.functional.linear(nn.functional.linear(x, moved), self.q) * 1.0
        return result


def put_ours(model: Any, targets: tuple[LayerTarget, ...], rank: int, basis_of: Any, dtype: torch.dtype) -> None:
    inject(model, targets, basis_of, "delta_r_triangular", 1.0, device=model.device, dtype=dtype)


def put_peft(model: Any, targets: tuple[LayerTarget, ...], rank: int, basis_of: Any, dtype: torch.dtype) -> None:
    names = [target.name for target in targets]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
    device = model.device  # looks through all hooks of all modules each time
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float().to(device)


def put_published(model: Any, targets: tuple[LayerTarget, ...], rank: int, basis_of: Any, dtype: torch.dtype) -> None:
    model.requires_grad_(False)
    device = model.device
    for target in targets:
        parent, _, child = target.name.rpartition(".")
        owner = model.get_submodule(parent)
        basis = Basis(*(tensor.to(device) for tensor in basis_of(target.name)))
        owner.register_module(child, PublishedLinear(owner.get_submodule(child), basis, dtype))


SIDES = {"ours": put_ours, "peft": put_peft, "published": put_published}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="FLUX.1-dev's size; needs a GPU")
    parser.add_argument("--families", nargs="*", metavar="NAME", help=f"of {', '.join(FAMILIES)}; without names all")
    parser.add_argument("--heads", type=int, default=4, help="width of the families' models, in multiples of 128")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--storage", default="", help="bf16, fp8, int8, nf4, fp32 (default: the precision)")
    parser.add_argument("--precision", default="", help="bf16 or fp32 (default: fp32 on a CPU, bf16 elsewhere)")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations instead of recomputing them")
    args = parser.parse_args()
    args.precision = args.precision or ("fp32" if args.device == "cpu" else "bf16")
    args.storage = args.storage or args.precision
    print(machine())
    if args.families is None:
        sizes = (19, 38, 3072) if args.real else (2, 4, 512)
        source = RandomSource(*sizes, dtype=torch.bfloat16 if args.real else torch.float32)
        measure(args, source, FLUX, random_batch(args.pixels // 8, 512 if args.real else 128))
        return
    for name in args.families or FAMILIES:
        family = FAMILIES[name]
        print(f"\n{name}")
        with tempfile.TemporaryDirectory() as folder:
            model = BaseModel(family.write(Path(folder), args.heads))
            pooled = POOLED if family.pooled else 0
            side = args.pixels // family.pixels
            measure(
                args, model, model.backbone, random_batch(side, family.tokens, family.channels, family.text, pooled)
            )


def measure(args: argparse.Namespace, source: Any, backbone: Backbone, batch: Batch) -> None:
    device, dtype = torch.device(args.device), DTYPES[args.precision]
    model = load_transformer(source, args.storage, args.precision, device)
    if not args.no_checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    targets, bases = source.targets(), {}
    for target in targets:  # any orthonormal Q does for timing
        q = torch.linalg.qr(torch.randn(target.shape[0], args.rank, device=device)).Q
        bases[target.name] = Basis(q, torch.randn(args.rank, target.shape[1], device=device))
    config = make_config(FitConfig, {"model": "-", "data": "-", "run_dir": "-", "rank": args.rank, "weight_decay": 0.0})
    owners = {target.name: model.get_submodule(target.name) for target in targets}

    def restore() -> None:
        for name, layer in owners.items():
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).register_module(child, layer)

    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    memory: dict[str, list[float]] = {side: [] for side in SIDES}
    counts, states = {}, {}
    for index in range(args.rounds + 1):
        order = list(SIDES) if index % 2 else list(reversed(SIDES))
        for side in order:
            SIDES[side](model, targets, args.rank, bases.__getitem__, dtype)
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = make_optimizer(parameters, config)
            step(
                model, backbone, batch, config, optimizer, device, dtype
            )  # the optimizer's state and the allocator warm up
            before = peak(device, reset=True)
            clock = time.process_time if device.type == "cpu" else time.perf_counter
            start = clock()
            step(model, backbone, batch, config, optimizer, device, dtype)
            elapsed, grown = clock() - start, peak(device) - before
            if index:
                seconds[side].append(elapsed)
                memory[side].append(grown)
            counts[side] = sum(p.numel() for p in parameters)
            states[side] = sum(
                v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if v.ndim
            )
            restore()
            del optimizer, parameters
            gc.collect()
    report(seconds, memory, counts, states)


def step(
    model: Any,
    backbone: Backbone,
    batch: Batch,
    config: FitConfig,
    optimizer: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    denoising_loss(model, backbone, batch, config, device, dtype).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_batch(side: int, tokens: int, channels: int = 16, width: int = 4096, pooled: int = 768) -> Batch:
    """One picture of side x side latent pixels."""
    latents, noise = torch.randn(2, 1, channels, side, side)
    text = EncodedText(torch.randn(1, tokens, width), torch.randn(1, pooled) if pooled else None)
    return Batch(latents, noise, torch.tensor([0.5]), text, None)


def peak(device: torch.device, reset: bool = False) -> float:
    """MB at the highest point since the last reset; with `reset`, MB now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0.0
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would otherwise be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3


def report(seconds: Any, memory: Any, counts: Any, states: Any) -> None:
    medians = {side: (statistics.median(seconds[side]), statistics.median(memory[side])) for side in SIDES}
    for side, (time_taken, grown) in medians.items():
        print(
            f"{side:>10}  {time_taken:8.3f} s/step (best {min(seconds[side]):.3f})  {grown:9.1f} MB for a step  "
            f"{counts[side] / 1e6:8.3f} M trained  {states[side] / 1e6:8.1f} MB optimizer"
        )
    for side in ("peft", "published"):
        ratios = [a / b for a, b in zip(seconds["ours"], seconds[side])]
        print(
            f"ratio ours / {side:<10} time {statistics.median(ratios):.3f}  memory of a step "
            f"{medians['ours'][1] / max(medians[side][1], 1e-3):.3f}  trained {counts['ours'] / counts[side]:.3f}  "
            f"optimizer {states['ours'] / states[side]:.3f}"
        )


if __name__ == "__main__":
    main()
