"""Run folders: `<output>/qrlora/runs/<name>-<key>/`, one per training, never deleted unasked.

| file | what |
|---|---|
| `settings.json` | the trainer's settings |
| `events.jsonl` | what it reported, of all its starts |
| `log.txt` | its output |
| `checkpoints/`, `samples/` | where it goes on from, and sample latents |
| `strengths/` | what the adapter does at several strengths: numbers, latents, and the picture of both |
| `adapter-<steps>.safetensors` | the result after that many steps |
| `result.json` | which results were checked, and under which names they were published |
| `lock`, `trainer.json`, `stop` | who trains here now; asks it to stop |
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from ...qrlora_core import PathError, whole_file
from .locks import try_lock
from .process import still_runs

log = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"step-(\d+)\.safetensors")
_LARGEST_PID = 1 << 31
_LATEST = 1e15  # unix seconds
_LONGEST_STEPS = 9  # digits


def key_of(parts: Any) -> str:
    """Twelve hex digits of JSON values; the same for the same values in any order of keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Result(NamedTuple):
    """A trained adapter that was checked: its SHA-256, and {wanted name: file name inside output/qrlora}.

    In another folder both are of that folder, and its label and a colon stand before the wanted name.
    """

    sha256: str
    published: Mapping[str, str]


class RunFolder:
    """One run folder; making the object makes nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.settings = folder / "settings.json"
        self.events = folder / "events.jsonl"
        self.log = folder / "log.txt"
        self.stop = folder / "stop"
        self.trainer = folder / "trainer.json"

    def adapter(self, steps: int) -> Path:
        return self.folder / f"adapter-{steps:08}.safetensors"

    def checkpoint_step(self) -> int:
        """The newest checkpoint's step, 0 without any. An empty file, which a full disk leaves, is none."""
        files = (self.folder / "checkpoints").glob("step-*.safetensors")
        names = (_CHECKPOINT.fullmatch(path.name) for path in files if path.stat().st_size)
        return max((int(name[1]) for name in names if name), default=0)

    def samples(self) -> dict[int, Path]:
        """Step -> file of sample latents, in order."""
        files = sorted((self.folder / "samples").glob("step-*.safetensors"))
        return {int(name[1]): path for path in files if (name := _CHECKPOINT.fullmatch(path.name))}

    def strengths(self, steps: int, ending: str) -> Path:
        """What the adapter of so many steps does at several strengths: ".json", ".safetensors" or ".png"."""
        return self.folder / "strengths" / f"step-{steps:08}{ending}"

    def write(self, path: Path, values: Any) -> None:
        """JSON into the folder, whole or not at all."""
        with whole_file(path, overwrite=True) as file:
            file.write(json.dumps(values, indent=1, ensure_ascii=True).encode())

    def results(self) -> dict[int, Result]:
        """Steps -> the checked result after so many steps. What is damaged in the file was never vouched for."""
        table = _read_json(self.folder / "result.json")
        return {
            int(steps): result
            for steps, entry in table.items()
            if steps.isdecimal() and len(steps) <= _LONGEST_STEPS and (result := _result(entry))
        }

    def record(self, steps: int, sha256: str, published: Mapping[str, str] | None = None) -> None:
        """Remember a checked result, and perhaps {wanted name: file name} that it got."""
        results = self.results()
        earlier = results.get(steps)
        names = dict(earlier.published) if earlier is not None and earlier.sha256 == sha256 else {}
        results[steps] = Result(sha256, {**names, **(published or {})})
        self.write(self.folder / "result.json", {str(key): result._asdict() for key, result in results.items()})

    def set_aside(self, steps: int) -> None:
        """Rename an adapter that no run vouched for: nothing of an earlier run may pass for the next one's."""
        path = self.adapter(steps)
        if path.exists():
            path.replace(path.with_suffix(".unchecked.safetensors"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[int | None]:
        """Hold the folder's lock; yields its descriptor, or None when another process has it.

        The system lets go of it when its holder dies. The trainer inherits the descriptor where that is possible, so
        that a folder stays locked while the trainer of a killed ComfyUI still writes its checkpoint. On a disk without
        locks only a trainer of this machine that still runs keeps others out.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            state = try_lock(descriptor)
            if state == "unsupported":
                log.warning(
                    "QR-LoRA: the disk of %s has no file locks; do not train the same in two ComfyUIs", self.name
                )
                noted = self.earlier_trainer()
                state = "busy" if noted is not None and still_runs(*noted) else "held"
            yield descriptor if state == "held" else None
        finally:
            os.close(descriptor)

    def note_trainer(self, pid: int) -> None:
        """Remember which process trains here."""
        with contextlib.suppress(psutil.Error):
            self.write(self.trainer, {"pid": pid, "created": psutil.Process(pid).create_time()})

    def earlier_trainer(self) -> tuple[int, float] | None:
        """Process id and start of the trainer noted last."""
        noted = _read_json(self.trainer)
        pid, created = noted.get("pid"), noted.get("created")
        if type(pid) is not int or not 0 < pid < _LARGEST_PID:
            return None
        if not isinstance(created, int | float) or not abs(created) < _LATEST:  # false for NaN too
            return None
        return pid, float(created)


def find_runs(root: Path, key: str) -> list[RunFolder]:
    """The run folders of a key, whatever the adapter is called; the one that got furthest comes first."""
    ending = re.compile(rf".*-{key}(-\d+)?")
    folders = [path for path in sorted(root.glob(f"*-{key}*")) if path.is_dir() and ending.fullmatch(path.name)]
    return sorted(map(RunFolder, folders), key=lambda run: -run.checkpoint_step())


def choose_run(root: Path, name: str, key: str, steps: int, resume: str) -> RunFolder:
    """Where to train: a run that can be gone on with, otherwise a new folder.

    Args:
        root: the folder of all runs.
        name: the adapter's name; its last part names the folder.
        key: of everything but the number of steps.
        steps: a run that is already past them cannot be used.
        resume: "auto"; "never": a new folder unless nothing was trained yet; "require".

    Raises:
        PathError: "require", and there is nothing to go on with.
    """
    runs = [run for run in find_runs(root, key) if run.checkpoint_step() <= steps]
    if resume == "never":
        runs = [run for run in runs if run.checkpoint_step() == 0]
    if runs and (resume != "require" or runs[0].checkpoint_step()):
        return runs[0]
    if resume == "require":
        raise PathError(
            "resume is 'require', but no checkpoint of a run with these pictures and settings, up to "
            f"{steps} steps, is in {root.parent.name}/{root.name}"
        )
    stem = name.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".safetensors")
    number, folder = 1, root / f"{stem}-{key}"
    while folder.exists():
        number += 1
        folder = root / f"{stem}-{key}-{number}"
    return RunFolder(folder)


def _result(entry: Any) -> Result | None:
    """A checked entry of result.json."""
    if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
        return None
    published = entry.get("published", {})
    names = published.items() if isinstance(published, dict) else ()
    return Result(entry["sha256"], {name: file for name, file in names if isinstance(file, str)})


def _read_json(path: Path) -> dict[str, Any]:
    """A table, empty when the file is missing or broken: then nothing was vouched for."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
