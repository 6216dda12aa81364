"""The few lines that a node shows about what it did."""

from ..qrlora_core import Adapter, MergeRecipe, MergeReport, Residual


def adapter_text(adapter: Adapter) -> str:
    """Method, rank, layers, trigger and basis of an adapter."""
    trigger = adapter.metadata.get("qrlora.trigger") or adapter.metadata.get("modelspec.trigger_phrase")
    lines = [
        f"method {adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g}",
        f"{len(adapter.layers)} layers",
        f"basis {adapter.basis_fingerprint or 'not in the file (full QR)'}",
    ]
    return "\n".join(lines + ([f"trigger {trigger}"] if trigger else []))


def residual_text(residual: Residual) -> str:
    """Layers, size and precision of a residual."""
    size = sum(spec.nbytes for spec in residual.layers.values())
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in residual.layers.values()})
    return f"{len(residual.layers)} layers, {size / 1e9:.2f} GB, {', '.join(dtypes)}"


def merge_text(recipe: MergeRecipe, done: MergeReport) -> str:
    """The terms, and what happened where bases differ."""
    lines = [" + ".join(f"{term.strength:g} x {term.adapter.name}" for term in recipe.terms)]
    lines.append(f"{done.layers} layers, rank {done.rank}")
    if done.stacked:
        lines.append(f"{done.stacked} layers on different bases: stacked, exact")
    if done.aligned:
        worst = max(done.lost, key=lambda name: done.lost[name])
        lines.append(
            f"{done.aligned} layers aligned: {100 * done.lost_total:.2g} % of the energy lost "
            f"(most at {worst}: {100 * done.lost[worst]:.2g} %)"
        )
    if not done.stacked and not done.aligned:
        lines.append("one basis: \u0394R added")
    return "\n".join(lines)
