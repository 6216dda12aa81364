"""mypy over nodes/, which imports relatively above itself, as ComfyUI loads it: `python tests/mypy_nodes.py`.

mypy needs the pack's folder as a package, and that folder may be called what no package can be ("qr-lora"). So the
rooms are copied under a name that it takes; unchanged files keep their times, so that mypy's own cache serves.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".mypy_cache"
PACKAGE = "qrlora_pack"
ROOMS = ("nodes", "qrlora_core", "qrlora_plots", "train", "demo/toy")


def main() -> int:
    copy = CACHE / "rooms"
    shutil.rmtree(copy, ignore_errors=True)
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / PACKAGE / room, ignore=shutil.ignore_patterns("__pycache__"))
    for package in (".", "demo"):
        (copy / PACKAGE / package / "__init__.py").touch()
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", CACHE / "nodes"]
    environment = {**os.environ, "MYPYPATH": str(copy)}
    return subprocess.run([*command, "-p", f"{PACKAGE}.nodes"], cwd=copy, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
