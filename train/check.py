"""Can this machine train? Answers in seconds, before anything is loaded, each problem with its fix."""

import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import FitConfig, as_table
from .imports import quiet_imports

REQUIRED = {
    "torch": "2.4",
    "safetensors": "0.4.2",
    "numpy": "1.25",
    "diffusers": "0.35",
    "accelerate": "1.0",
    "transformers": "4.43",  # for `encode` and `sample`, whose pipelines cannot be imported without
    "psutil": "5.9",
    "tqdm": "4.60",
    "pillow": "10.0",
}
OPTIONAL = ("bitsandbytes", "torchao", "prodigyopt", "xformers", "matplotlib")
_NEEDED_BY = {"adamw8bit": "bitsandbytes", "nf4": "bitsandbytes", "int8": "torchao", "prodigy": "prodigyopt"}


def check(config: FitConfig, data: bool = True, model: bool = True) -> dict[str, Any]:
    """Look at the interpreter, the device, the disk, the base model and the data.

    Works in an interpreter that lacks the trainer's packages: that is then one of the problems.

    Args:
        config: settings of the run that is planned.
        data: whether the training cache exists already.
        model: whether a base model is named already; without one the question is whether this machine can train at all.

    Returns:
        JSON-ready: `python`, `versions`, `device`, `vram_free`, `ram_free`, `disk_free`, `model` (with `channels` of
        the latents and `text`, field of an encoded text -> its width, that it takes), `estimate` (bytes, None where
        unknown), `chosen` and `memory` (what "auto" became, and in words), `scaling`, and `problems`: a list
        of {"what", "fix"}.
    """
    report: dict[str, Any] = {
        "python": f"{platform.python_version()} {sys.executable}",
        "versions": {name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        "device": None,
        "vram_free": None,
        "ram_free": None,
        "disk_free": _disk_free(Path(config.run_dir)),
        "model": None,
        "estimate": None,
        "chosen": None,
        "memory": None,
        "scaling": config.scaling,
        "problems": [],
    }
    problems: list[dict[str, str]] = report["problems"]
    _check_packages(report["versions"], config, problems)
    if not problems:
        try:
            with quiet_imports():
                from .run.plan import look_at_device, look_at_files
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            # what is installed and does not load: another version of Python, a DLL that is missing, mixed versions
            broken = (getattr(error, "name", None) or "diffusers").split(".")[0]
            problems.append(
                {"what": f"a package is broken: {error}", "fix": _pip(f"--force-reinstall --no-deps {broken}")}
            )
            return report
        look_at_device(config, report, problems)
        if model:
            look_at_files(config, report, problems, data)
    return report


def readable(report: Mapping[str, Any]) -> str:
    """The same for a person."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    lines = [f"python     {report['python']}", f"packages   {versions}"]
    for key in ("device", "model"):
        value = report[key]
        text = ", ".join(f"{k} {_words(v)}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"{key:<10} {text or 'not known'}")
    for key in ("vram_free", "ram_free", "disk_free"):
        if report[key] is not None:
            lines.append(f"{key:<10} {report[key] / 1e9:.1f} GB")
    if report["estimate"]:
        parts = ", ".join(f"{k} {v / 1e9:.1f} GB" for k, v in report["estimate"].items())
        lines += [f"needs      {parts}", f"memory     {report['memory']}", f"scaling    {report['scaling']:g}"]
    lines += [f"PROBLEM    {problem['what']}\n           fix: {problem['fix']}" for problem in report["problems"]]
    return "\n".join(lines if report["problems"] else [*lines, "ready to train"])


def dry_run(config: FitConfig) -> str:
    """Resolved settings (as a TOML file takes them), memory estimate and layers, for `fit --dry-run`.

    Raises:
        QRLoRAError: the model or the data cannot be read.
    """
    from .run.plan import planned

    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in as_table(config).items())
    return f"{settings}\n\n{planned(config)}"


def _words(value: Any) -> str:
    return " and ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _check_packages(versions: Mapping[str, str | None], config: FitConfig, problems: list[dict[str, str]]) -> None:
    wrong = [name for name, least in REQUIRED.items() if _older(versions[name], least)]
    if "torch" in wrong:  # its build depends on the GPU, so it is never part of one command for all
        problems.append(
            {
                "what": f"torch {versions['torch'] or 'is not installed'}, {REQUIRED['torch']} or newer is needed",
                "fix": "install torch for this machine as https://pytorch.org/get-started says",
            }
        )
        wrong.remove("torch")
    if wrong:
        listed = ", ".join(f"{name} {versions[name] or 'is not installed'}" for name in wrong)
        wanted = " ".join(f'"{name}>={REQUIRED[name]}"' for name in wrong)
        problems.append({"what": f"{listed}", "fix": _pip(wanted)})
    for setting in (config.optimizer, config.base_storage):
        package = _NEEDED_BY.get(setting)
        if package and not versions[package]:
            problems.append({"what": f"{setting} needs {package}, which is not installed", "fix": _pip(package)})


def _pip(what: str) -> str:
    return f'"{sys.executable}" -m pip install {what}'


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _older(version: str | None, least: str) -> bool:
    if version is None:
        return True

    def numbers(text: str) -> list[int]:
        plain = text.split("+")[0].split(".")
        return [int(part) for part in plain[:3] if part.isdigit()]

    return numbers(version) < numbers(least)


def _disk_free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
