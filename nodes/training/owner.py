"""What only the machine's owner decides: which interpreter trains, and how accelerate spreads it.

The file is named by the environment variable QRLORA_CONFIG, or is `qrlora.toml` (or `qrlora.json`) in the pack's own
folder. No workflow, no upload and no node can write there, and nothing of it can be set by a widget.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...train.settings import ConfigError, load_settings

PACK = Path(__file__).resolve().parents[2]
START = PACK / "train" / "start.py"
VARIABLE = "QRLORA_CONFIG"
# port 0: any free one, so that two ComfyUIs do not meet
_ONE_MACHINE = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
_ONE_MACHINE += ["--main_process_port", "0"]
_NAMES = ("qrlora.toml", "qrlora.json")


class Owner(NamedTuple):
    """`python`: the interpreter. `accelerate_config`: a file of `accelerate config`, or "". `source`: where from."""

    python: str
    accelerate_config: str
    source: str

    def command(self, arguments: Sequence[str], processes: int = 1) -> list[str]:
        """The trainer's command line."""
        if processes == 1:
            return [self.python, str(START), *arguments]
        launch = [self.python, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        launch += ["--config_file", self.accelerate_config] if self.accelerate_config else _ONE_MACHINE
        return [*launch, str(START), *arguments]


def owner() -> Owner:
    """Read the owner's file; without one, ComfyUI's own interpreter.

    Raises:
        ConfigError: the file is named but missing, or has an unknown key or a file that is not there.
    """
    named = os.environ.get(VARIABLE, "")
    path = Path(named).expanduser() if named else next((PACK / n for n in _NAMES if (PACK / n).is_file()), None)
    if path is None:
        return Owner(sys.executable, "", "")
    settings = load_settings(path)
    unknown = settings.keys() - {"python", "accelerate_config"}
    if unknown:
        raise ConfigError(f"{path.name}: unknown key {min(unknown)!r:.200}; it may hold python and accelerate_config")
    files = {}
    for key in ("python", "accelerate_config"):
        value = settings.get(key, "")
        if not isinstance(value, str):
            raise ConfigError(f"{path.name}: {key} is {value!r:.200}, expected the path of a file")
        try:
            files[key] = str(Path(value).expanduser()) if value else ""
            is_there = not value or Path(files[key]).is_file()
        except (RuntimeError, OSError, ValueError):  # ~ of somebody who is not known, a NUL, a name that is too long
            is_there = False
        if not is_there:
            raise ConfigError(f"{path.name}: {key} names {value!r:.200}, which is not a file")
    return Owner(files["python"] or sys.executable, files["accelerate_config"], str(path))


def environment() -> dict[str, str]:
    """The trainer's environment: ours, with the pack on its path and no way to download anything.

    On a CPU that ComfyUI uses as well, threads of OpenMP that wait busily for one another slow both down.
    """
    paths = [str(PACK), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "HF_HUB_OFFLINE": "1",
    }
