"""Merging as data: a recipe of adapters and strengths, turned into tensors one layer at a time.

On one basis a merge is the sum of dR's and keeps its rank. On different bases the sum of dR's would mean nothing, so
the factors are stacked (`[Q1 Q2]`, rank r1 + r2, exact) or the second update is re-expressed on the first basis.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter, AdapterLayer, LayerInfo
from .errors import BasisMismatchError, TargetError
from .formats import few
from .linalg import Basis, product_norm, reexpress
from .recipe import MergeRecipe, Term

OnMismatch = Literal["stack", "align", "raise"]

# Two float32 Q of one file differ by nothing; anything above rounding is another basis, and stacking is always exact.
_SAME_BASIS = 1e-6

InitialOf = Callable[[Adapter, str], Basis]


class MergeReport(NamedTuple):
    """What a merge did, counted in layers.

    Attributes:
        layers: all layers of the result.
        shared: layers in which every adapter has the same basis.
        stacked: layers whose rank grew because bases differ.
        aligned: layers re-expressed on another basis.
        lost: layer -> share of the re-expressed update's energy that was lost, for the aligned layers.
        lost_total: the same over all aligned layers together.
        rank: largest rank of the result.
        off: layers that block factors of 0 switch off in every adapter; they are in none of the counts above but
            `layers`.
    """

    layers: int
    shared: int
    stacked: int
    aligned: int
    lost: dict[str, float]
    lost_total: float
    rank: int
    off: int = 0


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
        on_basis_mismatch: "stack" is exact and adds the ranks; "align" keeps the rank of the first basis and loses
            what lies outside its span; "raise" refuses.

    Raises:
        BasisMismatchError: bases differ and `on_basis_mismatch` is "raise", or an adapter without a known basis (a
            full-QR file) was to be aligned.
        TargetError: two adapters give one layer different shapes.
    """
    if on_basis_mismatch not in ("stack", "align", "raise"):
        raise BasisMismatchError(f"on_basis_mismatch is {on_basis_mismatch!r}, expected 'stack', 'align' or 'raise'")
    first, second = style.scaled(alpha), content.scaled(beta)
    joined = MergeRecipe(first.terms + second.terms)
    for name in joined.layer_names:
        shapes = {term.adapter.layers[name].shape for term in joined.terms if name in term.adapter.layers}
        if len(shapes) > 1:
            raise TargetError(f"the adapters were made for different models: {name} has shapes {sorted(shapes)}")
    if on_basis_mismatch == "stack":
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


def merged_adapter(
    recipe: MergeRecipe, *, initial_of: InitialOf | None = None, core_in_residual: bool = False
) -> Adapter:
    """Compute a recipe: the one adapter that is applied live, saved and exported alike.

    A single term of strength 1 is that adapter itself, so saving it changes nothing. Otherwise the layers are
    float32 and have the scaling of their first term; terms whose factor in a layer is 0 take no part in it, and a
    layer in which none takes part is left out. A Q that all terms of a layer share stays the memory-mapped tensor of
    its file.

    Args:
        recipe: what to merge.
        initial_of: gives the initial Q and R of a layer of a full-QR adapter whose file lacks them.
        core_in_residual: leave `- Q R` out of those terms, because `W_res` will take the place of the weight.

    Raises:
        BasisMismatchError: a full-QR term has no initial Q and R, and neither argument says where they are.
        WeightError: a tensor holds NaN or Inf.
    """
    active = recipe.active
    terms = active or recipe.terms  # of nothing but zeros, the zeros: an adapter has layers
    open_core = [term.adapter for term in terms if term.adapter.method == "qr" and not term.adapter.has_initial]
    core_known = initial_of is not None or core_in_residual
    only = terms[0] if len(terms) == 1 else None
    as_it_is = only and only.onto is None and all(only.factor(name) == 1 for name in only.adapter.layers)
    if as_it_is and not (open_core and core_known):
        return terms[0].adapter
    if open_core and not core_known:
        raise BasisMismatchError(
            f"{open_core[0].name} holds only the trained Q' and R': what it adds to a weight is known together with "
            "the model or with its residual (Apply QR-LoRA), not before"
        )
    layers: dict[str, AdapterLayer] = {}
    infos: dict[str, LayerInfo] = {}
    for name in recipe.layer_names:
        parts = [term for term in terms if (term.changes(name) if active else name in term.adapter.layers)]
        if not parts:
            continue
        scaling = parts[0].adapter.layers[name].scaling
        groups: list[_Group] = []
        for term in parts:
            factor = term.factor(name) * (term.adapter.layers[name].scaling / scaling)
            for group in _contributions(term, name, initial_of, core_in_residual):
                _add(groups, group, factor)
        layers[name] = _joined(groups)
        up, down, _ = layers[name]
        infos[name] = LayerInfo((up.shape[0], down.shape[1]), up.shape[1], scaling, down.dtype)
    title = " + ".join(map(str, terms))
    complete = all(layer.initial is not None for layer in layers.values())
    return Adapter(title, "delta_r", infos, layers.__getitem__, has_initial=complete)


def merge_report(recipe: MergeRecipe) -> MergeReport:
    """Say what happens to the bases, layer by layer. Reads every Q; strengths do not matter, block factors of 0 do."""
    shared, stacked, rank, off = 0, 0, 0, 0
    lost: dict[str, float] = {}
    kept_energy = whole_energy = 0.0
    for name in recipe.layer_names:
        bases: list[Tensor] = []
        for term in recipe.terms:
            if name not in term.adapter.layers or term.block_factor(name) == 0:
                continue
            layer = term.adapter.layer(name)
            up = layer.up
            if term.onto is not None and name in term.onto.layers:
                target = term.onto.layer(name).up
                if not same_basis(target, up):
                    energy = product_norm(up, layer.down) ** 2
                    lost[name] = reexpress(target, up, layer.down)[1]
                    whole_energy += energy
                    kept_energy += energy * (1 - lost[name])
                    up = target
            if term.adapter.method == "qr":  # Q'R' and QR: two products
                bases.append(layer.initial.q if layer.initial else up)
            if term.adapter.method == "qr" or not any(same_basis(known, up) for known in bases):
                bases.append(up)
        off += not bases
        shared += len(bases) == 1 and name not in lost
        stacked += len(bases) > 1
        rank = max(rank, sum(q.shape[1] for q in bases))
    total = 1 - kept_energy / whole_energy if whole_energy > 0 else 0.0
    return MergeReport(len(recipe.layer_names), shared, stacked, len(lost), lost, total, rank, off)


def same_basis(first: Tensor, second: Tensor) -> bool:
    """Whether two Q agree to float32 rounding, column by column. Flipped signs are another basis."""
    if first is second or first.data_ptr() == second.data_ptr():
        return first.shape == second.shape
    return first.shape == second.shape and torch.allclose(first.float(), second.float(), rtol=0, atol=_SAME_BASIS)


class _Group(NamedTuple):
    """Updates of one layer that share an `up`."""

    up: Tensor
    down: Tensor
    base_r: Tensor | None


def _contributions(term: Term, name: str, initial_of: InitialOf | None, core_in_residual: bool) -> tuple[_Group, ...]:
    """What one term adds to a layer at strength 1, as one or two products `up @ down`."""
    layer = term.adapter.layer(name)
    if term.adapter.method != "qr":
        if term.onto is not None and name in term.onto.layers:
            target = term.onto.layer(name)
            if not same_basis(target.up, layer.up):
                moved, _ = reexpress(target.up, layer.up, layer.down)
                return (_Group(target.up, moved, target.initial.r if target.initial else None),)
        return (_Group(layer.up, layer.down, layer.initial.r if layer.initial else None),)
    trained = _Group(layer.up, layer.down, None)
    initial = layer.initial
    if initial is None:
        if core_in_residual or initial_of is None:
            return (trained,)
        initial = initial_of(term.adapter, name)
    # W - QR + Q'R'. The initial pair comes first: it is the one that restores W from a residual.
    return (_Group(initial.q, -initial.r.float(), initial.r), trained)


def _add(groups: list[_Group], new: _Group, factor: float) -> None:
    """Sum `new` into the group with its `up`, or append it. Sums are float32: see fact 7 of the design."""
    down = new.down.float() * factor
    for index, group in enumerate(groups):
        if same_basis(group.up, new.up):
            base_r = group.base_r if group.base_r is not None else new.base_r
            groups[index] = _Group(group.up, group.down + down, base_r)
            return
    groups.append(_Group(new.up, down, new.base_r))


def _joined(groups: list[_Group]) -> AdapterLayer:
    """One pair of factors for all groups of a layer."""
    if len(groups) == 1:
        up, down, base_r = groups[0]
        return AdapterLayer(up, down, Basis(up, base_r) if base_r is not None else None)
    up = torch.cat([group.up.float() for group in groups], dim=1)
    down = torch.cat([group.down for group in groups])
    if groups[0].base_r is None:
        return AdapterLayer(up, down)
    # [Q1 Q2] with [R1; 0] restores the weight from the first basis' residual, so the pair stays usable
    base_r = torch.zeros_like(down)
    base_r[: groups[0].base_r.shape[0]] = groups[0].base_r
    return AdapterLayer(up, down, Basis(up, base_r))


def _differing_layers(first: Adapter, term: Term) -> list[str]:
    """Layers that an adapter and a term have on different bases; an aligned term counts with the basis it is on."""
    second, onto = term.adapter, term.onto
    if first is second and onto is None:
        return []
    if onto is None and first.basis_fingerprint and first.basis_fingerprint == second.basis_fingerprint:
        return []
    differing = []
    for name in first.layers:
        if name in second.layers:
            owner = onto if onto is not None and name in onto.layers else second
            if not same_basis(first.layer(name).up, owner.layer(name).up):
                differing.append(name)
    return differing
