"""The study's base: the demo's toy FLUX, trained on until it also knows the words of EXTRAS."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from demo.layout import save_comfy
from demo.model import WEIGHTS, load_toy, pack, velocity
from demo.pictures import combinations
from demo.pretrain import Batch, learning_rate
from demo.toy.features import TEXT_LENGTH, TEXT_WIDTH, pooled, to_latents, word_feature

from .pictures import draw
from .protocol import EXTRAS

BATCH, PEAK = 32, 1e-3


class Lesson(NamedTuple):
    """One part of the training; the next one starts from its file.

    Attributes:
        steps: how many.
        unknown: share of the captions with a word that says nothing for the shape; as many for the style.
        bare: pictures without an extra word for each one with "walled" (and with "roofed", and with "floored").
    """

    steps: int
    unknown: float
    bare: int


LESSONS = (Lesson(900, 1 / 3, 3), Lesson(500, 1 / 2, 1))


def study_base(
    folder: Path,
    lessons: Sequence[Lesson] = LESSONS,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
    half: bool = False,
) -> tuple[nn.Module, Path]:
    """The base from `folder`, trained first where it is missing, and its file; fp32, frozen."""
    path = WEIGHTS
    for number, lesson in enumerate(lessons):
        start, path = path, folder / f"base-{number}-{lesson.steps}.safetensors"
        if not path.is_file():
            model = train(load_toy(start).requires_grad_(True), lesson, number, on_step, half)
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_comfy(model.state_dict(), partial, {"lesson": str(lesson)}, torch.float16)
            partial.replace(path)
    return load_toy(path).requires_grad_(False), path


def train(
    model: nn.Module, lesson: Lesson, seed: int, on_step: Callable[[int, float], None], half: bool = False
) -> nn.Module:
    """Flow matching as in `demo.pretrain`; the moving average of the weights. `half`: products in bf16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.0)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    source = batches(lesson, torch.Generator().manual_seed(seed))
    for step in range(lesson.steps):
        batch = next(source)
        sigma = batch.sigma[:, None, None]
        noisy = (1 - sigma) * batch.tokens + sigma * batch.noise
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            guess = velocity(model, noisy, batch.sigma, batch.features, pooled(batch.features))
        loss = functional.mse_loss(guess.float(), batch.noise - batch.tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lesson.steps, PEAK, warm_up=50)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        on_step(step + 1, float(loss.detach()))
    return average.module


def batches(lesson: Lesson, generator: torch.Generator) -> Iterator[Batch]:
    """Endless batches: every old combination but the held-out ones, with one extra word or none."""
    looks, _ = combinations()
    extras = (*EXTRAS, *[""] * lesson.bare)
    tokens = pack(to_latents(torch.stack([draw(look, extra) for look in looks for extra in extras])))
    names = torch.stack([torch.stack([word_feature(word) for word in look]) for look in looks])
    added = torch.stack([word_feature(extra) if extra else torch.zeros(TEXT_WIDTH) for extra in extras])
    while True:
        picks = torch.randint(len(tokens), (BATCH,), generator=generator)
        sigma = torch.sigmoid(torch.randn(BATCH, generator=generator) + 0.3)
        noise = torch.randn(BATCH, *tokens.shape[1:], generator=generator)
        features = captions(names[picks // len(extras)], added[picks % len(extras)], lesson.unknown, generator)
        yield Batch(tokens[picks], noise, sigma, features)


def captions(names: Tensor, added: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Features (batch, TEXT_LENGTH, width) of captions (batch, 3, width) and of an extra word each (batch, width).

    In a `share` each, a word that says nothing stands for the shape, or one for the whole style; the extra word then
    moves up to its place, as it does in a prompt with a style's trigger.
    """
    size = len(names)
    unknown = torch.randint(2, (size, 2, TEXT_WIDTH), generator=generator) * 2.0 - 1
    hidden = torch.rand(size, 2, generator=generator) < share
    features = torch.cat([names, added[:, None]], 1)
    features[:, 0] = torch.where(hidden[:, :1], unknown[:, 0], features[:, 0])
    short = torch.stack([features[:, 0], unknown[:, 1], added, torch.zeros_like(added)], 1)
    features = torch.where(hidden[:, 1, None, None], short, features)
    return functional.pad(features, (0, 0, 0, TEXT_LENGTH - 4))
