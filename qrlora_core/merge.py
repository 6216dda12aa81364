"""Merging as data: a recipe of adapters and strengths, turned into tensors one layer at a time.

On one basis a merge is the sum of dR's and keeps its rank. On different bases the sum of dR's would mean nothing, so
both updates are written on a joint basis (exact, rank at most r1 + r2), or the second is re-expressed on the first.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, NamedTuple

from .adapter import Adapter, AdapterLayer, LayerInfo, Progress
from .basis import same_basis
from .errors import BasisMismatchError, TargetError
from .formats import first_few
from .pairs import alignment, column_counts, shares_basis
from .products import InitialOf, joined, require_fixed, sum_of
from .recipe import MergeRecipe, Term

OnMismatch = Literal["stack", "align", "raise"]


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
    both = MergeRecipe(first.terms + second.terms)
    _require_one_model(both)
    if on_basis_mismatch == "stack" or not first.terms:
        return both
    anchor = first.terms[0].adapter
    foreign = [term for term in second.terms if _differing_layers(anchor, term)]
    if foreign and on_basis_mismatch == "raise":
        names = _differing_layers(anchor, foreign[0])
        raise BasisMismatchError(
            f"{anchor.name} and {foreign[0].adapter.name} have different bases in {len(names)} layers: "
            f"{first_few(names)}. They were trained on different base models, ranks or machines; set on_basis_mismatch "
            "to 'stack' (exact) or 'align'"
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
    require_fixed(recipe)
    active = recipe.require_terms().active
    terms = active or recipe.terms  # of nothing but zeros, the zeros: an adapter has layers
    lacking_initial = [term.adapter for term in terms if term.adapter.method == "qr" and not term.adapter.has_initial]
    core_known = initial_of is not None or core_in_residual
    only = terms[0] if len(terms) == 1 else None
    as_it_is = only and only.onto is None and all(only.factor(name) == 1 for name in only.adapter.layers)
    if as_it_is and not (lacking_initial and core_known):
        return terms[0].adapter
    layers: dict[str, AdapterLayer] = {}
    infos: dict[str, LayerInfo] = {}
    for name in _through(recipe.layer_names, progress):
        parts = [term for term in terms if (term.changes(name) if active else name in term.adapter.layers)]
        if not parts:
            continue
        total = sum_of(parts, name, initial_of, core_in_residual)
        layers[name] = joined(total.products)
        up, down, _ = layers[name]
        infos[name] = LayerInfo((up.shape[0], down.shape[1]), up.shape[1], total.scaling, down.dtype)
    complete = all(layer.initial is not None for layer in layers.values())
    return Adapter(
        " + ".join(map(str, terms)),
        "delta_r",
        infos,
        layers.__getitem__,
        has_initial=complete,
        metadata=_shared_metadata(terms),
    )


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
                moved = alignment(term.adapter, term.onto, name)
                if moved is not None:
                    energy, lost[name] = moved
                    whole_energy += energy
                    lost_energy += energy * lost[name]
                owner = term.onto
            if owner not in owners:
                owners.append(owner)
        off += not owners
        if owners:
            bases, columns, kept = column_counts(tuple(owners), name)
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
                same = shares_basis(first, owner, name)
            if not same:
                differing.append(name)
    return differing
