"""Apply: a recipe becomes patches of a model, with or without a residual."""

import logging
import weakref
from typing import Any, Literal, get_args

import comfy.model_management
import torch

from ...qrlora_core import (
    Basis,
    BasisMismatchError,
    LayerSum,
    MergeRecipe,
    Residual,
    SettingError,
    WeightSlice,
    base_r,
    layer_sum,
    match_residual,
    storage_tolerance,
    value_dtype,
)
from ...qrlora_core.linalg import ORTHONORMAL, orthonormality_error
from ...qrlora_core.residual import Restored
from . import patches
from .initial_basis import initial_bases
from .live import live_clone
from .live_store import can_be_live
from .places import Place, load_device, own_weight, place_layers, quantised
from .protocols import ModelPatcher
from .restore import RestoredWeight, add_restored, plain_clone
from .session import interruptible, with_progress

log = logging.getLogger(__name__)

# How far a trained Q'R' may lie from the QR it began with, relative to the weight, before a residual is taken for
# that of another model.
_TRAINED_DRIFT = 0.1

# Per loaded model, so that turning alpha checks nothing twice.
_checked: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[Any, ...], Restored]] = weakref.WeakKeyDictionary()


Mode = Literal["auto", "patch", "live"]
MODES: tuple[str, ...] = get_args(Mode)


def apply_recipe(
    model: ModelPatcher, recipe: MergeRecipe, strength: float, residual: Residual | None = None, mode: Mode = "auto"
) -> tuple[Any, str]:
    """Add `strength * recipe` to a clone of a model, in its weights or beside them.

    Args:
        model: ComfyUI's MODEL; it is not changed.
        recipe: what to add.
        strength: a factor for all of it.
        residual: see `patch_model`.
        mode: "patch" changes weights when they are loaded; "live" computes beside them at every step; "auto" takes
            live where patching rounds once more (quantised weights), reloads much (a model that does not fit on the
            card), or cannot follow (schedules, gates).

    Returns:
        The clone, and a summary to show.

    Raises:
        SettingError: the mode does not go with the recipe or the residual.
        QRLoRAError: see `patch_model`.
    """
    full = recipe.scaled(strength)
    if not recipe.terms:
        return model.clone(), "no adapter is connected, or all are bypassed: the model stays as it is"
    if residual is not None and (mode == "live" or full.needs_live):
        raise SettingError(
            "a residual restores weights, which live mode never touches (schedules and prompts need live mode): "
            "disconnect the residual, or set mode to 'patch' without schedules"
        )
    if mode == "patch" and full.needs_live:
        raise SettingError("a schedule, or acting by the prompt, needs live mode: set mode to 'live' or 'auto'")
    places = _places(model, recipe)
    reason = "" if mode == "patch" or residual is not None else _reason_for_live(model, full, places, mode)
    if not reason:
        return patch_model(model, recipe, strength, residual)
    if not full.active:
        return model.clone(), f"strength 0: none of {len(places)} layers changed"
    clone = live_clone(model, full, places)
    ranks = [info.rank for adapter in full.adapters for info in adapter.layers.values()]
    text = f"{len(places)} layers live at strength {strength:g}, rank {max(ranks)} ({reason}): no weight is touched"
    log.info("QR-LoRA: %s", text)
    return clone, text


def _reason_for_live(model: ModelPatcher, recipe: MergeRecipe, places: dict[str, WeightSlice], mode: Mode) -> str:
    """Why a recipe is applied live, "" when it is not."""
    if mode == "live":
        return "as chosen"
    if recipe.needs_live:
        return "strengths follow the sampling or the prompt"
    if not can_be_live(model, places.values()):
        return ""
    if any(quantised(model, place) for place in places.values()):
        return "the weights are quantised"
    total = comfy.model_management.get_total_memory(load_device(model))
    if model.model_size() > total and not comfy.model_management.is_device_cpu(load_device(model)):
        return "the model does not fit on the card"
    return ""


def patch_model(
    model: ModelPatcher, recipe: MergeRecipe, strength: float, residual: Residual | None = None
) -> tuple[Any, str]:
    """Add `strength * recipe` to a clone of a model, in its weights.

    Without a residual each layer gets one low-rank patch, exactly a LoRA. With one, the layer's weight is restored
    from `W_res + scaling * Q R` first, which gives a quantised base the residual's precision on those layers.

    Args:
        model: ComfyUI's MODEL; it is not changed.
        recipe: what to add.
        strength: a factor for all of it.
        residual: the file made for one of the recipe's bases.

    Returns:
        The clone, and a summary to show.

    Raises:
        QRLoRAError: a layer is missing or has another shape, a tensor is not finite, or the residual does not belong
            to the recipe and the model. Nothing is patched then.
    """
    full = recipe.scaled(strength)
    if not recipe.terms:
        return model.clone(), "no adapter is connected, or all are bypassed: the model stays as it is"
    places = _places(model, recipe)
    if not full.active and residual is None:
        return model.clone(), f"strength 0: none of {len(places)} layers changed"
    restored = {} if residual is None else _match(model, recipe, places, residual)
    sums = _sums(model, recipe, places, core_in_residual=residual is not None) if full.active else {}
    base = model if residual is None else plain_clone(model)
    clone = patches.patched_clone(base, patches.placed(sums, places), strength)
    if residual is not None:
        kept = {
            name: RestoredWeight.of(
                residual, name, restoration.basis, restoration.scaling, 1.0 - _cores_taken(full, name)
            )
            for name, restoration in restored.items()
        }
        add_restored(clone, kept, places)
    return clone, _summary(sums, strength, residual, restored)


def recipe_patches(model: ModelPatcher, recipe: MergeRecipe) -> dict[Place, Any]:
    """What a recipe adds to a model at strength 1, as patches; the basis of full-QR files comes from the model.

    Raises:
        QRLoRAError: a layer is missing or has another shape, or a tensor is not finite.
    """
    places = _places(model, recipe)
    return patches.placed(_sums(model, recipe, places), places)


def _places(model: ModelPatcher, recipe: MergeRecipe) -> dict[str, WeightSlice]:
    return place_layers(model, [target for adapter in recipe.adapters for target in adapter.targets])


def _sums(
    model: ModelPatcher, recipe: MergeRecipe, places: dict[str, WeightSlice], core_in_residual: bool = False
) -> dict[str, LayerSum]:
    """What the recipe adds to each layer that it changes."""
    initial_of = None if core_in_residual else initial_bases(model, recipe, places)
    sums = {
        name: layer_sum(recipe, name, initial_of=initial_of, core_in_residual=core_in_residual)
        for name in interruptible(recipe.layer_names)
    }
    return {name: total for name, total in sums.items() if total is not None}


def _cores_taken(recipe: MergeRecipe, name: str) -> float:
    """How often full-QR terms without initial Q and R take the core of a layer away."""
    return sum(
        term.factor(name)
        for term in recipe.terms
        if term.adapter.method == "qr" and not term.adapter.has_initial and name in term.adapter.layers
    )


def _match(
    model: ModelPatcher, recipe: MergeRecipe, places: dict[str, WeightSlice], residual: Residual
) -> dict[str, Restored]:
    """For every layer the basis that restores it from the residual; an error when there is none."""
    prints = [adapter.basis_fingerprint for adapter in recipe.adapters]
    remembered = _checked.setdefault(model.model, {})
    matches: dict[str, Restored] = {}
    for name in with_progress([name for name in recipe.layer_names if name in places]):
        key = (name, residual.identity(), *prints)
        if None in prints or key not in remembered:
            remembered[key] = _match_layer(model, recipe, places[name], residual, name)
        matches[name] = remembered[key]
    return matches


def _match_layer(
    model: ModelPatcher, recipe: MergeRecipe, place: WeightSlice, residual: Residual, name: str
) -> Restored:
    weight, stored = own_weight(model, place)
    weight = weight.to(load_device(model))
    stored_residual = residual.weight(name)
    tolerance = storage_tolerance(stored, value_dtype(stored_residual))
    bases, trained = [], []
    for adapter in recipe.adapters:
        if name not in adapter.layers:
            continue
        layer, scaling = adapter.layer(name), adapter.layers[name].scaling
        if layer.initial is not None:
            bases.append((layer.initial, scaling))
        elif adapter.method == "qr":
            trained.append((Basis(layer.up, layer.down), scaling))
        elif orthonormality_error(layer.up) <= ORTHONORMAL:
            # on the CPU: what is kept per loaded model must not hold memory of the graphics card
            r = base_r(weight, layer.up.to(weight.device)).cpu()
            bases.append((Basis(layer.up, r), scaling))
    if not bases and not trained:
        raise BasisMismatchError(
            f"no adapter holds a basis of {name} that a residual could belong to (its Q is not orthonormal, as in a "
            "saved merge of two bases); apply without the residual, or merge the original adapters"
        )
    try:
        return match_residual(weight, stored_residual, bases, tolerance, name)
    except BasisMismatchError:
        if bases or not trained:
            raise
    # Q' and R' were trained away from Q and R, so they restore the weight roughly; the core is then W - W_res
    return match_residual(weight, stored_residual, trained, tolerance + _TRAINED_DRIFT, name)._replace(basis=None)


def _summary(
    sums: dict[str, LayerSum], strength: float, residual: Residual | None, restored: dict[str, Restored]
) -> str:
    columns = max((sum(product.up.shape[1] for product in total.products) for total in sums.values()), default=0)
    lines = [f"{len(sums)} layers patched at strength {strength:g}, rank {columns}"]
    if residual is not None:
        worst = max((restoration.error for restoration in restored.values()), default=0.0)
        lines.append(f"{len(restored)} layers restored from {residual.name} (they differ by up to {100 * worst:.2g} %)")
    log.info("QR-LoRA: %s", "; ".join(lines))
    return "\n".join(lines)
