"""Everything between the settings and the first step: checks that cost nothing come first, the model comes last."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrlora_core import FileFormatError, LayerTarget, TensorFile, TrainingCache, whole_file

from ..config import TRAJECTORY_VERSION, FitConfig, as_table
from ..data.batches import Sampler, generator_of
from ..errors import TrainError
from ..model.backbones import FLOW
from ..model.basis import BasisOf, cached_basis
from ..model.layer import QRLinear, inject, parameter_shapes, trained_parameters
from ..model.source import BaseModel
from ..model.training_adapter import TrainingAdapter
from ..model.transformer import DTYPES, load_transformer
from .checkpoint import remove_leftovers, set_damaged_aside
from .estimate import MemoryPlan, choose_memory, estimate_memory, free_memory, memory_text, require_memory
from .optim import make_optimizer, make_scheduler
from .processes import agreed_plan, give_memory_back
from .reporter import Reporter
from .resume import checkpoint_to_resume, require_same_basis, restore_checkpoint, storage_begun_with
from .state import TrainingState
from .stop import StopWatch

log = logging.getLogger(__name__)


def prepare(config: FitConfig, accelerator: Any, reporter: Reporter, watch: StopWatch) -> TrainingState:
    """Check the settings against the files, find where to go on, load the model and put the trained layers in.

    Raises:
        TrainError: with the reason.
        QRLoRAError: a file, target or weight does not fit.
    """
    run_dir = Path(config.run_dir)
    reporter.phase("load", text="reading the base model's header and the data")
    source, cache = BaseModel(Path(config.model)), _cache(Path(config.data))
    sampler, class_sampler = Sampler(cache, config), Sampler(cache, config, is_class=True)
    _check_data(sampler, source, cache)
    targets = source.targets(config.targets)
    training_adapter = TrainingAdapter(Path(config.training_adapter), source) if config.training_adapter else None
    shapes, available = sampler.shapes + class_sampler.shapes, free_memory(accelerator.device)
    plan, _ = choose_memory(config, source, targets, shapes, available, storage_begun_with(run_dir, config))
    plan = agreed_plan(plan, accelerator)
    identity = {
        "version": TRAJECTORY_VERSION,
        "base": source.fingerprint,
        "data": cache.identity(),
        "processes": accelerator.num_processes,
        **config.trajectory(),
        "base_storage": plan.base_storage,
        **({"fp8_products": True} if config.fp8_products else {}),
        **({"training_adapter": training_adapter.fingerprint} if training_adapter is not None else {}),
    }
    run_id = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    checkpoint = checkpoint_to_resume(config, identity, parameter_shapes(targets, config.method, config.rank))
    _require_own_output(output_path(config), run_id)
    estimate = estimate_memory(config, plan, source, targets, shapes, available)
    if config.memory_check:
        require_memory(estimate, available)
    if accelerator.is_main_process:
        log.info("%s: about %s", plan, memory_text(estimate, available))
        remove_leftovers(run_dir)
        set_damaged_aside(run_dir, checkpoint)
        _write_settings(config, plan)
    basis_of = _basis(config, source, targets, accelerator, reporter, watch)
    require_same_basis(checkpoint, targets, basis_of)
    model, layers = _model(config, plan, source, targets, basis_of, accelerator, reporter, watch)
    if training_adapter is not None:
        training_adapter.attach(model, accelerator.device, DTYPES[config.precision])
    parameters = trained_parameters(layers)
    optimizer = make_optimizer(parameters.values(), config)
    done = restore_checkpoint(checkpoint, parameters, optimizer)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.precision == "fp16")
    if checkpoint is not None:
        reporter.smoothed_loss = checkpoint.state["smoothed_loss"]
        if checkpoint.state["scaler"]:
            scaler.load_state_dict(checkpoint.state["scaler"])
    return TrainingState(
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
        training_adapter=training_adapter,
    )


def _basis(
    config: FitConfig,
    source: BaseModel,
    targets: tuple[LayerTarget, ...],
    accelerator: Any,
    reporter: Reporter,
    watch: StopWatch,
) -> BasisOf:
    """The basis of every target, from its file or decomposed now."""

    def on_progress(done: int, total: int) -> None:
        watch.check()
        reporter.phase("basis", done, total, "decomposing the base model")

    folder = Path(config.basis_cache) if config.basis_cache else Path(config.run_dir).parent / "basis"
    # Apple's GPUs have no float64, which the decomposition needs in one place
    device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device
    with accelerator.local_main_process_first():  # the others find the file
        basis_of, _ = cached_basis(folder, source, targets, config.rank, config.decomposition, device, on_progress)
    return basis_of


def _model(
    config: FitConfig,
    plan: MemoryPlan,
    source: BaseModel,
    targets: tuple[LayerTarget, ...],
    basis_of: BasisOf,
    accelerator: Any,
    reporter: Reporter,
    watch: StopWatch,
) -> tuple[Any, dict[str, QRLinear]]:
    """The frozen transformer with the trained layers in it."""

    def on_progress(done: int, total: int) -> None:
        watch.check()
        reporter.phase("model", done, total, "loading the base model")

    if plan.offload and accelerator.device.type == "cpu":
        give_memory_back()
    held = (plan.base_storage, config.precision, accelerator.device, plan.offload)
    model = load_transformer(source, *held, on_progress, fp8_products=config.fp8_products)
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
    return model, layers


def output_path(config: FitConfig) -> Path:
    """Where the adapter goes."""
    return Path(config.output) if config.output else Path(config.run_dir) / "adapter.safetensors"


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
        widths = tuple(part.shape[-1] for part in cache.text(index) if part is not None)
        if widths != facts.text_widths:
            raise TrainError(
                "data",
                f"the texts have widths {widths}, {source.backbone.title} takes {facts.text_widths}: encode them with "
                "its own text encoders",
            )
    if sampler.config.loss_weighting != "none" and source.backbone.process is not FLOW:
        raise TrainError(
            "settings",
            f"loss_weighting {sampler.config.loss_weighting} is for flow matching; {source.backbone.title} predicts "
            f"{source.backbone.process.name}. Set it to none",
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


def _start(config: FitConfig, target: LayerTarget) -> Tensor | None:
    """dR before the first step, (rank, in); None stands for zeros."""
    if config.init == "zero" or config.method == "qr":
        return None
    generator = generator_of(config.seed, "start", target.name)
    return torch.randn(config.rank, target.shape[1], generator=generator) * config.delta_scale


def _write_settings(config: FitConfig, plan: MemoryPlan) -> None:
    """Settings of this run and what it chose, beside its results. No absolute paths: folders are shared and moved."""
    chosen = asdict(plan) | {"alpha": config.adapter_alpha}
    paths = ("model", "data", "run_dir", "output", "basis_cache", "training_adapter")
    names = {key: Path(getattr(config, key)).name for key in paths}
    with whole_file(Path(config.run_dir) / "resolved.json", overwrite=True) as file:
        file.write(json.dumps(as_table(config) | chosen | names, indent=1).encode())
