"""Asked before anything is unloaded or started: can the trainer's interpreter do this at all?"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...qrlora_core import ModelInputs, QRLoRAError
from . import owner
from .process import Child, ChildError

SECONDS = 180.0  # the first import of torch from a slow disk; a warm one takes a few
_GB = 1e9
_KEPT_REPORTS = 32
# What can change between two runs without another answer; the data are encoded after the check.
_NOT_DECISIVE = {
    "steps",
    "seed",
    "learning_rate",
    "prompt",
    "trigger",
    "name",
    "output",
    "run_dir",
    "data",
    "basis_cache",
}
_PACKAGES = ("lib/python*/site-packages", "lib64/python*/site-packages", "Lib/site-packages")

_reports: dict[str, dict[str, Any]] = {}  # question -> report without problems, of this process


class PreflightError(QRLoRAError):
    """Training cannot work as things are; the message lists what to do."""


class Cancelled(Exception):
    """Cancel was pressed meanwhile."""


def preflight(who: owner.Owner, settings: Path, log_file: Path, cancelled: Callable[[], bool]) -> dict[str, Any]:
    """What `train check` reports, once it reports no problem.

    Starting a Python with torch and diffusers takes 12 to 20 seconds on a slow disk, so a report without problems is
    remembered, while the interpreter, its packages, the model and the settings that the report depends on are the same.

    Args:
        who: whose interpreter.
        settings: the run's settings.
        log_file: its output is kept there.
        cancelled: whether Cancel was pressed since the last call.

    Raises:
        PreflightError: the interpreter cannot start, or it reports problems.
        Cancelled: Cancel was pressed.
    """
    question = _question(who, settings)
    if question in _reports:
        _require_disk(_reports[question], settings.parent)
        return _reports[question]
    # memory is compared later: ComfyUI's own models still lie on the card
    arguments = ["check", "--settings", str(settings), "--json", "--no-data", "--no-memory-check"]
    command = who.command(arguments)
    try:
        child = Child(command, settings.parent, log_file, owner.environment())
    except ChildError as error:
        raise PreflightError(f"The trainer's Python cannot be started: {error}. {_where(who)}") from error
    try:
        until = time.monotonic() + SECONDS
        while child.poll() is None and time.monotonic() < until:
            if cancelled():
                raise Cancelled
            time.sleep(0.1)
        code = child.poll()
    finally:
        child.end()
    if code is None:
        raise PreflightError(
            f"The trainer's Python did not answer within {SECONDS:.0f} s. {_where(who)}\n{child.tail()}"
        )
    report = _report(child.tail(200))
    if report is None:
        raise PreflightError(
            f"The trainer's Python ended with code {code} before it could check anything. {_where(who)}\n"
            f"{child.tail(15) or '(nothing was printed)'}"
        )
    problems = report.get("problems") or []
    if problems or code:
        lines = [
            f"- {problem.get('what', problem)}\n  {problem.get('fix', '')}".rstrip()
            for problem in problems
            if isinstance(problem, dict)
        ]
        raise PreflightError("\n".join(["Training cannot start:", *(lines or [child.tail(15)]), _where(who)]))
    while len(_reports) >= _KEPT_REPORTS:
        del _reports[next(iter(_reports))]
    _reports[question] = report
    return report


def _question(who: owner.Owner, settings: Path) -> str:
    """Everything that a report depends on, as text: another one has to be asked anew."""
    values = json.loads(settings.read_text(encoding="utf-8"))
    decisive = {key: value for key, value in values.items() if key not in _NOT_DECISIVE}
    python = Path(who.python)
    roots = (python.parent, python.parent.parent)  # an embedded Python for Windows lies beside its Lib
    packages = [folder for root in roots for name in _PACKAGES for folder in sorted(root.glob(name))]
    places = [python, python.resolve(), *packages, Path(who.accelerate_config or python), Path(values["model"])]
    return json.dumps([decisive, [(str(place), _version(place)) for place in places]], sort_keys=True)


def _version(place: Path) -> tuple[int, int] | None:
    """Size and time; installing a package changes those of the folder."""
    try:
        status = place.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _require_disk(report: dict[str, Any], folder: Path) -> None:
    """The disk fills while nothing of what is remembered changes.

    Raises:
        PreflightError: it has no room for the run.
    """
    need, free = (report.get("estimate") or {}).get("disk"), shutil.disk_usage(folder).free
    if need and need > free:
        raise PreflightError(
            f"Training needs about {need / _GB:.1f} GB of disk, {free / _GB:.1f} GB are free where the run folders "
            "lie. Make room and queue again."
        )


def summary(report: dict[str, Any]) -> str:
    """Versions, device and memory of a report, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items() if version)
    estimate = report.get("estimate") or {}
    needs = ", ".join(f"{estimate[name] / _GB:.1f} GB {name.upper()}" for name in ("vram", "ram") if estimate.get(name))
    return f"{versions}; on {report.get('device', '?')}" + (f"; needs about {needs}" if needs else "")


def taken(report: dict[str, Any]) -> ModelInputs:
    """What the model takes of pictures and texts, by a report.

    Raises:
        PreflightError: the trainer did not say it.
    """
    try:
        model = report["model"]
        widths = {str(name): int(width) for name, width in model["text"].items()}
        return ModelInputs(str(model["family"]), int(model["channels"]), widths)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PreflightError(
            "The trainer's Python does not say what the model takes; see log.txt of the run"
        ) from error


def require_memory(report: dict[str, Any], vram: int | None, ram: int) -> None:
    """Compare the estimate with what is free now that ComfyUI's models are unloaded; without a card the trainer does.

    Raises:
        PreflightError: it does not fit.
    """
    estimate = report.get("estimate") or {}
    if vram is None:
        return
    for name, free in (("vram", vram), ("ram", ram)):
        need = estimate.get(name)
        if need and need > free:
            raise PreflightError(
                f"Training needs about {need / _GB:.1f} GB of {name.upper()}, {free / _GB:.1f} GB are free with "
                "ComfyUI's models unloaded. Close other programs, or choose a smaller preset, more offload, a lower "
                "resolution or batch_size."
            )


def _where(who: owner.Owner) -> str:
    source = f"set in {Path(who.source).name}" if who.source else "ComfyUI's own; qrlora.toml may name another"
    return f"Interpreter: {subprocess.list2cmdline([who.python])} ({source})."


def _report(text: str) -> dict[str, Any] | None:
    """The JSON object among the printed lines; libraries print things too."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                report = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(report, dict) and "problems" in report:
                return report
    start = text.find("{")  # printed over several lines
    try:
        report = json.JSONDecoder().raw_decode(text[start:])[0] if start >= 0 else None
    except (ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) and "problems" in report else None
