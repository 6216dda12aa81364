"""The parts of nodes/ that need no ComfyUI, imported as ComfyUI would: as modules of a package with the pack's path."""

import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "qrlora_pack_under_test"


def load(module):
    """`nodes.<module>` without running nodes/__init__.py, which imports the host."""
    for name, folder in ((NAME, ROOT), (f"{NAME}.nodes", ROOT / "nodes")):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
    return importlib.import_module(f"{NAME}.nodes.{module}")
