"""Merging as data: a recipe of adapters and strengths, turned into tensors one layer at a time.

On one basis a merge is the sum of dR's and keeps its rank. On different bases the sum of dR's would mean nothing, so
both updates are written on a joint basis (exact, rank at most r1 + r2), or the second is re-expressed on the first.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from .adapter import Adapter, AdapterLayer, LayerInfo, Progress
from .basis import joint_basis, orthonormal, same_basis
from .errors import BasisMismatchError, SettingError, TargetError
from .formats import few
from .linalg import Basis, product_norm, reexpress
from .recipe import MergeRecipe, Term

OnMismatch = Literal["stack", "align", "raise"]

InitialOf = Callable[[Adapter, str], Basis]


class MergeReport(NamedTuple):
    """What a merge did, counted in layers.

    Attributes:
        layers: all layers of the result.
        shared: layers in which every adapter has the same basis.
        joint: layers whose adapters have different bases, written on a joint one.
        aligned: layers re-expressed on another basis.
        lost: layer -> share of the re-expressed update's energy that was lost, for the aligned layers.
        lost_total: the same over all aligned layers together.
        rank: largest rank of the result.
        dropped: columns, over all joint layers, that add nothing to those before them and were left out.
        off: layers that block factors of 0 switch off in every adapter; they are in none of the counts above but
            `layers`.
    """

    layers: int
    shared: int
    joint: int
    aligned: int
    lost: dict[str, float]
    lost_total: float
    rank: int
    dropped: int = 0
    off: int = 0


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
        """The sum, (rank, in), in float32: see fact 7 of the design."""
        (down, factor), *others = self.summands
        total = down.float() * factor
        for down, factor in others:
            total = total + down.float() * factor
        return total


class LayerSum(NamedTuple):
    """What a recipe adds to one layer: `scaling * sum(up @ delta_r)` over its products."""

    products: tuple[Product, ...]
    scaling: float


def merge(
    style: MergeRecipe,
    alpha: float,
    content: MergeRecipe,
    beta: float,
    on_basis_mismatch: OnMismatch = "stack",
) -> MergeRecipe:
    """`alpha * style + beta * content` as a recipe; recipes merge again, so any number of adapters can take part.

    Args:
        style, content: what to add.
        alpha, beta: their factors.
        on_basis_mismatch: "stack" writes both on a joint basis, which is exact and adds the ranks; "align" keeps the
            rank of the first basis and loses what lies outside its span; "raise" refuses.

    Raises:
        BasisMismatchError: bases differ and `on_basis_mismatch` is "raise", or an adapter without a known basis (a
            full-QR file) was to be aligned.
        TargetError: two adapters give one layer different shapes.
        SettingError: a factor is not a finite number.
    """
    if on_basis_mismatch not in ("stack", "align", "raise"):
        raise BasisMismatchError(f"on_basis_mismatch is {on_basis_mismatch!r}, expected 'stack', 'align' or 'raise'")
    first, second = style.scaled(alpha), content.scaled(beta)
    joined = MergeRecipe(first.terms + second.terms)
    _require_one_model(joined)
    if on_basis_mismatch == "stack" or not first.terms:
        return joined
    anchor = first.terms[0].adapter
    foreign = [term for term in second.terms if _differing_layers(anchor, term)]
    if foreign and on_basis_mismatch == "raise":
        names = _differing_layers(anchor, foreign[0])
        raise BasisMismatchError(
            f"{anchor.name} and {foreign[0].adapter.name} have different bases in {len(names)} layers: {few(names)}. "
            "They were trained on different base models, ranks or machines; set on_basis_mismatch to 'stack' (exact) "
            "or 'align'"
        )
    unknown = [adapter.name for adapter in (anchor, *(t.adapter for t in foreign)) if adapter.method == "qr"]
    if foreign and unknown:
        raise BasisMismatchError(
            f"{unknown[0]} is a full-QR adapter, which changes its own basis: only 'stack' is exact"
        )
    return MergeRecipe(
        first.terms + tuple(replace(term, onto=anchor) if term in foreign else term for term in second.terms)
    )


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
    _require_fixed(recipe)
    parts = [term for term in recipe.terms if term.changes(name)]
    return _sum(parts, name, initial_of, core_in_residual) if parts else None


def merged_adapter(
    recipe: MergeRecipe,
    *,
    initial_of: InitialOf | None = None,
    core_in_residual: bool = False,
    progress: Progress | None = None,
) -> Adapter:
    """Compute a recipe: the one adapter that is saved, exported and compared; it adds what is applied live.

    A single term of strength 1 is that adapter itself, so saving it changes nothing. Otherwise the layers are
    float32 and have the scaling of their first term; terms whose factor in a layer is 0 take no part in it, and a
    layer in which none takes part is left out. Layers whose terms have different bases get a joint one.

    Args:
        recipe: what to merge.
        initial_of, core_in_residual: see `layer_sum`.
        progress: wraps the names of the layers that are gone through; it may stop the work by raising.

    Raises:
        BasisMismatchError: a full-QR term has no initial Q and R, and neither argument says where they are.
        WeightError: a tensor holds NaN or Inf.
        SettingError: the recipe is empty, or its strengths change in a sampling.
    """
    _require_fixed(recipe)
    active = recipe.require_terms().active
    terms = active or recipe.terms  # of nothing but zeros, the zeros: an adapter has layers
    open_core = [term.adapter for term in terms if term.adapter.method == "qr" and not term.adapter.has_initial]
    core_known = initial_of is not None or core_in_residual
    only = terms[0] if len(terms) == 1 else None
    as_it_is = only and only.onto is None and all(only.factor(name) == 1 for name in only.adapter.layers)
    if as_it_is and not (open_core and core_known):
        return terms[0].adapter
    layers: dict[str, AdapterLayer] = {}
    infos: dict[str, LayerInfo] = {}
    for name in _through(recipe.layer_names, progress):
        parts = [term for term in terms if (term.changes(name) if active else name in term.adapter.layers)]
        if not parts:
            continue
        found = _sum(parts, name, initial_of, core_in_residual)
        layers[name] = joined(found.products)
        up, down, _ = layers[name]
        infos[name] = LayerInfo((up.shape[0], down.shape[1]), up.shape[1], found.scaling, down.dtype)
    complete = all(layer.initial is not None for layer in layers.values())
    return Adapter(
        " + ".join(map(str, terms)),
        "delta_r",
        infos,
        layers.__getitem__,
        has_initial=complete,
        metadata=_shared_metadata(terms),
    )


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


def merge_report(recipe: MergeRecipe, progress: Progress | None = None) -> MergeReport:
    """Say what happens to the bases, layer by layer; strengths do not matter, block factors of 0 do.

    Reads every Q once for a set of adapters: turning alpha computes nothing again.

    Args:
        recipe: what is merged.
        progress: wraps the names of the layers that are gone through; it may stop the work by raising.
    """
    shared, joint, rank, dropped, off = 0, 0, 0, 0, 0
    lost: dict[str, float] = {}
    lost_energy = whole_energy = 0.0
    for name in _through(recipe.layer_names, progress):
        owners: list[Adapter] = []
        for term in recipe.terms:
            if name not in term.adapter.layers or term.block_factor(name) == 0:
                continue
            owner = term.adapter
            if term.onto is not None and name in term.onto.layers:
                moved = _alignment(term.adapter, term.onto, name)
                if moved is not None:
                    energy, lost[name] = moved
                    whole_energy += energy
                    lost_energy += energy * lost[name]
                owner = term.onto
            if owner not in owners:
                owners.append(owner)
        off += not owners
        if owners:
            bases, columns, kept = _columns(tuple(owners), name)
            shared += bases == 1 and name not in lost
            joint += bases > 1
            dropped += columns - kept
            rank = max(rank, kept)
    total = lost_energy / whole_energy if whole_energy > 0 else 0.0
    return MergeReport(len(recipe.layer_names), shared, joint, len(lost), lost, total, rank, dropped, off)


def _through(names: tuple[str, ...], progress: Progress | None) -> Iterable[str]:
    return names if progress is None else progress(names)


def _require_one_model(recipe: MergeRecipe) -> None:
    """Raise TargetError when two adapters give one layer different shapes."""
    shapes: dict[str, tuple[tuple[int, int], Adapter]] = {}
    for adapter in recipe.adapters:
        for name, info in adapter.layers.items():
            shape, other = shapes.setdefault(name, (info.shape, adapter))
            if shape != info.shape:
                raise TargetError(
                    f"the adapters were made for different models: {name} has shape {shape} in {other.name} and "
                    f"{info.shape} in {adapter.name}"
                )


def _require_fixed(recipe: MergeRecipe) -> None:
    """Raise SettingError when a strength follows the sampling or the prompt: one pair of factors cannot hold that."""
    if recipe.needs_live:
        moving = next(term for term in recipe.terms if term.needs_live)
        raise SettingError(
            f"{moving.adapter.name} has a schedule or acts by the prompt, which only Apply QR-LoRA in live mode can "
            "follow; take the schedule or the prompt away to save, export, compare or hook it"
        )


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


def _sum(parts: list[Term], name: str, initial_of: InitialOf | None, core_in_residual: bool) -> LayerSum:
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
        own = _own(term.adapter, name)
        if term.onto is not None and name in term.onto.layers:
            target = _own(term.onto, name)
            if not _shared(term.adapter, term.onto, name):
                initial = target.initial
                moved = _moved(term.adapter, term.onto, name)
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
        if same_basis(product.up, new.up):
            base_r = product.base_r if product.base_r is not None else new.base_r
            products[index] = Product(product.up, product.summands + new.summands, base_r)
            return
    products.append(new)


def _shared_metadata(terms: tuple[Term, ...]) -> dict[str, str]:
    """What a merge keeps of its adapters' metadata: every trigger and prompt once, and the model if it is one."""
    kept: dict[str, str] = {}
    for key in ("qrlora.trigger", "qrlora.prompt", "modelspec.trigger_phrase"):
        values = dict.fromkeys(value for term in terms if (value := term.adapter.metadata.get(key)))
        if values:
            kept[key] = ", ".join(values)
    for key in ("qrlora.base_fingerprint", "modelspec.architecture"):
        models = {value for term in terms if (value := term.adapter.metadata.get(key))}
        if len(models) == 1:
            kept[key] = models.pop()
    return kept


Value = TypeVar("Value")


class _Memory(Generic[Value]):
    """What was computed for a layer of some adapters; it goes when one of the adapters goes."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Adapter, dict[tuple[object, ...], Value]] = weakref.WeakKeyDictionary()

    def get(self, adapters: tuple[Adapter, ...], name: str, compute: Callable[[], Value]) -> Value:
        first, *others = adapters
        known = self._known.setdefault(first, {})
        key = (name, *map(weakref.ref, others))
        if key not in known:
            known[key] = compute()
        return known[key]


_own_layers: _Memory[AdapterLayer] = _Memory()
_same_bases: _Memory[bool] = _Memory()
_moved_updates: _Memory[Tensor] = _Memory()
_alignments: _Memory[tuple[float, float]] = _Memory()
_column_counts: _Memory[tuple[int, int, int]] = _Memory()


def _own(adapter: Adapter, name: str) -> AdapterLayer:
    """A layer of a dR adapter on orthonormal columns, whatever its file holds."""

    def compute() -> AdapterLayer:
        layer = adapter.layer(name)
        up, down = orthonormal(layer.up, layer.down)
        return layer if up is layer.up else AdapterLayer(up, down)

    return _own_layers.get((adapter,), name, compute)


def _shared(first: Adapter, second: Adapter, name: str) -> bool:
    """Whether two dR adapters have one basis in a layer that both have."""
    if first is second or (first.basis_fingerprint and first.basis_fingerprint == second.basis_fingerprint):
        return True
    return _same_bases.get((first, second), name, lambda: same_basis(_own(first, name).up, _own(second, name).up))


def _moved(adapter: Adapter, onto: Adapter, name: str) -> Tensor:
    """dR of a layer on the basis of another adapter."""

    def compute() -> Tensor:
        own = _own(adapter, name)
        return reexpress(_own(onto, name).up, own.up, own.down)[0]

    return _moved_updates.get((adapter, onto), name, compute)


def _alignment(adapter: Adapter, onto: Adapter, name: str) -> tuple[float, float] | None:
    """Energy of a layer's update and the share that moving it loses; None where both have one basis."""
    if _shared(adapter, onto, name):
        return None

    def compute() -> tuple[float, float]:
        own = _own(adapter, name)
        return product_norm(own.up, own.down) ** 2, reexpress(_own(onto, name).up, own.up, own.down)[1]

    return _alignments.get((adapter, onto), name, compute)


def _columns(owners: tuple[Adapter, ...], name: str) -> tuple[int, int, int]:
    """Of the bases of a layer of some adapters: how many differ, their columns, and the columns of the joint basis."""

    def compute() -> tuple[int, int, int]:
        ups: list[Tensor] = []
        for owner in owners:
            layer = owner.layer(name)
            found = [_own(owner, name).up] if owner.method != "qr" else [layer.up]
            if owner.method == "qr" and layer.initial:  # Q'R' and QR: two products
                found.insert(0, layer.initial.q)
            ups += [up for up in found if not any(same_basis(known, up) for known in ups)]
        columns = sum(up.shape[1] for up in ups)
        return len(ups), columns, joint_basis(ups).q.shape[1] if len(ups) > 1 else columns

    if (
        all(owner.method != "qr" and _shared(owners[0], owner, name) for owner in owners[1:])
        and owners[0].method != "qr"
    ):
        owners = owners[:1]
    return _column_counts.get(owners, name, compute)


def _differing_layers(first: Adapter, term: Term) -> list[str]:
    """Layers that an adapter and a term have on different bases; an aligned term counts with the basis it is on."""
    second, onto = term.adapter, term.onto
    differing = []
    for name in first.layers:
        if name in second.layers:
            owner = onto if onto is not None and name in onto.layers else second
            if "qr" in (first.method, owner.method):
                same = same_basis(first.layer(name).up, owner.layer(name).up)
            else:
                same = _shared(first, owner, name)
            if not same:
                differing.append(name)
    return differing
