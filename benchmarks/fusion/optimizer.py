"""LoRA-Optimizer's automatic merge, by its own code (github.com/ethanfel/ComfyUI-LoRA-Optimizer), as a method.

Its code lies in a folder of its own and is no part of this pack. It runs in ComfyUI: adapters are exported as the LoRA
files that they are, its node merges them into a model, and what it changed of each weight is read off.
"""

import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from demo.model import WEIGHTS
from qrlora_core import Adapter, AdapterLayer, save_adapter

from .learn import Recipe
from .live import Update
from .protocol import Unit
from .store import Study, worn

log = logging.getLogger(__name__)
NAME = "optimizer"  # among `Study.joints`
_ROOT = Path(__file__).parents[2]


class Optimizer:
    """Writes what LoRA-Optimizer makes of the units' pairs, all pairs of a recipe in one process of ComfyUI.

    Args:
        folder: a clone of it.
        units: whose pairs are made together.

    Raises:
        FileNotFoundError: there is no such pack, or COMFYUI_PATH and COMFYUI_PYTHON do not say where ComfyUI is.
    """

    def __init__(self, folder: Path, units: Sequence[Unit]) -> None:
        if not (folder / "lora_optimizer.py").is_file():
            raise FileNotFoundError(f"{folder} holds no lora_optimizer.py: expected a clone of ComfyUI-LoRA-Optimizer")
        missing = [name for name in ("COMFYUI_PATH", "COMFYUI_PYTHON") if name not in os.environ]
        if missing:
            raise FileNotFoundError(f"set {' and '.join(missing)}: LoRA-Optimizer runs in ComfyUI")
        self.folder, self.units = folder.resolve(), units

    def __call__(self, study: Study, unit: Unit, side: str, recipe: Recipe) -> None:
        """See `Study.joints`.

        Raises:
            RuntimeError: ComfyUI or the pack failed; the end of what they said is in the message.
        """
        with tempfile.TemporaryDirectory() as scratch:
            jobs = []
            pairs = [(unit, side), *((one, kind) for one in self.units for kind in (worn("both")[1], worn("both+")[1]))]
            for one, kind in dict.fromkeys(pairs):
                path = study.joined_path(NAME, one, kind, recipe)
                if path.is_file():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                files = [
                    exported(
                        study.adapter(one, which, recipe).update, Path(scratch) / f"{path.stem}-{which}.safetensors"
                    )
                    for which in ("content", kind)
                ]
                jobs.append({"loras": [str(file) for file in files], "output": str(path.resolve())})
            task = {"model": str(WEIGHTS), "pack": str(self.folder), "layers": list(study.live.layers), "jobs": jobs}
            given = Path(scratch) / "task.json"
            given.write_text(json.dumps(task), encoding="utf-8")
            command = [os.environ["COMFYUI_PYTHON"], "-m", "benchmarks.fusion.in_host", str(given)]
            ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise RuntimeError(f"LoRA-Optimizer in ComfyUI ended with {ended.returncode}: {ended.stderr[-2000:]}")
            for line in ended.stdout.splitlines():
                if line.startswith("merged "):
                    log.info("%s", line)


def exported(update: Update, path: Path) -> Path:
    """An adapter as a LoRA file that any loader reads."""
    layers = {name: AdapterLayer(pair.up, pair.down) for name, pair in update.items()}
    rank = max(len(pair.down) for pair in update.values())
    return save_adapter(Adapter.from_tensors(path.stem, layers, rank), path)
