"""The few lines that a node shows about what it did."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..qrlora_core import (
    ACTS,
    CHOICES,
    Adapter,
    BlockScale,
    MergeRecipe,
    MergeReport,
    Residual,
    Saved,
    Schedule,
    SimilarityReport,
    SweepCell,
)
from ..qrlora_plots import ContactSheet, head_lines

_MANY_FILES = 4


def adapter_text(adapter: Adapter, with_basis: bool = True) -> str:
    """Method, rank, layers, trigger and basis of an adapter. Its basis is known when every Q was read, or made."""
    trigger = adapter.metadata.get("qrlora.trigger") or adapter.metadata.get("modelspec.trigger_phrase")
    lines = [
        f"method {adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g}",
        f"{len(adapter.layers)} layers",
    ]
    if with_basis:
        lines.append(f"basis {adapter.basis_fingerprint or 'not in the file (full QR)'}")
    return "\n".join(lines + ([f"trigger {trigger}"] if trigger else []))


def residual_text(residual: Residual) -> str:
    """Layers, size and precision of a residual."""
    size = sum(spec.nbytes for spec in residual.layers.values())
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in residual.layers.values()})
    return f"{len(residual.layers)} layers, {size / 1e9:.2f} GB, {', '.join(dtypes)}"


def saved_text(saved: Saved, name: str, folder: str) -> str:
    """Which file in which folder, and whether it was written now."""
    lines = [f"{folder}/{name} holds this already: nothing is written"]
    if saved.is_new:
        size = f"{saved.path.stat().st_size / 1e6:.1f} MB"
        lines = [f"saved {folder}/{name} ({size}); the lists of files have it"]
    if saved.files >= _MANY_FILES:
        lines.append(f"{saved.files} files have this name by now; bypass this node while you turn strengths")
    return "\n".join(lines)


def merge_text(recipe: MergeRecipe, done: MergeReport, missing: Sequence[str] = ()) -> str:
    """The terms, what happened where bases differ, and which inputs count as nothing."""
    absent = [f"{name}: nothing connected, or bypassed" for name in missing]
    if not recipe.terms:
        return "\n".join([*absent, "nothing to merge: the model will stay as it is"])
    lines = [*absent, " + ".join(map(str, recipe.terms))]
    if any(term.gate for term in recipe.terms):
        free = [term.adapter.name for term in recipe.terms if not term.gate]
        lines += [f"{name} has no trigger: it acts on every prompt" for name in dict.fromkeys(free)]
    lines.append(f"{done.layers} layers, rank {done.rank}")
    if done.joint:
        dropped = f"; {done.dropped} columns that add nothing left out" if done.dropped else ""
        lines.append(f"{done.joint} layers on different bases: written on a joint basis, exact{dropped}")
    if done.aligned:
        worst = max(done.lost, key=lambda name: done.lost[name])
        lines.append(
            f"{done.aligned} layers aligned: {100 * done.lost_total:.2g} % of the energy lost "
            f"(most at {worst}: {100 * done.lost[worst]:.2g} %)"
        )
    if done.off:
        lines.append(f"{done.off} layers switched off by block factors of 0")
    if not done.joint and not done.aligned and len(recipe.terms) > 1:
        lines.append("one basis: \u0394R added")
    return "\n".join(lines)


def balance_text(result: Mapping[str, Any], missing: Sequence[str], evaluations: int, seconds: float) -> str:
    """What is chosen, what it does, what else could be chosen, and what measuring took."""
    chosen = result["chosen"]
    lines = [f"{name}: nothing connected, or bypassed" for name in missing]
    lines.append(f"{result['choice']}: {_setting(chosen)}")
    for name in ("style", "content"):
        if chosen[name] is not None:
            lines.append(f"{name}: {chosen[name]:.2f} of its effect, purity {chosen[f'{name}_purity']:.2f}")
        elif name not in missing:
            lines.append(f"{name}: it changes nothing on this prompt")
    if ACTS[chosen["act"]].by_prompt:
        lines.append("drift 0: by the prompt. Encode prompts with QR-LoRA Prompt")
    else:
        lines.append(f"drift {chosen['drift']:.2f} ({100 * chosen['moved']:.1f} % of the model's own prediction)")
    pulls = [(key, value) for key, value in result["pull_without_a_gate"].items() if value is not None]
    if len(pulls) == 2:
        lines.append(
            "without a gate, at 1: " + ", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in pulls)
        )
    lines += [f"{name} would be {_setting(result['proposals'][name])}" for name in CHOICES if name != result["choice"]]
    measured = f"{evaluations} predictions in {seconds:.0f} s" if evaluations else "known from the last time"
    return "\n".join([*lines, measured])


def nothing_to_balance() -> str:
    """Where no adapter is there."""
    return "no adapter is connected, or all are bypassed: nothing to measure"


def _setting(cell: Mapping[str, Any]) -> str:
    switch = "" if cell["switch"] is None else f", switch {cell['switch']:g}"
    return f"{cell['act']}, alpha {cell['alpha']:g}, beta {cell['beta']:g}{switch}"


def block_text(scale: BlockScale, recipe: MergeRecipe) -> str:
    """What differs from 1, and how many layers have which factor, by this node alone."""
    counts = Counter(round(scale.factor(name), 6) for name in recipe.layer_names)
    if not recipe.terms:
        return "no adapter is connected, or it is bypassed"
    lines = [str(scale), *scale.beyond(recipe.layer_names)]
    for factor, count in sorted(counts.items(), reverse=True):
        lines.append(f"{count} layers " + ("off" if factor == 0 else f"x {factor:g}"))
    return "\n".join(lines)


def schedule_text(schedule: Schedule, recipe: MergeRecipe) -> str:
    """The points, and what they act on."""
    if not recipe.terms:
        return "no adapter is connected, or it is bypassed"
    place = "sigma" if schedule.over == "sigma" else "part of the steps"
    points = ", ".join(f"{position:g}: {value:g}" for position, value in schedule.points)
    return f"{place} {points}\n" + " + ".join(term.adapter.name for term in recipe.terms)


def hook_text(recipe: MergeRecipe, strength: float, hooks: int) -> str:
    """What the hook holds, and how many hooks are on the wire."""
    if not recipe.scaled(strength).active:
        return f"nothing added (no adapter, or strength 0), {hooks} hooks"
    lines = [" + ".join(map(str, recipe.terms)), f"{len(recipe.layer_names)} layers at strength {strength:g}"]
    return "\n".join(
        [*lines, f"{hooks} hook{'s' if hooks != 1 else ''}; checked against the model when sampling starts"]
    )


def sweep_text(cells: Sequence[SweepCell], act: str = "always") -> str:
    """How many pictures, and of what; how both act, where it is not a plain sum."""
    alphas, betas, schedules = (
        dict.fromkeys(values) for values in zip(*((cell.alpha, cell.beta, cell.schedule) for cell in cells))
    )
    lists = [alphas, betas, *([schedules] if any(schedules) else [])]
    return "\n".join(
        [
            f"{' x '.join(str(len(values)) for values in lists)} = {len(cells)} pictures",
            "alpha " + ", ".join(f"{value:.10g}" for value in alphas),
            "beta " + ", ".join(f"{value:.10g}" for value in betas),
            *(["schedules " + " / ".join(schedules)] if any(schedules) else []),
            *([act] if act != "always" else []),
        ]
    )


def sheet_text(sheet: ContactSheet, filename: str) -> str:
    """Grid, size and file of a contact sheet."""
    rows, columns = (1 + max(place) for place in zip(*((cell.row, cell.column) for cell in sheet.cells)))
    axes = f"\nrows {_axis(sheet.row_labels)}\ncolumns {_axis(sheet.column_labels)}" if sheet.row_labels else ""
    return f"{rows} x {columns} pictures, {sheet.image.width} x {sheet.image.height} px\nsaved {filename}{axes}"


def similarity_text(report: SimilarityReport) -> str:
    """The comparison in a few lines, the most telling first."""
    summary, layers = report["summary"], report["layers"]
    lines = head_lines(report)
    beyond = summary["update"] and summary["update"]["outside_null_band"]
    if beyond is not None:
        lines.append(f"{100 * beyond:.0f} % of the layers beyond chance")
    for key, title in (("delta_r", "\u0394R"), ("q", "Q"), ("r", "R")):
        numbers = summary[key]
        span = "not defined"
        if numbers is not None:
            span = f"{numbers['mean']:+.4f} ({numbers['min']:+.4f} to {numbers['max']:+.4f})"
        lines.append(f"cosine of {title}: {span}")
    signs = summary["sign_conflict"]
    if signs is not None:
        lines.append(f"opposite signs in \u0394R: {100 * signs['mean']:.1f} % (chance: 50 %)")
    angle = max(entry["angles"]["max"] for entry in layers)
    lines.append(f"largest angle between spans of Q: {angle if angle > 1e-3 else 0:.3g}\u00b0")
    for side, missing in (("A", report["only_in_a"]), ("B", report["only_in_b"])):
        if missing:
            lines.append(f"{len(missing)} layers only in {side}: {', '.join(missing[:2])}")
    return "\n".join(lines)


def _axis(labels: Sequence[str]) -> str:
    """ "alpha = 0.6", "alpha = 1" as alpha 0.6, 1."""
    name = labels[0].split("=")[0].strip()
    return f"{name} " + ", ".join(label.split("=")[-1].strip() for label in labels)
