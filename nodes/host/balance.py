"""Two adapters measured by the model's own predictions, with the host's own sampling machinery and in live mode."""

import functools
import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...qrlora_core import (
    ASKED,
    Asked,
    MergeRecipe,
    OnMismatch,
    Point,
    Products,
    SettingError,
    Trial,
    WeightError,
    merge,
    products,
)
from .encoders import conditioning_of
from .live import KEY, live_clone, set_factors
from .live_store import can_be_live
from .places import place_layers
from .protocols import Clip, ModelPatcher
from .steps import noise_of

log = logging.getLogger(__name__)

STEPS_BETWEEN = 4  # of the path, from one measured point to the next
_NOTHING, _STYLE, _CONTENT = Trial(0.0, 0.0), Trial(1.0, 0.0), Trial(0.0, 1.0)
_CELL = 8  # pixels of a latent pixel, where an older host does not say


class Path(NamedTuple):
    """Where the model is asked.

    Attributes:
        points: how many places of a sampling path are measured, evenly spread over its steps.
        size: of the square picture in pixels.
        noises: so many paths at once.
        seed: of the noises.
        sigmas: of the path, the last one included; None for the model's own "simple" ones.
    """

    points: int
    size: int
    noises: int
    seed: int
    sigmas: Tensor | None = None


class Pair(NamedTuple):
    """The two recipes at strength 1, and what is done where their bases differ."""

    style: MergeRecipe
    content: MergeRecipe
    on_mismatch: OnMismatch

    def at(self, trial: Trial) -> MergeRecipe:
        return merge(self.style, trial.alpha, self.content, trial.beta, self.on_mismatch)

    def changes(self, trial: Trial) -> bool:
        """Whether a trial can differ from the model alone: an adapter that is not there or off changes nothing."""
        sides = ((trial.alpha, self.style), (trial.beta, self.content))
        return any(factor and recipe.active for factor, recipe in sides)


Questions = Mapping[Trial, Sequence[Asked]]
# What was measured last on each loaded model (key, questions, points), so that turning `choose` measures nothing
_Measurement = tuple[Any, set[tuple[Trial, Asked]], list[Point]]
_last_measured: weakref.WeakKeyDictionary[Any, _Measurement] = weakref.WeakKeyDictionary()


def measure(
    model: ModelPatcher, clip: Clip, pair: Pair, prompts: Mapping[Asked, str], questions: Questions, path: Path
) -> tuple[list[Point], int]:
    """Ask the model, along its own sampling path of the prompt for both, what trials change.

    Args:
        model: ComfyUI's MODEL; it is not changed. What earlier nodes add live counts as the model's own.
        clip: encodes the prompts.
        pair, prompts, questions, path: what is asked; see `qrlora_core.needed`.

    Returns:
        The points, and how many predictions of single prompts that took; 0 where they are known from the last time.

    Raises:
        SettingError: a layer is no linear layer.
        WeightError: the model predicts numbers that are not finite.
        QRLoRAError: a layer is missing, or a tensor is not finite.
    """
    asked = {(trial, kind) for trial, kinds in questions.items() for kind in kinds}
    key = _key(clip, pair, prompts, path)
    remembered = _last_measured.get(model)
    if remembered is not None and remembered[0] == key and asked <= remembered[1]:
        return remembered[2], 0
    adapters = (*pair.style.adapters, *pair.content.adapters)
    places = place_layers(model, [target for adapter in adapters for target in adapter.targets])
    if not can_be_live(model, places.values()):
        raise SettingError("an adapter changes layers that are not linear (LoCon); only linear ones can be measured")
    conditionings = {kind: conditioning_of(clip, prompts[kind]) for kind in ASKED}
    earlier = model.get_attachment(KEY)
    terms = earlier.recipe.terms if earlier is not None else ()
    clone = live_clone(model, pair.at(Trial(1.0, 1.0)), places)
    sampler = _Measurer(clone, pair, terms, questions, path.points)
    try:
        _walk(clone, conditionings, sampler, path)
    finally:
        clone.get_attachment(KEY).eject(None)  # nothing stays on the model that others sample with
    _last_measured[model] = (key, asked, sampler.measurements)
    log.info("QR-LoRA: %d predictions measured a pair", sampler.evaluations)
    return sampler.measurements, sampler.evaluations


def _walk(clone: Any, conditionings: Mapping[Asked, Any], sampler: "_Measurer", path: Path) -> None:
    """One sampling by the host's guider, with a sampler that measures on its way."""
    sigmas = path.sigmas
    if sigmas is None:
        sampling = clone.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS_BETWEEN * path.points)
    if sigmas.ndim != 1 or len(sigmas) <= path.points:
        raise SettingError(f"{len(sigmas)} sigmas are too few for {path.points} points; connect a longer schedule")
    latent = _empty_latent(clone, path.size, path.noises)
    guider = comfy.samplers.CFGGuider(clone)
    guider.inner_set_conds(dict(conditionings))
    noise = comfy.sample.prepare_noise(latent, path.seed)
    sampler.start(len(sigmas) - 1)
    guider.sample(noise, latent, sampler, sigmas.cpu(), disable_pbar=True, seed=path.seed)


def _empty_latent(model: ModelPatcher, size: int, count: int = 1) -> Tensor:
    """(count, channels, [1,] height, width) of zeros, as the model takes it."""
    form = model.get_model_object("latent_format")
    side = max(2, size // getattr(form, "spacial_downscale_ratio", _CELL) // 2 * 2)
    latent: Tensor = comfy.sample.fix_empty_latent_channels(model, torch.zeros(count, form.latent_channels, side, side))
    return latent


class _Measurer(comfy.samplers.Sampler):
    """Follows the model's own prediction from noise to picture, and asks the questions at some of the steps."""

    def __init__(self, clone: Any, pair: Pair, earlier: Sequence[Any], questions: Questions, points: int) -> None:
        self.clone, self.pair, self.earlier = clone, pair, tuple(earlier)
        self.questions, self.points = questions, points
        self.measurements: list[Point] = []
        self.evaluations = 0
        self._measured: set[int] = set()
        self._bar: Any = None

    def start(self, steps: int) -> None:
        """Fix which steps are measured, and how long the progress bar is."""
        self._measured = {steps * point // self.points for point in range(self.points)}
        each = sum(len(asked) for trial, asked in self.questions.items() if self.pair.changes(trial)) + len(ASKED)
        self._bar = comfy.utils.ProgressBar(len(self._measured) * each + steps - len(self._measured))

    @torch.no_grad()
    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Called by the host's guider; see `comfy.samplers.KSAMPLER`."""
        sampling = model_wrap.inner_model.model_sampling
        x: Tensor = sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))
        course = sigmas.tolist()

        def predict(trial: Trial, asked: Sequence[Asked], sigma: Tensor) -> dict[Asked, Tensor]:
            """The derivative that a sampler follows, for each of these prompts: the velocity of a flow model."""
            comfy.model_management.throw_exception_if_processing_interrupted()
            set_factors(self.clone, MergeRecipe(self.earlier + self.pair.at(trial).terms))
            conditions = [model_wrap.conds[kind] for kind in asked]
            times = sigma * x.new_ones(x.shape[0])
            clean = comfy.samplers.calc_cond_batch(
                model_wrap.inner_model, conditions, x, times, extra_args["model_options"]
            )
            self.evaluations += len(asked)
            self._bar.update(len(asked))
            return {kind: (x - part).float() / sigma for kind, part in zip(asked, clean)}

        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            if step in self._measured:
                base = predict(_NOTHING, ASKED, sigma)
                level = noise_of(course[step], course).level
                self.measurements.append(self._point(level, base, functools.partial(predict, sigma=sigma)))
            else:
                base = predict(_NOTHING, ("both",), sigma)
            x = x + base["both"].to(x) * (following - sigma)
        return x

    def _point(self, level: float, base: dict[Asked, Tensor], predict: Any) -> Point:
        """The answers to all questions at the present latents."""

        def effect(trial: Trial, asked: Sequence[Asked]) -> dict[Asked, Tensor]:
            if not self.pair.changes(trial):  # exactly: predictions in batches of other sizes differ by rounding
                return {kind: torch.zeros_like(base[kind]) for kind in asked}
            return {kind: made - base[kind] for kind, made in predict(trial, asked).items()}

        alone = {trial: effect(trial, self.questions[trial]) for trial in (_STYLE, _CONTENT)}
        style, content = alone[_STYLE], alone[_CONTENT]
        effects: dict[tuple[Trial, Asked], Products] = {}
        for trial, asked in self.questions.items():
            made = alone[trial] if trial in alone else effect(trial, asked)
            effects.update({(trial, kind): products(made[kind], style[kind], content[kind]) for kind in asked})
        norms = {kind: products(own, own, own).own for kind, own in base.items()}
        if not all(map(math.isfinite, (*norms.values(), *(measured.own for measured in effects.values())))):
            raise WeightError(
                f"the model predicts numbers that are not finite (NaN or infinite) at noise level {level:.2f}, with "
                "which it draws black pictures, too. Load it in another dtype (bf16 or fp32), or lower 'highest'"
            )
        return Point(level, norms, effects)


def _key(clip: Clip, pair: Pair, prompts: Mapping[Asked, str], path: Path) -> tuple[Any, ...]:
    """What a measurement depends on besides the model; large parts by weak references."""
    terms = [
        (weakref.ref(term.adapter), term.onto and weakref.ref(term.onto), term.strength, *term.identity[2:])
        for recipe in pair[:2]
        for term in recipe.terms
    ]
    sigmas = None if path.sigmas is None else tuple(path.sigmas.tolist())
    return (weakref.ref(clip), terms, len(pair.style.terms), pair.on_mismatch, tuple(prompts.items()), path[:4], sigmas)
