"""The adapter that a run leaves behind: written, opened again, looked at, announced."""

import hashlib
from pathlib import Path

import torch

from qrlora_core import Adapter, open_adapter, save_adapter

from ..config import FitConfig
from ..errors import TrainError
from ..model.layer import trained_adapter
from ..model.transformer import DTYPES
from .prepare import output_path
from .state import TrainingState


def save(state: TrainingState) -> Path:
    """Write the adapter, open it again, and look at every tensor."""
    path = output_path(state.config)
    if state.accelerator.is_main_process:
        state.reporter.phase("save", text="writing the adapter")
        adapter = stored(
            trained_adapter(state.layers, state.basis_of, state.config.adapter_alpha, state.config.name or path.stem),
            state.config,
        )
        save_adapter(adapter, path, format=state.config.output_format, metadata=adapter_metadata(state), overwrite=True)
        written = open_adapter(path)
        if written.layers.keys() != state.layers.keys():
            raise TrainError(
                "internal", f"{path.name} has {len(written.layers)} layers, {len(state.layers)} were trained"
            )
        for name in written.layers:
            written.layer(name)  # raises when a value is not finite
        state.reporter.emit("saved", step=state.done, what="adapter", file=_named(path, state.config))
    state.accelerator.wait_for_everyone()
    return path


def announce(state: TrainingState, path: Path) -> None:
    """Say that the adapter is there and whole; nothing of the run comes after it."""
    if state.accelerator.is_main_process:
        state.reporter.emit("finished", step=state.done, file=_named(path, state.config), sha256=_sha256(path))
    state.accelerator.wait_for_everyone()


def _named(path: Path, config: FitConfig) -> str:
    """A file of the run folder by its name, another one by its path."""
    return path.name if path.parent.resolve() == Path(config.run_dir).resolve() else str(path)


def stored(adapter: Adapter, config: FitConfig) -> Adapter:
    """The adapter in the precision that it is to be stored in."""
    dtype = DTYPES[config.save_dtype]
    if dtype == torch.float32:
        return adapter
    layers = {}
    for name in adapter.layers:
        layer = adapter.layer(name)
        initial = None if layer.initial is None else type(layer.initial)(*(t.to(dtype) for t in layer.initial))
        layers[name] = layer._replace(up=layer.up.to(dtype), down=layer.down.to(dtype), initial=initial)
    return Adapter.from_tensors(adapter.name, layers, config.adapter_alpha, method=adapter.method)


def adapter_metadata(state: TrainingState) -> dict[str, str]:
    """What a reader of the file may want to know besides the standard fields; no path of this machine."""
    config, encoded = state.config, state.sampler.cache.metadata
    trigger = config.trigger or encoded.get("qrlora.trigger", "")
    fields = {
        "qrlora.run_id": state.run_id,
        "qrlora.base_fingerprint": state.source.fingerprint,
        "qrlora.trigger": trigger,
        "qrlora.prompt": config.prompt or encoded.get("qrlora.prompt", ""),
        "qrlora.steps": str(state.done),
        "qrlora.learning_rate": f"{config.learning_rate:g}",
        "qrlora.seed": str(config.seed),
        "modelspec.trigger_phrase": trigger,
    }
    return {key: value for key, value in fields.items() if value}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
