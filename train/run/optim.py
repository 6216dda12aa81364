"""Optimizers and learning rate schedules by name, and their state as tensors and JSON."""

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from ..config import FitConfig
from ..model.transformer import require_package


def make_optimizer(parameters: Iterable[nn.Parameter], config: FitConfig) -> torch.optim.Optimizer:
    """AdamW, AdamW with 8-bit state, or Prodigy.

    Raises:
        TrainError: reason "library", when the optimizer's package is not installed.
    """
    betas = (config.beta1, config.beta2)
    common: dict[str, Any] = {"lr": config.learning_rate, "betas": betas, "weight_decay": config.weight_decay}
    parameters = list(parameters)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, eps=config.epsilon, **common)
    if config.optimizer == "adamw8bit":
        require_package("bitsandbytes", "optimizer adamw8bit")
        import bitsandbytes

        made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, eps=config.epsilon, **common)
        return made
    require_package("prodigyopt", "optimizer prodigy")
    import prodigyopt

    with contextlib.redirect_stdout(sys.stderr):  # it prints, and standard output may carry the events
        made = prodigyopt.Prodigy(
            parameters,
            eps=config.epsilon,
            decouple=True,
            use_bias_correction=True,
            safeguard_warmup=config.warmup_steps > 0,
            **common,
        )
    return made


def make_scheduler(optimizer: torch.optim.Optimizer, config: FitConfig, done: int = 0) -> Any:
    """The learning rate schedule, as it stands after `done` steps.

    Every schedule is a function of the step, so a run whose number of steps was raised goes on along the new one.
    """
    scheduler = get_scheduler(
        config.scheduler,
        optimizer,
        step_rules=config.scheduler_rules or None,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
        num_cycles=config.scheduler_cycles,
        power=config.scheduler_power,
    )
    if done:
        scheduler.last_epoch = done - 1
        scheduler._step_count = done + 1  # otherwise torch warns that the optimizer has not stepped yet
        optimizer._opt_called = True  # type: ignore[attr-defined]
        scheduler.step()
    return scheduler


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state split into tensors (`<parameter number>.<name>`) and plain JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"state": {}, "groups": []}
    for number, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.detach()
            else:
                values["state"].setdefault(str(number), {})[name] = value
    for index, group in enumerate(state["param_groups"]):
        plain = {}
        for name, value in group.items():
            if isinstance(value, Tensor):  # Prodigy keeps some of its numbers there
                tensors[f"group{index}.{name}"] = value.detach()
            elif name != "params":
                plain[name] = value
        values["groups"].append(plain)
    return tensors, values


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put a state of `optimizer_state` back, bit by bit."""
    state: dict[int, dict[str, Any]] = {int(number): dict(entries) for number, entries in values["state"].items()}
    groups = [dict(group) for group in values["groups"]]
    for key, tensor in tensors.items():
        owner, _, name = key.partition(".")
        if owner.startswith("group"):
            groups[int(owner.removeprefix("group"))][name] = tensor
        else:
            state.setdefault(int(owner), {})[name] = tensor
    current = optimizer.state_dict()["param_groups"]
    for group, now in zip(groups, current):
        group["params"] = now["params"]
        if isinstance(now.get("betas"), tuple):  # JSON has lists
            group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})
