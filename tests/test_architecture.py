"""The rooms and who may import whom (design, section 4), and a few promises about the tree."""

import ast
import re
import sys
from pathlib import Path

import pytest

import qrlora_core

ROOT = Path(__file__).resolve().parents[1]
STDLIB = set(sys.stdlib_module_names)
ALLOWED = {
    "qrlora_core": {"torch", "safetensors", "numpy"},
    "train": {
        "torch",
        "safetensors",
        "numpy",
        "qrlora_core",
        "qrlora_plots",
        "diffusers",
        "accelerate",
        "tqdm",
        "PIL",
        "psutil",
        "train",
    },
    # numpy, PIL, psutil and aiohttp are the host's own requirements; server is the host's module of that name
    "nodes": {"torch", "comfy_api", "comfy", "folder_paths", "numpy", "PIL", "psutil", "aiohttp", "server"},
    # imports neither core nor host, so that nodes (relatively) and trainer (absolutely) can both import it
    "qrlora_plots": {"numpy", "PIL"},
}
# imported inside the functions that need them, when installed
OPTIONAL = {"train": {"torchao", "bitsandbytes", "prodigyopt"}, "qrlora_plots": {"matplotlib"}}
HOST_FILES = {
    "comfy": {"host.py", "host_train.py", "hooks.py"},
    "folder_paths": {"folders.py"},
    "server": {"host_train.py", "routes.py"},
    "aiohttp": {"routes.py"},
}


def python_files(*rooms):
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py")) if "__pycache__" not in path.parts]


def imports(path):
    """(top-level module, level of a relative import) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize(
    "path", python_files("qrlora_core", "qrlora_plots", "train", "nodes"), ids=lambda path: path.as_posix()[-40:]
)
def test_imports(path):
    room = path.relative_to(ROOT).parts[0]
    for name, level in imports(path):
        top = name.split(".")[0]
        if level == 1 or (level and room != "nodes"):
            assert level == 1, f"{path.name} reaches out of its room"
        elif level:  # ..qrlora_core, ..qrlora_plots, or the two standard-library modules of the trainer
            assert (level == 2 and top in ("qrlora_core", "qrlora_plots")) or name in (
                "train.config",
                "train.events",
            ), name
        else:
            assert top in STDLIB | ALLOWED[room] | OPTIONAL.get(room, set()), f"{path.name} imports {name}"
            assert path.name in HOST_FILES.get(top, {path.name}), f"only {HOST_FILES[top]} may import {name}"


@pytest.mark.parametrize("path", python_files("train"), ids=lambda path: path.name)
def test_optional_packages_are_not_needed_to_import(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {name.split(".")[0] for name in names} & OPTIONAL["train"]


@pytest.mark.parametrize("name", ["config", "events"])
def test_what_the_nodes_may_import_of_the_trainer_is_standard_library(name):
    for module, level in imports(ROOT / "train" / f"{name}.py"):
        assert not level and module.split(".")[0] in STDLIB


def test_the_door_imports_lazily():
    names = [name for name, level in imports(ROOT / "__init__.py") if not level]
    assert not names, "opening the pack must cost nothing"


SOURCES = [
    *python_files("qrlora_core", "qrlora_plots", "train", "nodes", "benchmarks", "tests"),
    ROOT / "dev.py",
    ROOT / "__init__.py",
]


@pytest.mark.parametrize(
    "path",
    SOURCES + sorted((ROOT / "web").rglob("*.js")),
    ids=lambda path: path.as_posix()[-40:],
)
def test_source_is_ascii_and_safe(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    if path.suffix == ".py" and "tests" not in path.parts:
        called = {
            n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not called & {"eval", "exec", "__import__"}
        assert "torch.load(" not in text and "pickle" not in {name for name, _ in imports(path)}


def test_versions_and_requirements_agree():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', text, re.M)[1] == qrlora_core.__version__
    listed = re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*)\]$", text, re.M)[1])
    assert listed == (ROOT / "requirements.txt").read_text().split()
    assert not any(name.startswith("torch") or "<" in name or "==" in name for name in listed)
    assert qrlora_core.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_helper_packs_stay_out_of_the_pack():
    """The toy's and the tests' own nodes reach ComfyUI only where a demo or a test links their folders."""
    packs = [ROOT / "benchmarks" / "toy" / "comfy_pack", ROOT / "tests" / "host" / "helper_pack"]
    for path in [ROOT / "__init__.py", *python_files("qrlora_core", "train", "nodes")]:
        text = path.read_text(encoding="utf-8")
        assert not any(pack.name in text for pack in packs) and "benchmarks" not in text and "QRLoRAToy" not in text
    host_only = {"comfy", "comfy_api", "folder_paths"}
    for path in python_files("benchmarks/toy"):
        used = {name.split(".")[0] for name, level in imports(path) if not level} & host_only
        assert not used or path == packs[0] / "nodes.py", f"{path.name} imports {used}"
