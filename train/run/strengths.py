"""What a trained adapter does at several strengths: pictures, and two curves for which nobody has to look.

With v a prediction, 0 the model without the adapter, s a strength, at the same places of the model's own sampling path:

    shown(s) = <v_s - v_0, v_1 - v_0> / |v_1 - v_0|^2     on the caption with the trigger
    drift(s) = |v_s - v_0| / |v_1 - v_0|                  numerator on the caption without it

A drift as high as what is shown says that the adapter acts whether its trigger is there or not.
"""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrlora_core import EncodedText, PathError, products, whole_file
from qrlora_core.storage import TensorSpec
from qrlora_core.writing import write_tensors

from ..config import FitConfig
from ..data.batches import generator_of
from ..errors import is_out_of_memory
from .denoise import prediction, sample_latents, shifted
from .state import TrainingState

log = logging.getLogger(__name__)

SCHEMA, VERSION = "qr-lora/strengths", 1
FOLDER = "strengths"  # inside the run folder
DRAWN = (0.0, 0.6, 0.8, 1.0)
CURVE = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
_POINTS, _STEPS_BETWEEN = 3, 4  # measured places of a path, and its steps from one to the next
_SHARE, _BACKWARD = 10, 3  # "auto": a tenth of the work; a step costs about three forward passes


@dataclass(frozen=True, slots=True)
class _Caption:
    """A caption and what the model sees of it."""

    prompt: str
    text: EncodedText


def show_strengths(state: TrainingState) -> None:
    """Draw and measure, write `strengths/step-<done>.json` and `.safetensors`, and report; or say why not.

    Raises:
        Stopped: the run was asked to stop; the adapter is written by then.
    """
    if not state.accelerator.is_main_process or not _wanted(state.config):
        return
    captions = _captions(state)
    if isinstance(captions, str):
        log.info("strengths are not shown: %s", captions)
        return
    state.model.eval()
    try:
        with torch.no_grad(), state.training_adapter.off() if state.training_adapter is not None else nullcontext():
            _Show(state, *captions).run()
    except (PathError, OSError) as error:  # a disk that refuses it does not fail a training
        log.warning("strengths are not shown: they cannot be written (%s); the adapter is written", error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("strengths are not shown: memory ended (%s); the adapter is written", error)
    finally:
        state.model.train()


def evaluations(config: FitConfig) -> int:
    """Forward passes that the pictures and the curves take."""
    path = _POINTS * _STEPS_BETWEEN
    return path + _POINTS * (1 + 2 * len(CURVE)) + 2 * len(DRAWN) * config.sample_steps


def _wanted(config: FitConfig) -> bool:
    if config.strengths == "auto":
        work = _BACKWARD * config.steps * config.gradient_accumulation * config.batch_size
        return _SHARE * evaluations(config) <= work
    return config.strengths == "on"


def _captions(state: TrainingState) -> tuple[_Caption, _Caption] | str:
    """The first picture's caption with the trigger and without it; or why there is none without."""
    cache = state.sampler.cache
    item = next(item for item in cache.items if not item.is_class)
    own = _Caption(item.caption, cache.text(item.text))
    plain, trigger = cache.plain(), state.config.trigger or cache.metadata.get("qrlora.trigger", "")
    if plain is not None and plain.trigger == trigger:
        return own, _Caption(plain.prompt, plain.text)
    if cache.empty_text is not None and item.text != cache.empty_text:
        return own, _Caption("", cache.text(cache.empty_text))
    return "the data hold no caption without the trigger: they were encoded by an earlier version, or without a trigger"


class _Show:
    """One look at a trained state.

    Args:
        state: trained.
        own, plain: captions.
    """

    def __init__(self, state: TrainingState, own: _Caption, plain: _Caption) -> None:
        self.state, self.captions = state, (own, plain)
        index = next(index for index, item in enumerate(state.sampler.cache.items) if not item.is_class)
        shape = state.sampler.cache.latent_shape(index)
        self.noise = torch.randn(1, *shape, generator=generator_of(state.config.seed, "sample"))
        self.done, self.total = 0, evaluations(state.config)

    def run(self) -> None:
        state = self.state
        measured = self._measured()
        latents = self._drawn()
        folder = Path(state.config.run_dir) / FOLDER
        name = f"step-{state.done:08}"
        folder.mkdir(exist_ok=True)
        spec = {"latent": TensorSpec(torch.float32, tuple(latents.shape))}
        header = {"qrlora.step": str(state.done)}
        write_tensors(folder / f"{name}.safetensors", spec, [("latent", latents)], header, overwrite=True)
        table = {
            "schema": SCHEMA,
            "version": VERSION,
            "run_id": state.run_id,
            "step": state.done,
            **measured,
            "prompts": {"with_trigger": self.captions[0].prompt, "without": self.captions[1].prompt},
            "pictures": {"file": f"{name}.safetensors", "strengths": list(DRAWN)},
        }
        with whole_file(folder / f"{name}.json", overwrite=True) as file:
            file.write(json.dumps(table, indent=1, allow_nan=False).encode())
        lists = {key: measured[key] for key in ("strengths", "shown", "drift")}
        state.reporter.emit("strengths", step=state.done, file=f"{FOLDER}/{name}.json", **lists)
        for strength, shown, drift in zip(measured["strengths"], measured["shown"], measured["drift"]):
            log.info("strength %.1f: %s of its effect, without the trigger %s", strength, _said(shown), _said(drift))

    def _measured(self) -> dict[str, Any]:
        """The curves, over all measured places together."""
        state = self.state
        backbone, latents = state.backbone, self.noise.to(state.device)
        factor = backbone.shift(backbone.tokens(*latents.shape[2:]))
        sigmas = shifted(torch.linspace(1.0, 0.0, _POINTS * _STEPS_BETWEEN + 1), factor)
        along, size, moved, base, levels = [0.0] * len(CURVE), 0.0, [0.0] * len(CURVE), 0.0, []
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            each, then = (value.to(state.device).expand(1) for value in (sigma, following))
            own = self._predicted(latents, each, 0, 0.0)
            if step % _STEPS_BETWEEN == 0:
                levels.append(round(float(sigma), 4))
                plain = self._predicted(latents, each, 1, 0.0)
                effects = [self._predicted(latents, each, 0, strength) - own for strength in CURVE]
                full = effects[CURVE.index(1.0)]
                size += products(full, full, full).own
                base += products(plain, plain, plain).own
                for index, strength in enumerate(CURVE):
                    along[index] += products(effects[index], full, full).style
                    other = self._predicted(latents, each, 1, strength) - plain
                    moved[index] += products(other, other, other).own
            latents = backbone.process.step(latents, own, each, then)
        return {
            "strengths": list(CURVE),
            "shown": [_ratio(value, size) for value in along],
            "drift": [_ratio(value, size, root=True) for value in moved],
            "moved": [_ratio(value, base, root=True) for value in moved],
            "noise_levels": levels,
        }

    def _drawn(self) -> Tensor:
        """Latents (2 * strengths, channels, height, width): with the trigger by strength, then without."""
        state, config, drawn = self.state, self.state.config, []
        for caption in self.captions:
            for strength in DRAWN:
                self._check()
                with at_strength(state, strength):
                    text = caption.text.map(lambda tensor: tensor[None])
                    steps, guidance = config.sample_steps, config.sample_guidance
                    drawn.append(
                        sample_latents(
                            state.model, state.backbone, self.noise, text, steps, guidance, state.device, state.dtype
                        )
                    )
                self._report(config.sample_steps)
        return torch.cat(drawn)

    def _predicted(self, latents: Tensor, sigma: Tensor, caption: int, strength: float) -> Tensor:
        state = self.state
        self._check()
        text = self.captions[caption].text.map(lambda tensor: tensor[None])
        guidance = state.config.sample_guidance
        with at_strength(state, strength):
            predicted = prediction(
                state.model, state.backbone, latents, sigma, text, guidance, state.device, state.dtype
            )
        self._report(1)
        return predicted

    def _check(self) -> None:
        """Of several processes the others wait for this one, which then cannot stop alone."""
        if self.state.accelerator.num_processes == 1:
            self.state.watch.check()

    def _report(self, passes: int) -> None:
        self.done += passes
        self.state.reporter.phase("strengths", self.done, self.total, "what the adapter does at several strengths")


@contextmanager
def at_strength(state: TrainingState, strength: float) -> Iterator[None]:
    """Within, the trained layers add so much of their update."""
    scalings = {name: layer.scaling for name, layer in state.layers.items()}
    try:
        for name, layer in state.layers.items():
            layer.scaling = strength * scalings[name]
        yield
    finally:
        for name, layer in state.layers.items():
            layer.scaling = scalings[name]


def _ratio(part: float, whole: float, root: bool = False) -> float | None:
    """None where there is nothing to compare with: an adapter that changes nothing."""
    if not whole or not math.isfinite(part / whole):
        return None
    return round(math.sqrt(part / whole) if root else part / whole, 6)


def _said(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.2f}"
