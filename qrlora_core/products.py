"""What a recipe adds to one layer: products of Q and sums of dR, as references to the adapters' own tensors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter, AdapterLayer
from .basis import joint_basis
from .errors import BasisMismatchError, SettingError
from .linalg import Basis
from .pairs import moved_update, own_layer, same_columns, shares_basis
from .recipe import MergeRecipe, Term

InitialOf = Callable[[Adapter, str], Basis]


class Product(NamedTuple):
    """Updates of one layer that share their columns: `up @ sum(factor * down)`.

    Attributes:
        up: (out, rank).
        summands: (down, factor) pairs, down (rank, in); the tensors are the adapters' own.
        base_r: R of the base weight for `up`, (rank, in), where an adapter holds it.
    """

    up: Tensor
    summands: tuple[tuple[Tensor, float], ...]
    base_r: Tensor | None = None

    def delta_r(self) -> Tensor:
        """The sum, (rank, in), in float32: in bfloat16 the sum would lose most of a small update."""
        (down, factor), *others = self.summands
        total = down.float() * factor
        for down, factor in others:
            total = total + down.float() * factor
        return total


class LayerSum(NamedTuple):
    """What a recipe adds to one layer: `scaling * sum(up @ delta_r)` over its products."""

    products: tuple[Product, ...]
    scaling: float


def layer_sum(
    recipe: MergeRecipe, name: str, *, initial_of: InitialOf | None = None, core_in_residual: bool = False
) -> LayerSum | None:
    """What a recipe adds to a layer, as references to the adapters' tensors and factors; None when it adds nothing.

    The scaling is that of the first term that changes the layer; the other terms' are in their factors.

    Args:
        initial_of: gives the initial Q and R of a layer of a full-QR adapter whose file lacks them.
        core_in_residual: leave `- Q R` out of those terms, because `W_res` will take the place of the weight.

    Raises:
        BasisMismatchError: a full-QR term has no initial Q and R, and neither argument says where they are.
        WeightError: a tensor holds NaN or Inf.
        SettingError: a strength changes in a sampling.
    """
    require_fixed(recipe)
    parts = [term for term in recipe.terms if term.changes(name)]
    return sum_of(parts, name, initial_of, core_in_residual) if parts else None


def term_products(term: Term, name: str, *, initial_of: InitialOf | None = None) -> tuple[Product, ...]:
    """What one term adds to a layer at strength 1, whatever its strength is; scaling and block factor are in it.

    One product: the two of a full-QR adapter cancel almost entirely and are written on their joint basis first, which
    leaves nothing large to cancel in the few bits of an activation.

    Raises:
        BasisMismatchError: a full-QR term has no initial Q and R, and `initial_of` does not say where they are.
        WeightError: a tensor holds NaN or Inf.
    """
    factor = term.block_factor(name) * term.adapter.layers[name].scaling
    products = _products(term, name, factor, initial_of, False)
    if len(products) == 1:
        return products
    layer = joined(products)
    return (Product(layer.up, ((layer.down, 1.0),)),)


def joined(products: tuple[Product, ...]) -> AdapterLayer:
    """One pair of factors for all products of a layer: Q (out, k) orthonormal, dR (k, in) float32.

    One product keeps its own columns. Of several, `base_r` of the first is carried over, so that the pair still
    restores the weight from the first basis' residual.
    """
    first = products[0]
    if len(products) == 1:
        initial = Basis(first.up, first.base_r) if first.base_r is not None else None
        return AdapterLayer(first.up, first.delta_r(), initial)
    joint = joint_basis([product.up for product in products])
    down = sum((part @ product.delta_r() for part, product in zip(joint.parts, products)), torch.zeros(()))
    if first.base_r is None:
        return AdapterLayer(joint.q, down)
    return AdapterLayer(joint.q, down, Basis(joint.q, joint.parts[0] @ first.base_r.float()))


def require_fixed(recipe: MergeRecipe) -> None:
    """Raise SettingError when a strength follows the sampling or the prompt: one pair of factors cannot hold that."""
    if recipe.needs_live:
        moving = next(term for term in recipe.terms if term.needs_live)
        raise SettingError(
            f"{moving.adapter.name} has a schedule, acts by the prompt, or has a pass of its own, which only Apply "
            "QR-LoRA in live mode can follow; take that away (act: always) to save, export, compare or hook it"
        )


def sum_of(parts: list[Term], name: str, initial_of: InitialOf | None, core_in_residual: bool) -> LayerSum:
    """The products of terms that all have the layer."""
    scaling = parts[0].adapter.layers[name].scaling
    products: list[Product] = []
    for term in parts:
        factor = term.factor(name) * (term.adapter.layers[name].scaling / scaling)
        for product in _products(term, name, factor, initial_of, core_in_residual):
            _add(products, product)
    return LayerSum(tuple(products), scaling)


def _products(
    term: Term, name: str, factor: float, initial_of: InitialOf | None, core_in_residual: bool
) -> tuple[Product, ...]:
    """What one term adds to a layer, as one or two products."""
    layer = term.adapter.layer(name)
    if term.adapter.method != "qr":
        own = own_layer(term.adapter, name)
        if term.onto is not None and name in term.onto.layers:
            target = own_layer(term.onto, name)
            if not shares_basis(term.adapter, term.onto, name):
                initial = target.initial
                moved = moved_update(term.adapter, term.onto, name)
                return (Product(target.up, ((moved, factor),), initial.r if initial else None),)
        return (Product(own.up, ((own.down, factor),), own.initial.r if own.initial else None),)
    trained = Product(layer.up, ((layer.down, factor),))
    initial = layer.initial
    if initial is None:
        if core_in_residual:
            return (trained,)
        if initial_of is None:
            raise BasisMismatchError(
                f"{term.adapter.name} holds only the trained Q' and R': what it adds to a weight is known together "
                "with the model or with its residual (Apply QR-LoRA), not before"
            )
        initial = initial_of(term.adapter, name)
    # W - QR + Q'R'. The initial pair comes first: it is the one that restores W from a residual.
    return (Product(initial.q, ((initial.r, -factor),), initial.r), trained)


def _add(products: list[Product], new: Product) -> None:
    """Put `new` to the product with its columns, or append it."""
    for index, product in enumerate(products):
        if same_columns(product.up, new.up):
            base_r = product.base_r if product.base_r is not None else new.base_r
            products[index] = Product(product.up, product.summands + new.summands, base_r)
            return
    products.append(new)
