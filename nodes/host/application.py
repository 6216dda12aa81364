"""Apply: a recipe becomes patches of a FLUX model, with or without a residual."""

import logging
import weakref
from typing import Any

import torch
from torch import Tensor

from ...qrlora_core import (
    Adapter,
    Basis,
    BasisMismatchError,
    MergeRecipe,
    Residual,
    WeightSlice,
    base_r,
    decompose,
    match_residual,
    merged_adapter,
    storage_tolerance,
    value_dtype,
)
from ...qrlora_core.linalg import orthonormality_error
from ...qrlora_core.residual import Restored
from . import patches, restore
from . import places as host_places
from .session import with_progress

log = logging.getLogger(__name__)

# How far a trained Q'R' may lie from the QR it began with, relative to the weight, before a residual is taken for
# that of another model.
_TRAINED_DRIFT = 0.1
_ORTHONORMAL = 1e-2

# Per loaded model, so that turning alpha neither decomposes nor checks anything twice.
_cores: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[str, int], Basis]] = weakref.WeakKeyDictionary()
_checked: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[Any, ...], Restored]] = weakref.WeakKeyDictionary()


def patch_model(model: Any, recipe: MergeRecipe, strength: float, residual: Residual | None = None) -> tuple[Any, str]:
    """Add `strength * recipe` to a clone of a model.

    Without a residual each layer gets one low-rank patch, exactly a LoRA. With one, the layer's weight is restored
    from `W_res + scaling * Q R` first, which gives a quantised base the residual's precision on those layers.

    Args:
        model: ComfyUI's MODEL, a FLUX; it is not changed.
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
    places = _places(model, recipe)
    if not full.active and residual is None:
        return model.clone(), f"strength 0: none of {len(places)} layers changed"
    restored = {} if residual is None else _match(model, recipe, places, residual)
    adapter = merged_adapter(recipe, initial_of=_initial_of(model, places), core_in_residual=residual is not None)
    updates = _updates(adapter, places) if full.active else {}
    clone = patches.patched_clone(model, updates, strength)
    for name, found in restored.items():
        left = 1.0 - _open_core(full, name)
        patch = restore.RestoredWeight.of(residual, name, found.basis, found.scaling, left)
        restore.put_restored(clone, places[name], patch)
    if restored:
        restore.keep_precision(clone)
    return clone, _summary(adapter, updates, strength, residual, restored)


def low_rank_updates(model: Any, recipe: MergeRecipe) -> patches.Updates:
    """What a recipe adds to a model at strength 1, layer by layer; the basis of full-QR files comes from the model.

    Raises:
        QRLoRAError: a layer is missing or has another shape, or a tensor is not finite.
    """
    places = _places(model, recipe)
    return _updates(merged_adapter(recipe, initial_of=_initial_of(model, places)), places) if recipe.active else {}


def _places(model: Any, recipe: MergeRecipe) -> dict[str, WeightSlice]:
    return host_places.place_layers(model, [target for adapter in recipe.adapters for target in adapter.targets])


def _updates(adapter: Adapter, places: dict[str, WeightSlice]) -> patches.Updates:
    return {name: (places[name], *_lora(adapter, name)) for name in adapter.layers}


def _lora(adapter: Adapter, name: str) -> tuple[Tensor, Tensor, float]:
    """What the stock loader would read from an export of this layer, alpha rounded to float32 as a file rounds it."""
    up, down, alpha = adapter.update(name)
    return up, down, float(torch.tensor(alpha, dtype=torch.float32))


def _open_core(recipe: MergeRecipe, name: str) -> float:
    """How often full-QR terms without initial Q and R take the core of a layer away."""
    return sum(
        term.factor(name)
        for term in recipe.terms
        if term.adapter.method == "qr" and not term.adapter.has_initial and name in term.adapter.layers
    )


def _initial_of(model: Any, places: dict[str, WeightSlice]) -> Any:
    """Q and R of a layer of a full-QR adapter, decomposed from the model's own weight; kept while the model is."""

    def initial(adapter: Adapter, name: str) -> Basis:
        rank = adapter.layers[name].rank
        known = _cores.setdefault(model.model, {})
        if (name, rank) not in known:
            weight, _ = host_places.own_weight(model, places[name])
            basis = decompose(weight.to(host_places.load_device(model)), rank, method="exact")
            known[name, rank] = Basis(basis.q.cpu(), basis.r.cpu())
        return known[name, rank]

    return initial


def _match(model: Any, recipe: MergeRecipe, places: dict[str, WeightSlice], residual: Residual) -> dict[str, Restored]:
    """For every layer the basis that restores it from the residual; an error when there is none."""
    prints = [adapter.basis_fingerprint for adapter in recipe.adapters]
    known = _checked.setdefault(model.model, {})
    found: dict[str, Restored] = {}
    for name in with_progress([name for name in recipe.layer_names if name in places]):
        key = (name, residual.identity(), *prints)
        if None in prints or key not in known:
            known[key] = _match_layer(model, recipe, places[name], residual, name)
        found[name] = known[key]
    return found


def _match_layer(model: Any, recipe: MergeRecipe, place: WeightSlice, residual: Residual, name: str) -> Restored:
    weight, stored = host_places.own_weight(model, place)
    weight = weight.to(host_places.load_device(model))
    rest = residual.weight(name)
    tolerance = storage_tolerance(stored, value_dtype(rest))
    bases, trained = [], []
    for adapter in recipe.adapters:
        if name not in adapter.layers:
            continue
        layer, scaling = adapter.layer(name), adapter.layers[name].scaling
        if layer.initial is not None:
            bases.append((layer.initial, scaling))
        elif adapter.method == "qr":
            trained.append((Basis(layer.up, layer.down), scaling))
        elif orthonormality_error(layer.up) <= _ORTHONORMAL:
            bases.append((Basis(layer.up, base_r(weight, layer.up.to(weight.device))), scaling))
    if not bases and not trained:
        raise BasisMismatchError(
            f"no adapter holds a basis of {name} that a residual could belong to (its Q is not orthonormal, as in a "
            "saved merge of two bases); apply without the residual, or merge the original adapters"
        )
    try:
        return match_residual(weight, rest, bases, tolerance, name)
    except BasisMismatchError:
        if bases or not trained:
            raise
    # Q' and R' were trained away from Q and R, so they restore the weight roughly; the core is then W - W_res
    return match_residual(weight, rest, trained, tolerance + _TRAINED_DRIFT, name)._replace(basis=None)


def _summary(
    adapter: Adapter,
    updates: dict[str, Any],
    strength: float,
    residual: Residual | None,
    restored: dict[str, Restored],
) -> str:
    lines = [f"{len(updates)} layers patched at strength {strength:g}, rank {adapter.rank}"]
    if residual is not None:
        worst = max((found.error for found in restored.values()), default=0.0)
        lines.append(f"{len(restored)} layers restored from {residual.name} (they differ by up to {100 * worst:.2g} %)")
    log.info("QR-LoRA: %s", "; ".join(lines))
    return "\n".join(lines)
