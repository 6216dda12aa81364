"""The factors of live application: Q and dR of a set of adapters, laid out by the model's modules.

They are a small model of their own, which the host loads, moves and unloads like any other.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ...qrlora_core import MergeRecipe, SettingError, WeightSlice, same_basis, term_products
from .initial_basis import initial_bases
from .places import PREFIX
from .protocols import ModelPatcher
from .session import interruptible


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the columns of one layer go: `length` outputs from `start`, through `up` (length, rank)."""

    start: int
    length: int
    up: int


@dataclass(frozen=True, slots=True)
class Stack:
    """Terms of one module that share a basis in all of its layers.

    Attributes:
        rows: of each layer, in the order of the columns.
        downs: index of a term -> index of its dR of all layers, one below the other: (sum of ranks, in).
    """

    rows: tuple[Rows, ...]
    downs: tuple[tuple[int, int], ...]


class FactorStore(nn.Module):
    """Q and dR of a set of adapters in the dtype that a model computes in. The host treats it as a model.

    Attributes:
        layout: module name -> stacks.
        patcher: the host's handle of it; clones of this one are what it loads.
    """

    layout: dict[str, tuple[Stack, ...]]
    patcher: ModelPatcher

    def __init__(self, layout: dict[str, tuple[Stack, ...]], tensors: Sequence[Tensor], model: ModelPatcher) -> None:
        super().__init__()
        self.layout = layout
        self.tensors = nn.ParameterList([nn.Parameter(tensor, requires_grad=False) for tensor in tensors])
        # the plain loader: a few small tensors gain nothing by being moved at every use
        self.patcher = comfy.model_patcher.ModelPatcher(self, model.load_device, model.offload_device)


# One store for each model and set of adapters, held by the clones that use it
_Stores = weakref.WeakValueDictionary[tuple[Any, ...], FactorStore]
_stores: weakref.WeakKeyDictionary[nn.Module, _Stores] = weakref.WeakKeyDictionary()


def factor_store(model: ModelPatcher, recipe: MergeRecipe, places: Mapping[str, WeightSlice]) -> FactorStore:
    """The factors of a recipe's adapters, whatever their strengths: turning alpha finds what is there."""
    dtype = compute_dtype(model)
    owners = ((weakref.ref(term.adapter), term.onto and weakref.ref(term.onto), term.scales) for term in recipe.terms)
    key = (dtype, *owners)
    stores = _stores.setdefault(model.model, weakref.WeakValueDictionary())
    store = stores.get(key)
    if store is None:
        store = stores[key] = _built(model, recipe, places, dtype)
    return store


class _Entry(NamedTuple):
    """One term's change of one layer in a module."""

    start: int
    up: Tensor
    down: Tensor
    factor: float


def _built(
    model: ModelPatcher, recipe: MergeRecipe, places: Mapping[str, WeightSlice], dtype: torch.dtype
) -> FactorStore:
    """Lay the factors out by module, term by term, those on one basis together."""
    initial_of = initial_bases(model, recipe, dict(places))
    modules: dict[str, dict[int, list[_Entry]]] = {}
    for name in interruptible(recipe.layer_names):
        place = places[name]
        module = PREFIX + place.key.removesuffix(".weight")
        if not can_be_live(model, [place]):
            raise SettingError(f"{name} is no linear layer, so it can only be patched; set mode to 'patch'")
        for index, term in enumerate(recipe.terms):
            if name in term.adapter.layers and term.block_factor(name):
                (product,) = term_products(term, name, initial_of=initial_of)
                ((down, factor),) = product.summands
                modules.setdefault(module, {}).setdefault(index, []).append(
                    _Entry(place.start or 0, product.up, down, factor)
                )
    tensors: list[Tensor] = []
    layout = {module: _stacks(terms, tensors, dtype) for module, terms in modules.items()}
    return FactorStore(layout, tensors, model)


def _stacks(terms: Mapping[int, list[_Entry]], tensors: list[Tensor], dtype: torch.dtype) -> tuple[Stack, ...]:
    """The stacks of one module; what they refer to is appended to `tensors`."""

    def kept(tensor: Tensor) -> int:
        tensors.append(tensor.to(dtype))
        return len(tensors) - 1

    bases: list[tuple[list[_Entry], tuple[Rows, ...], list[tuple[int, int]]]] = []
    for index, entries in terms.items():
        entries.sort(key=lambda entry: entry.start)
        down = kept(torch.cat([entry.down.float() * entry.factor for entry in entries]))
        for earlier, _, downs in bases:
            if len(earlier) == len(entries) and all(
                first.start == second.start and same_basis(first.up, second.up)
                for first, second in zip(earlier, entries)
            ):
                downs.append((index, down))
                break
        else:
            rows = tuple(Rows(entry.start, entry.up.shape[0], kept(entry.up)) for entry in entries)
            bases.append((entries, rows, [(index, down)]))
    return tuple(Stack(rows, tuple(downs)) for _, rows, downs in bases)


def can_be_live(model: ModelPatcher, places: Iterable[WeightSlice]) -> bool:
    """Whether all of these layers are linear: a convolution can only be patched."""
    return all(hasattr(_module(model, place), "in_features") for place in places)


def _module(model: ModelPatcher, place: WeightSlice) -> Any:
    return comfy.utils.get_attr(model.model, PREFIX + place.key.removesuffix(".weight"))


def compute_dtype(model: ModelPatcher) -> torch.dtype:
    """What the model's activations are computed in."""
    dtype: torch.dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16
