"""Everything between the settings and the first step: checks that cost nothing come first, the model comes last."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from qrlora_core import FileFormatError, LayerTarget, TensorFile, TrainingCache

from ..config import AUTO, TRAJECTORY_VERSION, FitConfig, Storage, as_table
from ..data.batches import Sampler, generator_of
from ..errors import TrainError
from ..model.backbones import Backbone
from ..model.basis import BasisOf, cached_basis
from ..model.layer import QRLinear, inject, parameter_shapes, trained_parameters
from ..model.source import BaseModel
from ..model.transformer import BITS, DTYPES, load_transformer
from .checkpoint import (
    BASIS,
    OPTIMIZER,
    PARAMETER,
    Checkpoint,
    basis_sketch,
    newest_checkpoint,
    remove_leftovers,
    set_damaged_aside,
)
from .estimate import MemoryPlan, choose_memory, estimate_memory, free_memory, memory_text, require_memory
from .optim import make_optimizer, make_scheduler, restore_optimizer
from .reporter import Reporter
from .stop import StopWatch

log = logging.getLogger(__name__)

SAME_SKETCH = 1e-2  # a basis computed again differs by rounding; another one by as much as its own length


@dataclass(slots=True)
class Run:
    """A run that is ready for its next step."""

    config: FitConfig
    plan: MemoryPlan
    accelerator: Any
    source: BaseModel
    sampler: Sampler
    class_sampler: Sampler
    model: Any
    layers: dict[str, QRLinear]
    parameters: dict[str, nn.Parameter]
    basis_of: BasisOf
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: Any
    identity: dict[str, Any]
    run_id: str
    done: int
    reporter: Reporter
    watch: StopWatch

    @property
    def backbone(self) -> Backbone:
        return self.source.backbone

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.precision]


def prepare(config: FitConfig, accelerator: Any, reporter: Reporter, watch: StopWatch) -> Run:
    """Check the settings against the files, find where to go on, load the model and put the trained layers in.

    Raises:
        TrainError: with the reason.
        QRLoRAError: a file, target or weight does not fit.
    """
    run_dir, main = Path(config.run_dir), accelerator.is_main_process
    reporter.phase("load", text="reading the base model's header and the data")
    source, cache = BaseModel(Path(config.model)), _cache(Path(config.data))
    sampler, class_sampler = Sampler(cache, config), Sampler(cache, config, is_class=True)
    _check_data(sampler, source, cache)
    targets = source.targets(config.targets)
    shapes = sampler.shapes + class_sampler.shapes
    available = free_memory(accelerator.device)
    plan, _ = choose_memory(config, source, targets, shapes, available, _begun_with(run_dir, config))
    plan = _agreed(plan, accelerator)
    estimate = estimate_memory(config, plan, source, targets, shapes)
    identity = {
        "version": TRAJECTORY_VERSION,
        "base": source.fingerprint,
        "data": cache.identity(),
        "processes": accelerator.num_processes,
        **config.trajectory(),
        "base_storage": plan.base_storage,
    }
    run_id = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    checkpoint = _resumed(config, identity, parameter_shapes(targets, config.method, config.rank))
    _require_own_output(output_path(config), run_id)
    if config.memory_check:
        require_memory(estimate, available)
    if main:
        log.info("%s: about %s", plan, memory_text(estimate, available))
        remove_leftovers(run_dir)
        set_damaged_aside(run_dir, checkpoint)
        _write_settings(config, plan)

    def on_basis(done: int, total: int) -> None:
        watch.check()
        reporter.phase("basis", done, total, "decomposing the base model")

    def on_model(done: int, total: int) -> None:
        watch.check()
        reporter.phase("model", done, total, "loading the base model")

    folder = Path(config.basis_cache) if config.basis_cache else run_dir.parent / "basis"
    # Apple's GPUs have no float64, which the decomposition needs in one place
    device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device
    with accelerator.local_main_process_first():  # the others find the file
        basis_of, _ = cached_basis(folder, source, targets, config.rank, config.decomposition, device, on_basis)
    _require_same_basis(checkpoint, targets, basis_of)
    model = load_transformer(source, plan.base_storage, config.precision, accelerator.device, plan.offload, on_model)
    layers = inject(
        model,
        targets,
        basis_of,
        config.method,
        config.scaling,
        start_of=lambda target: _start(config, target),
        device=accelerator.device,
        dtype=DTYPES[config.precision],
    )
    if plan.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    parameters = trained_parameters(layers)
    optimizer = make_optimizer(parameters.values(), config)
    done = _restore(checkpoint, parameters, optimizer)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.precision == "fp16")
    if checkpoint is not None:
        reporter.smoothed_loss = checkpoint.state["smoothed_loss"]
        if checkpoint.state["scaler"]:
            scaler.load_state_dict(checkpoint.state["scaler"])
    return Run(
        config=config,
        plan=plan,
        accelerator=accelerator,
        source=source,
        sampler=sampler,
        class_sampler=class_sampler,
        model=model,
        layers=layers,
        parameters=parameters,
        basis_of=basis_of,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, config, done),
        scaler=scaler,
        identity=identity,
        run_id=run_id,
        done=done,
        reporter=reporter,
        watch=watch,
    )


def output_path(config: FitConfig) -> Path:
    """Where the adapter goes."""
    return Path(config.output) if config.output else Path(config.run_dir) / "adapter.safetensors"


def make_accelerator(config: FitConfig) -> Any:
    """Accelerate's view of this process: its device, its number, how many there are.

    Raises:
        TrainError: reason "settings": the device cannot be used, or the launcher's processes do not find each other.
    """
    try:
        wanted = None if config.device == "auto" else torch.zeros(1, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        raise TrainError("settings", f"device {config.device!r} cannot be used: {error}") from error
    if wanted is not None and wanted.type != "cpu":
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", config.device)
    # without a graphics card accelerate joins a launcher's processes only when it is told that they are for the CPU
    accelerator = Accelerator(cpu=config.device == "cpu" or (wanted is None and not _has_accelerator()))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:  # each would train by itself, into the same files
        raise TrainError(
            "settings", f"the launcher started {started} processes, but accelerate joined {accelerator.num_processes}"
        )
    if wanted is not None and accelerator.device.type != wanted.type:  # the launcher or its config file says otherwise
        raise TrainError("settings", f"device is {config.device!r}, but accelerate was set up for {accelerator.device}")
    return accelerator


def _has_accelerator() -> bool:
    """Whether device "auto" is anything but the CPU."""
    if hasattr(torch, "accelerator"):  # since torch 2.6; knows every kind of card
        return bool(torch.accelerator.is_available())
    return bool(torch.cuda.is_available() or torch.backends.mps.is_available())


def _cache(path: Path) -> TrainingCache:
    if not path.is_file():
        raise TrainError(
            "data", f"the training cache {path.name!r} does not exist; `python -m train encode` writes one"
        )
    try:
        return TrainingCache(path)
    except FileFormatError as error:
        raise TrainError("data", str(error)) from error


def _check_data(sampler: Sampler, source: BaseModel, cache: TrainingCache) -> None:
    """Whether the cache was made for such a model."""
    facts = source.facts
    for index, item in enumerate(cache.items):
        channels = cache.latent_shape(index)[0]
        if channels != facts.channels:
            raise TrainError(
                "data", f"the latents of {item.name} have {channels} channels, the model takes {facts.channels}"
            )
    for index in range(cache.text_count):
        found = tuple(part.shape[-1] for part in cache.text(index) if part is not None)
        if found != facts.text_widths:
            raise TrainError(
                "data",
                f"the texts have widths {found}, {source.backbone.title} takes {facts.text_widths}: encode them with "
                "its own text encoders",
            )
    if sampler.config.caption_dropout and cache.empty_text is None:
        raise TrainError("data", "caption_dropout needs the empty caption in the cache; write the cache again")


def _require_own_output(path: Path, run_id: str) -> None:
    """An adapter of another run is never written over."""
    if path.is_dir():
        raise TrainError("settings", f"output {path.name!r} is a folder; name a file")
    if path.exists():
        try:
            owner = TensorFile(path).metadata.get("qrlora.run_id")
        except FileFormatError:
            owner = None
        if owner != run_id:
            raise TrainError("settings", f"{path.name} exists and is not of this run; choose another output or run_dir")


def _agreed(plan: MemoryPlan, accelerator: Any) -> MemoryPlan:
    """The main process's plan, in all processes: their cards may have different amounts of memory free."""
    if accelerator.num_processes == 1:
        return plan
    agreed: MemoryPlan = broadcast_object_list([plan])[0]
    return agreed


def _begun_with(run_dir: Path, config: FitConfig) -> Storage | None:
    """How an earlier start of this run held the base, where that is left to the trainer: it decides the trajectory."""
    newest = newest_checkpoint(run_dir) if config.base_storage == AUTO and config.resume != "never" else None
    held = newest.state["identity"].get("base_storage") if newest is not None else None
    return held if held in BITS else None


def _resumed(
    config: FitConfig, identity: dict[str, Any], parameters: Mapping[str, tuple[int, ...]]
) -> Checkpoint | None:
    """The checkpoint to go on from, once it is sure that it belongs to these settings, model and data."""
    run_dir = Path(config.run_dir)
    # of other settings every tensor has other shapes; that is a mistake of the user and no damage
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is not None and not _different(checkpoint, identity):
        checkpoint = newest_checkpoint(run_dir, parameters)
    if checkpoint is None:
        if config.resume == "require":
            raise TrainError("resume", "there is no checkpoint in run_dir to resume from")
        return None
    if config.resume == "never":
        raise TrainError("resume", "run_dir holds checkpoints of an earlier run; resume it, or choose another folder")
    then, different = checkpoint.state["identity"], _different(checkpoint, identity)
    if "base" in different:
        raise TrainError("resume", f"this run began with another base model ({then['base']}, now {identity['base']})")
    if "data" in different:
        raise TrainError("resume", "this run began with other pictures or captions; use another run_dir")
    if different:
        changes = ", ".join(f"{key} {then.get(key)!r} -> {identity[key]!r}" for key in different)
        raise TrainError("resume", f"this run began with other settings: {changes}. Use another run_dir")
    if checkpoint.step > config.steps:
        raise TrainError("resume", f"the run has {checkpoint.step} steps already; steps is {config.steps}")
    return checkpoint


def _different(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> list[str]:
    """In what a checkpoint's run differs from this one."""
    then = checkpoint.state["identity"]
    return [key for key in identity if json.dumps(then.get(key)) != json.dumps(identity[key])]


def _require_same_basis(checkpoint: Checkpoint | None, targets: Sequence[LayerTarget], basis_of: BasisOf) -> None:
    """Whether the basis is the one that a checkpoint's tensors were trained on.

    Raises:
        TrainError: reason "resume": a dR means nothing on another Q.
    """
    sketches = checkpoint.tensors(BASIS) if checkpoint is not None else {}
    for target in targets if sketches else ():
        then, now = sketches.get(target.name), basis_sketch(basis_of(target.name).q)
        if then is None or float((then - now).norm()) > SAME_SKETCH * float(now.norm()):
            raise TrainError(
                "resume",
                f"this run began on another basis of {target.name}: put the file back into the folder of bases, or use "
                "another run_dir",
            )


def _restore(
    checkpoint: Checkpoint | None, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Put a checkpoint's tensors in place; how many steps it has."""
    if checkpoint is None:
        return 0
    held = checkpoint.tensors(PARAMETER)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(held[name])
    restore_optimizer(optimizer, checkpoint.tensors(OPTIMIZER), checkpoint.state["optimizer"])
    return checkpoint.step


def _start(config: FitConfig, target: LayerTarget) -> Tensor | None:
    """dR before the first step, (rank, in); None stands for zeros."""
    if config.init == "zero" or config.method == "qr":
        return None
    generator = generator_of(config.seed, "start", target.name)
    return torch.randn(config.rank, target.shape[1], generator=generator) * config.delta_scale


def _write_settings(config: FitConfig, plan: MemoryPlan) -> None:
    """What this run was told and what it chose, beside its results. No absolute paths: folders are shared and moved."""
    chosen = asdict(plan) | {"alpha": config.adapter_alpha}
    names = {key: Path(getattr(config, key)).name for key in ("model", "data", "run_dir", "output", "basis_cache")}
    path = Path(config.run_dir) / "resolved.json"
    temporary = path.with_name(f".qrlora-{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps(as_table(config) | chosen | names, indent=1), encoding="utf-8")
    temporary.replace(path)
