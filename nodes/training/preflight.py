"""Asked before anything is unloaded or started: can the trainer's interpreter do this at all?"""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...qrlora_core import QRLoRAError
from . import owner
from .process import Child, ChildError

SECONDS = 180.0  # the first import of torch from a slow disk; a warm one takes a few
_GB = 1e9


class PreflightError(QRLoRAError):
    """Training cannot work as things are; the message lists what to do."""


class Cancelled(Exception):
    """Cancel was pressed meanwhile."""


def preflight(who: owner.Owner, settings: Path, log_file: Path, cancelled: Callable[[], bool]) -> dict[str, Any]:
    """What `train check` reports, once it reports no problem.

    Args:
        who: whose interpreter.
        settings: the run's settings.
        log_file: its output is kept there.
        cancelled: whether Cancel was pressed since the last call.

    Raises:
        PreflightError: the interpreter cannot start, or it reports problems.
        Cancelled: Cancel was pressed.
    """
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
            f"- {one.get('what', one)}\n  {one.get('fix', '')}".rstrip() for one in problems if isinstance(one, dict)
        ]
        raise PreflightError("\n".join(["Training cannot start:", *(lines or [child.tail(15)]), _where(who)]))
    return report


def summary(report: dict[str, Any]) -> str:
    """Versions, device and memory of a report, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items() if version)
    estimate = report.get("estimate") or {}
    needs = ", ".join(f"{estimate[name] / _GB:.1f} GB {name.upper()}" for name in ("vram", "ram") if estimate.get(name))
    return f"{versions}; on {report.get('device', '?')}" + (f"; needs about {needs}" if needs else "")


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
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and "problems" in found:
                return found
    start = text.find("{")  # printed over several lines
    try:
        found = json.JSONDecoder().raw_decode(text[start:])[0] if start >= 0 else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and "problems" in found else None
