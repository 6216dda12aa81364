"""The training loop."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from qrlora_core import __version__
from qrlora_core.storage import TensorSpec
from qrlora_core.writing import write_tensors

from ..config import FitConfig
from ..data.batches import generator_of
from ..errors import TrainError, is_out_of_memory
from ..events import EventWriter
from .checkpoint import BASIS, OPTIMIZER, PARAMETER, basis_sketch, newest_checkpoint, save_checkpoint
from .denoise import denoising_loss, sample_latents
from .lock import held_run_folder
from .optim import optimizer_state
from .output import announce, save
from .prepare import prepare
from .processes import make_accelerator
from .reporter import Reporter
from .state import TrainingState
from .stop import Stopped, StopWatch
from .strengths import show_strengths


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
        state = None
        folder_lock = held_run_folder(Path(config.run_dir)) if accelerator.is_main_process else nullcontext()
        try:
            with folder_lock:
                state = prepare(config, accelerator, reporter, watch)
                reporter.emit("started", **_started(state))
                train(state)
                path = save(state)
                show_strengths(state)
                announce(state, path)
                return path
        except Stopped:
            reporter.emit("stopped", **_stopped(state, Path(config.run_dir)))
            raise
        finally:
            accelerator.end_training()


def train(state: TrainingState) -> None:
    """Step until `config.steps`; checkpoints, samples and validation losses on the way."""
    config, reporter = state.config, state.reporter
    reporter.start_steps(state.done, config.steps)
    while state.done < config.steps:
        with _keeping_what_is_done(state):
            _agree_to_go_on(state)
            loss = gradients(state)
        update(state)
        state.done += 1
        reporter.step(state.done, config.steps, loss, state.scheduler.get_last_lr()[0])
        with _keeping_what_is_done(state):
            if _due(state.done, config.validate_every):
                reporter.emit("validation", step=state.done, loss=validation_loss(state))
        if _due(state.done, config.checkpoint_every) or state.done == config.steps:
            checkpoint(state)
        if _due(state.done, config.sample_every):
            with _keeping_what_is_done(state):
                sample(state)


def gradients(state: TrainingState) -> float:
    """The gradients of one optimizer step; its mean loss over all processes. No parameter is changed.

    Raises:
        TrainError: reason "loss", when the loss is not finite.
    """
    config, accelerator = state.config, state.accelerator
    samplers = [(state.sampler, 1.0)]
    if state.class_sampler and config.prior_weight:
        samplers.append((state.class_sampler, config.prior_weight))
    total = torch.zeros((), device=state.device)
    for index in range(config.gradient_accumulation):
        if accelerator.num_processes == 1:
            state.watch.check()
        # batches are numbered over all processes, so their number does not change what is trained
        part = state.done * config.gradient_accumulation + index
        number = part * accelerator.num_processes + accelerator.process_index
        for sampler, weight in samplers:
            loss = denoising_loss(state.model, state.backbone, sampler.batch(number), config, state.device, state.dtype)
            loss = loss * (weight / config.gradient_accumulation)
            state.scaler.scale(loss).backward()
            total += loss.detach()
    mean = _averaged(state, total)
    if not math.isfinite(mean):
        kept = newest_checkpoint(Path(config.run_dir))
        raise TrainError(
            "loss",
            f"the loss of step {state.done + 1} is {mean}: training has diverged. "
            f"{f'{kept.path.name} is kept. ' if kept else ''}Try a lower learning_rate, or precision bf16 or fp32",
        )
    return mean


def update(state: TrainingState) -> None:
    """One optimizer step along these gradients."""
    state.scaler.unscale_(state.optimizer)
    if state.config.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(state.parameters.values(), state.config.max_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    for layer in state.layers.values():
        layer.constrain()
    state.scheduler.step()
    state.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def validation_loss(state: TrainingState) -> float:
    """Mean loss over draws that are the same at every step: fixed pictures, noise, and sigma spread over 0 to 1."""
    config, draws = state.config, state.config.validation_draws
    losses = [
        denoising_loss(state.model, state.backbone, state.sampler.fixed(draw, draws), config, state.device, state.dtype)
        for draw in range(draws)
    ]
    return float(torch.stack(losses).mean())


def checkpoint(state: TrainingState) -> None:
    """Write the state of the run; the main process does."""
    if state.accelerator.is_main_process:
        tensors, values = optimizer_state(state.optimizer)
        held = {f"{PARAMETER}{name}": parameter.detach() for name, parameter in state.parameters.items()}
        held |= {f"{OPTIMIZER}{name}": tensor for name, tensor in tensors.items()}
        held |= {f"{BASIS}{name}": basis_sketch(layer.q) for name, layer in state.layers.items()}
        written: Mapping[str, Any] = {
            "identity": state.identity,
            "optimizer": values,
            "scaler": state.scaler.state_dict(),
            "smoothed_loss": state.reporter.smoothed_loss,
        }
        path = save_checkpoint(Path(state.config.run_dir), state.done, held, written, state.config.keep_checkpoints)
        state.reporter.emit("saved", step=state.done, what="checkpoint", file=f"checkpoints/{path.name}")
    state.accelerator.wait_for_everyone()


def sample(state: TrainingState) -> None:
    """Latents of the first picture's caption and size from a fixed noise, written beside the checkpoints."""
    if not state.accelerator.is_main_process:
        return
    config, cache = state.config, state.sampler.cache
    index = next(index for index, item in enumerate(cache.items) if not item.is_class)
    text = cache.text(cache.items[index].text)
    noise = torch.randn(1, *cache.latent_shape(index), generator=generator_of(config.seed, "sample"))
    state.model.eval()
    with state.training_adapter.off() if state.training_adapter is not None else nullcontext():
        latents = sample_latents(
            state.model,
            state.backbone,
            noise,
            text.map(lambda tensor: tensor[None]),
            config.sample_steps,
            config.sample_guidance,
            state.device,
            state.dtype,
        )
    state.model.train()
    path = Path(config.run_dir) / "samples" / f"step-{state.done:08}.safetensors"
    spec = {"latent": TensorSpec(torch.float32, tuple(latents.shape))}
    write_tensors(path, spec, [("latent", latents)], {"qrlora.step": str(state.done)}, overwrite=True)
    state.reporter.emit("sample", step=state.done, file=f"samples/{path.name}")


def _started(state: TrainingState) -> dict[str, Any]:
    name = Path(state.config.run_dir).name
    return {
        "pid": os.getpid(),
        "steps": state.config.steps,
        "first_step": state.done,
        "pack_version": __version__,
        "run_dir": name,
        "scaling": state.config.scaling,
        "memory": str(state.plan),
    }


def _stopped(state: TrainingState | None, run_dir: Path) -> dict[str, Any]:
    kept = newest_checkpoint(run_dir)
    done = state.done if state is not None else kept.step if kept else 0
    return {"step": done, "checkpoint": f"checkpoints/{kept.path.name}" if kept else ""}


@contextmanager
def _keeping_what_is_done(state: TrainingState) -> Iterator[None]:
    """Between two updates: when the run is stopped, or memory ends, the steps so far go into a checkpoint."""
    try:
        yield
    except (Stopped, Exception) as error:
        # memory ends in one process of several, and the others would wait for it
        alone = state.accelerator.num_processes == 1
        if isinstance(error, Stopped) or (alone and is_out_of_memory(error)):
            state.optimizer.zero_grad(set_to_none=True)  # a step that was not finished leaves no trace
            if state.done:
                checkpoint(state)
        raise


def _agree_to_go_on(state: TrainingState) -> None:
    """Raise Stopped in all processes when one of them was asked to stop."""
    if state.accelerator.num_processes == 1:
        state.watch.check()
        return
    asked = torch.tensor(float(state.watch.asked), device=state.device)
    if float(state.accelerator.reduce(asked, "sum")) > 0:
        raise Stopped


def _averaged(state: TrainingState, loss: torch.Tensor) -> float:
    """The mean loss over all processes; the gradients are averaged in the same exchange, in one flat tensor."""
    if state.accelerator.num_processes == 1:
        return float(loss)
    gradients = [p.grad for p in state.parameters.values() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients] + [loss.reshape(1)])
    flat = state.accelerator.reduce(flat, "mean")
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients] + [1])):
        gradient.copy_(part.view_as(gradient))
    return float(flat[-1])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
