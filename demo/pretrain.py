"""Pre-trains the toy FLUX on drawn pictures; the result is `toy_flux.safetensors`.

    python -m demo.pretrain [--out toy] [--seed 0] [--device cuda]

Flow matching as in FLUX. In some captions the shape, or the colour and the texture, are replaced by a word that says
nothing, so that the model draws something whole for words that it does not know. Deterministic given seed, device,
number of threads and version of torch: batches and noise are drawn on the CPU.
"""

import argparse
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks.common import machine

from .layout import save_comfy
from .model import WEIGHTS, load_toy, new_model, pack, sample, velocity
from .pictures import caption, combinations, draw
from .reader import accuracy
from .toy.features import TEXT_LENGTH, TEXT_WIDTH, pooled, to_latents, word_feature

# First everywhere, by whole tokens (4 pixels), where shapes and textures are learned whatever the place; the model is
# too small to agree with itself on one place in this time, so that it then learns to draw in the middle.
EVERYWHERE = tuple(itertools.product((-4, 0, 4), repeat=2))
MIDDLE = ((0, 0),)


class Batch(NamedTuple):
    """One step's training data: tokens (batch, 64, 64), noise alike, sigma (batch,), text features."""

    tokens: Tensor
    noise: Tensor
    sigma: Tensor
    features: Tensor


def batches(size: int, places: Sequence[tuple[int, int]], generator: torch.Generator) -> Iterator[Batch]:
    """Endless random batches of the combinations that are not held out, at `places`."""
    looks, _ = combinations()
    tokens = pack(to_latents(torch.stack([draw(look, place) for look in looks for place in places])))
    names = torch.stack([torch.stack([word_feature(word) for word in look]) for look in looks])  # (looks, 3, width)
    while True:
        picks = torch.randint(len(tokens), (size,), generator=generator)
        sigma = torch.sigmoid(torch.randn(size, generator=generator) + 0.3)  # most steps where shapes are decided
        noise = torch.randn(size, *tokens.shape[1:], generator=generator)
        yield Batch(tokens[picks], noise, sigma, spoilt(names[picks // len(places)], generator))


def spoilt(names: Tensor, generator: torch.Generator) -> Tensor:
    """Features (batch, TEXT_LENGTH, width) of captions (batch, 3, width), with meaningless words in some of them."""
    size = len(names)
    unknown = torch.randint(2, (size, 3, TEXT_WIDTH), generator=generator) * 2.0 - 1
    chance = torch.rand(size, 2, generator=generator)
    hidden = torch.cat([chance[:, :1], chance[:, 1:], chance[:, 1:]], 1) < 0.25  # colour and texture go together
    mixed = torch.where(hidden[..., None], unknown, names)
    mixed[:, 2] *= (~hidden[:, 2:]).float()  # one word stands for a whole style
    return functional.pad(mixed, (0, 0, 0, TEXT_LENGTH - 3))


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 150, cool_down: float = 0.3) -> float:
    """Up in a line, level, and down to nothing in a line over the last part."""
    return peak * min(1.0, (step + 1) / warm_up, (steps - step) / (steps * cool_down))


class Stage(NamedTuple):
    """One part of the pre-training: where shapes stand, how many steps, at what learning rate."""

    places: Sequence[tuple[int, int]]
    steps: int
    peak: float


def pretrain(
    model: nn.Module, stage: Stage, size: int, seed: int, on_step: Callable[[int, float, nn.Module], None]
) -> nn.Module:
    """Train `model` in place; the moving average of its weights, a model of its own.

    Args:
        model: fp32; all of it is trained.
        stage: what to do.
        size: of a batch.
        seed: of batches and noise.
        on_step: called after each step with its number from 1, its loss and the average so far.
    """
    device = next(model.parameters()).device
    decay, other = [], []
    for name, value in model.named_parameters():
        (decay if value.ndim == 2 and ".norm" not in name else other).append(value)
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.peak, betas=(0.9, 0.98), fused=True)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=_warm_average)
    source = batches(size, stage.places, torch.Generator().manual_seed(seed))
    for step in range(stage.steps):
        batch = Batch(*(part.to(device) for part in next(source)))
        sigma = batch.sigma[:, None, None]
        noisy = (1 - sigma) * batch.tokens + sigma * batch.noise
        guess = velocity(model, noisy, batch.sigma, batch.features, pooled(batch.features))
        loss = functional.mse_loss(guess, batch.noise - batch.tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.steps, stage.peak)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        on_step(step + 1, float(loss.detach()), average.module)
    return average.module


@torch.no_grad()
def _warm_average(averages: list[Tensor], values: list[Tensor], count: Tensor | int) -> None:
    """An exponential moving average that forgets the first steps faster."""
    torch._foreach_lerp_(averages, values, 1 - min(0.998, (1 + int(count)) / (10 + int(count))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("toy"), help="folder of the result and of what leads to it")
    parser.add_argument("--steps", type=int, nargs=2, default=(2500, 1000), help="shapes everywhere; in the middle")
    parser.add_argument("--lr", type=float, nargs=2, default=(1.5e-3, 1e-3), help="the same")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-every", type=int, default=500, help="steps between files and readings")
    parser.add_argument("--from-everywhere", type=Path, help="the first stage's file, to do only the second")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine())
    first, second = (Stage(*parts) for parts in zip((EVERYWHERE, MIDDLE), args.steps, args.lr))
    recipe = {"seed": str(args.seed), "batch": str(args.batch), "steps": str(args.steps), "lr": str(args.lr)}
    torch.manual_seed(args.seed)
    everywhere = args.from_everywhere or args.out / "everywhere.safetensors"
    if not args.from_everywhere:
        run(new_model(), first, args, everywhere, recipe)
    # from the file, in 16 bits, so that the second stage is the same whether or not the first one was just done
    run(load_toy(everywhere).requires_grad_(True), second, args, args.out / WEIGHTS.name, recipe)
    print(f"against the committed weights: {comparison(args.out / WEIGHTS.name, WEIGHTS)}")


def comparison(path: Path, other: Path) -> str:
    """Whether two files hold the same tensors, in words; the header's order may differ."""
    ours, theirs = load_file(path), load_file(other)
    if ours.keys() != theirs.keys() or any(ours[key].shape != theirs[key].shape for key in ours):
        return "other layers"
    largest = max(float((ours[key].float() - theirs[key].float()).abs().max()) for key in ours)
    return f"largest difference {largest:.3g}" if largest else "equal, bit for bit"


def run(model: nn.Module, stage: Stage, args: argparse.Namespace, path: Path, recipe: dict[str, str]) -> None:
    """One stage with a progress bar; every `save_every` steps the average is read and written to `path`."""
    losses: deque[float] = deque(maxlen=args.save_every)
    with tqdm(total=stage.steps, unit="step", desc=path.stem) as bar:

        def on_step(step: int, loss: float, average: nn.Module) -> None:
            losses.append(loss)
            bar.update()
            if step % args.save_every == 0 or step == stage.steps:
                save_comfy(average.state_dict(), path, recipe, torch.float16)
                shares = " ".join(f"{name} {share:.3f}" for name, share in seen_accuracy(average).items())
                bar.write(f"step {step}: loss {sum(losses) / len(losses):.4f}, read right: {shares}")

        pretrain(model.to(args.device), stage, args.batch, args.seed, on_step)


def seen_accuracy(model: nn.Module) -> dict[str, float]:
    """How well one sample of each combination of the training is read; see `reader.accuracy`."""
    looks, _ = combinations()
    return accuracy(sample(model, [caption(look) for look in looks], range(len(looks))), looks)


if __name__ == "__main__":
    main()
