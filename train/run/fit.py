"""The training loop."""

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from qrlora_core import __version__
from qrlora_core.storage import TensorSpec, write_tensors

from ..config import FitConfig
from ..data.batches import generator_of
from ..errors import TrainError
from ..events import EventWriter
from .checkpoint import BASIS, OPTIMIZER, PARAMETER, basis_sketch, newest_checkpoint, save_checkpoint
from .flow import flow_loss, sample_latents
from .lock import held_run_folder
from .optim import optimizer_state
from .output import save
from .prepare import Run, make_accelerator, prepare
from .reporter import Reporter
from .stop import Stopped, StopWatch


def fit(config: FitConfig, events: EventWriter | None = None, watch: StopWatch | None = None) -> Path:
    """Train an adapter, or go on with a run that was interrupted.

    Args:
        config: the settings.
        events: where to report to.
        watch: who may ask to stop.

    Returns:
        The adapter, written, opened again and checked.

    Raises:
        Stopped: the run was asked to stop; what was done is in a checkpoint, unless there was no step yet.
        TrainError, QRLoRAError: see `prepare`; a loss that is not finite; a disk without room.
    """
    watch = watch or StopWatch()
    accelerator = make_accelerator(config)
    with Reporter(events or EventWriter(None), accelerator.device, accelerator.is_main_process) as reporter:
        run = None
        folder_lock = held_run_folder(Path(config.run_dir)) if accelerator.is_main_process else nullcontext()
        try:
            with folder_lock:
                run = prepare(config, accelerator, reporter, watch)
                reporter.emit("started", **_started(run))
                train(run)
                return save(run)
        except Stopped:
            reporter.emit("stopped", **_stopped(run, Path(config.run_dir)))
            raise
        finally:
            accelerator.end_training()


def train(run: Run) -> None:
    """Step until `config.steps`; checkpoints, samples and validation losses on the way."""
    config, reporter = run.config, run.reporter
    reporter.start_steps(run.done, config.steps)
    while run.done < config.steps:
        try:
            _agree_to_go_on(run)
            loss = step(run)
        except Stopped:
            run.optimizer.zero_grad(set_to_none=True)  # a step that was not finished leaves no trace
            if run.done:
                checkpoint(run)
            raise
        run.done += 1
        reporter.step(run.done, config.steps, loss, run.scheduler.get_last_lr()[0])
        if _due(run.done, config.validate_every):
            reporter.emit("validation", step=run.done, loss=validation_loss(run))
        if _due(run.done, config.checkpoint_every) or run.done == config.steps:
            checkpoint(run)
        if _due(run.done, config.sample_every):
            sample(run)


def step(run: Run) -> float:
    """One optimizer step; its mean loss over all processes.

    Raises:
        TrainError: reason "loss", when the loss is not finite; nothing was changed then.
    """
    config, accelerator = run.config, run.accelerator
    samplers = [(run.sampler, 1.0)]
    if run.class_sampler and config.prior_weight:
        samplers.append((run.class_sampler, config.prior_weight))
    total = torch.zeros((), device=run.device)
    for index in range(config.gradient_accumulation):
        if accelerator.num_processes == 1:
            run.watch.check()
        # batches are numbered over all processes, so their number does not change what is trained
        part = run.done * config.gradient_accumulation + index
        number = part * accelerator.num_processes + accelerator.process_index
        for sampler, weight in samplers:
            loss = flow_loss(run.model, run.backbone, sampler.batch(number), config, run.device, run.dtype)
            loss = loss * (weight / config.gradient_accumulation)
            run.scaler.scale(loss).backward()
            total += loss.detach()
    mean = _averaged(run, total)
    if not math.isfinite(mean):
        kept = newest_checkpoint(Path(config.run_dir))
        raise TrainError(
            "loss",
            f"the loss of step {run.done + 1} is {mean}: training has diverged. "
            f"{f'{kept.path.name} is kept. ' if kept else ''}Try a lower learning_rate, or precision bf16 or fp32",
        )
    run.scaler.unscale_(run.optimizer)
    if config.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(run.parameters.values(), config.max_grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    for layer in run.layers.values():
        layer.constrain()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return mean


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Mean loss over draws that are the same at every step: fixed pictures, noise, and sigma spread over 0 to 1."""
    draws = run.config.validation_draws
    losses = [
        flow_loss(run.model, run.backbone, run.sampler.fixed(draw, draws), run.config, run.device, run.dtype)
        for draw in range(draws)
    ]
    return float(torch.stack(losses).mean())


def checkpoint(run: Run) -> None:
    """Write the state of the run; the main process does."""
    if run.accelerator.is_main_process:
        tensors, values = optimizer_state(run.optimizer)
        held = {f"{PARAMETER}{name}": parameter.detach() for name, parameter in run.parameters.items()}
        held |= {f"{OPTIMIZER}{name}": tensor for name, tensor in tensors.items()}
        held |= {f"{BASIS}{name}": basis_sketch(layer.q) for name, layer in run.layers.items()}
        state: Mapping[str, Any] = {
            "identity": run.identity,
            "optimizer": values,
            "scaler": run.scaler.state_dict(),
            "smoothed_loss": run.reporter.smoothed_loss,
        }
        path = save_checkpoint(Path(run.config.run_dir), run.done, held, state, run.config.keep_checkpoints)
        run.reporter.emit("saved", step=run.done, what="checkpoint", file=f"checkpoints/{path.name}")
    run.accelerator.wait_for_everyone()


def sample(run: Run) -> None:
    """Latents of the first picture's caption and size from a fixed noise, written beside the checkpoints."""
    if not run.accelerator.is_main_process:
        return
    config, cache = run.config, run.sampler.cache
    index = next(index for index, item in enumerate(cache.items) if not item.is_class)
    text = cache.text(cache.items[index].text)
    noise = torch.randn(1, *cache.latent_shape(index), generator=generator_of(config.seed, "sample"))
    run.model.eval()
    latents = sample_latents(
        run.model,
        run.backbone,
        noise,
        text.map(lambda tensor: tensor[None]),
        config.sample_steps,
        config.sample_guidance,
        run.device,
        run.dtype,
    )
    run.model.train()
    path = Path(config.run_dir) / "samples" / f"step-{run.done:08}.safetensors"
    spec = {"latent": TensorSpec(torch.float32, tuple(latents.shape))}
    write_tensors(path, spec, [("latent", latents)], {"qrlora.step": str(run.done)}, overwrite=True)
    run.reporter.emit("sample", step=run.done, file=f"samples/{path.name}")


def _started(run: Run) -> dict[str, Any]:
    name = Path(run.config.run_dir).name
    return {
        "pid": os.getpid(),
        "steps": run.config.steps,
        "first_step": run.done,
        "pack_version": __version__,
        "run_dir": name,
        "scaling": run.config.scaling,
        "memory": str(run.plan),
    }


def _stopped(run: Run | None, run_dir: Path) -> dict[str, Any]:
    kept = newest_checkpoint(run_dir)
    done = run.done if run is not None else kept.step if kept else 0
    return {"step": done, "checkpoint": f"checkpoints/{kept.path.name}" if kept else ""}


def _agree_to_go_on(run: Run) -> None:
    """Raise Stopped in all processes when one of them was asked to stop."""
    if run.accelerator.num_processes == 1:
        run.watch.check()
        return
    asked = torch.tensor(float(run.watch.asked), device=run.device)
    if float(run.accelerator.reduce(asked, "sum")) > 0:
        raise Stopped


def _averaged(run: Run, loss: torch.Tensor) -> float:
    """The mean loss over all processes; the gradients are averaged in the same exchange, in one flat tensor."""
    if run.accelerator.num_processes == 1:
        return float(loss)
    gradients = [p.grad for p in run.parameters.values() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients] + [loss.reshape(1)])
    flat = run.accelerator.reduce(flat, "mean")
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients] + [1])):
        gradient.copy_(part.view_as(gradient))
    return float(flat[-1])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
