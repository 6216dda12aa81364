"""The half of `check` that needs torch: device, model, data, memory."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from qrlora_core import QRLoRAError, TrainingCache

from ..config import FitConfig
from ..data.batches import Sampler
from ..errors import TrainError
from ..model.backbones import BACKBONES
from ..model.source import BaseModel
from ..model.training_adapter import TrainingAdapter
from .estimate import breakdown, choose_memory, free_memory, gigabytes, memory_text, require_memory
from .processes import make_accelerator

Problems = list[dict[str, str]]


def look_at_device(config: FitConfig, report: dict[str, Any], problems: Problems) -> None:
    """Fill in `device`, `vram_free` and `ram_free`."""
    report["ram_free"] = psutil.virtual_memory().available
    try:
        device = make_accelerator(config).device
    except TrainError as error:
        problems.append({"what": str(error), "fix": "set device to auto or cpu, or install torch for this GPU"})
        return
    report["device"] = str(device)
    if device.type == "cuda":
        report["device"] = f"{device} ({torch.cuda.get_device_name(device)})"
        report["vram_free"] = torch.cuda.mem_get_info(device)[0]


def look_at_files(config: FitConfig, report: dict[str, Any], problems: Problems, data: bool) -> None:
    """Fill in `model` and `estimate`; the data are looked at when they should exist."""
    try:
        source = BaseModel(Path(config.model))
        report["model"] = {
            "family": source.backbone.title,
            "blocks": "+".join(map(str, source.blocks.values())),
            "dtype": "/".join(source.formats),
            "fingerprint": source.fingerprint,
            "channels": source.facts.channels,
            "text": dict(zip(source.backbone.text_fields, source.facts.text_widths, strict=True)),
        }
        targets = source.targets(config.targets)
        if config.training_adapter:
            TrainingAdapter(Path(config.training_adapter), source)
    except QRLoRAError as error:
        titles = ", ".join(backbone.title for backbone in BACKBONES)
        problems.append({"what": str(error), "fix": f"choose a model of {titles}, and targets that it has"})
        return
    shapes = [_default_shape(source)]
    if data:
        try:
            shapes = Sampler(TrainingCache(Path(config.data)), config).shapes
        except QRLoRAError as error:
            problems.append({"what": str(error), "fix": "write the training cache with `python -m train encode`"})
    # without a device the problem is another one, and an estimate for the CPU is better than none
    available = free_memory(torch.device(report["device"].split(" ")[0] if report["device"] else "cpu"))
    plan, estimate = choose_memory(config, source, targets, shapes, available)
    # the basis, two checkpoints and one being written, and the adapter
    disk = 2 * sum(config.rank * sum(target.shape) * 4 for target in targets) + 4 * estimate.trained
    report["estimate"] = {"vram": estimate.vram, "ram": estimate.ram, "disk": disk}
    report["chosen"] = asdict(plan)
    report["memory"] = f"{plan}: about {memory_text(estimate, available)}"
    if report["disk_free"] < disk:
        problems.append({"what": f"the run needs about {gigabytes(disk)} of disk", "fix": "free some room"})
    if report["device"] and config.memory_check:
        try:
            require_memory(estimate, available)
        except TrainError as error:
            what, _, fix = str(error).partition(". ")
            problems.append({"what": what, "fix": fix})


def planned(config: FitConfig) -> str:
    """The memory estimate and the layers, in lines."""
    source = BaseModel(Path(config.model))
    targets = source.targets(config.targets)
    cache = TrainingCache(Path(config.data))
    sampler = Sampler(cache, config)
    shapes = sampler.shapes + Sampler(cache, config, is_class=True).shapes
    available = free_memory(make_accelerator(config).device)
    plan, estimate = choose_memory(config, source, targets, shapes, available)
    count = sum(config.rank * (t.shape[1] if config.method != "qr" else sum(t.shape)) for t in targets)
    pictures = sum(not item.is_class for item in cache.items)
    lines = [
        f"base       {source.path.name}, {source.backbone.title}, blocks {'+'.join(map(str, source.blocks.values()))}, "
        f"fingerprint {source.fingerprint}",
        f"data       {pictures} pictures, {len(cache.items) - pictures} class pictures, {len(sampler.shapes)} buckets",
        f"memory     {plan}: about {memory_text(estimate, available)} ({breakdown(estimate)})",
        f"scaling    {config.scaling:g} (alpha {config.adapter_alpha:g} / rank {config.rank})",
        f"trained    {count / 1e6:.2f} million numbers in {len(targets)} layers:",
    ]
    lines += [f"  {target.name} {target.shape[0]}x{target.shape[1]}" for target in targets]
    return "\n".join(lines)


def _default_shape(source: BaseModel) -> tuple[int, ...]:
    """A square picture of 512 pixels and 512 tokens of text, the published sizes."""
    side = 32 * source.backbone.patch
    return (source.facts.channels, side, side, 512, source.facts.text_widths[0])
