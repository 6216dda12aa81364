"""The rooms and who may import whom (docs/architecture.md), and a few promises about the tree."""

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
# only these folders of nodes/ may import the host's own modules
HOST_ROOMS = {
    "comfy": ("host",),
    "folder_paths": ("host",),
    "server": ("host", "training", "adapter_routes.py"),
    "aiohttp": ("training", "adapter_routes.py", "visitors.py"),
}
# inside a room, what a folder may import of it; every other part of the room imports what it likes
WITHIN = {
    "nodes.host": ("nodes.host",),  # the seam serves the nodes and knows none of them
    "nodes.training": ("nodes.training", "nodes.host", "nodes.visitors"),
    "qrlora_core.families": ("qrlora_core.families", "qrlora_core.errors", "qrlora_core.targets"),
    "train.model": ("train.model", "train.config", "train.errors", "train.imports"),
    "train.data": ("train.data", "train.model", "train.config", "train.errors"),
    "train.run": (
        "train.run",
        "train.data",
        "train.model",
        "train.config",
        "train.errors",
        "train.events",
        "train.settings",
    ),
}
# what the nodes may import of trainer and demo, and what those may import besides the standard library and each other
FOR_NODES = {
    "train.config": set(),
    "train.settings": set(),
    "train.events": set(),
    "train.data.captions": set(),
    "train.data.pictures": {"numpy", "PIL"},
    "demo.toy.features": {"torch"},
    "demo.toy.files": set(),
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


def imported_modules(path):
    """The dotted names, from the pack's root, of every module that a file imports relatively."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = resolved(path, node.module or "", node.level)
            for alias in node.names:  # `from .. import x` imports the module x, if there is one
                inner = ROOT / target.replace(".", "/") / alias.name
                yield f"{target}.{alias.name}" if inner.is_dir() or inner.with_suffix(".py").is_file() else target


def resolved(path, name, level):
    """The dotted name from the pack's root of a relative import."""
    package = path.relative_to(ROOT).parent.parts
    return ".".join([*package[: len(package) - level + 1], *filter(None, [name])])


@pytest.mark.parametrize(
    "path", python_files("qrlora_core", "qrlora_plots", "train", "nodes"), ids=lambda path: path.as_posix()[-40:]
)
def test_imports(path):
    parts = path.relative_to(ROOT).parts
    room = parts[0]
    for name, level in imports(path):
        if level:
            target = resolved(path, name, level)
            allowed = {room} if room != "nodes" else {"nodes", "qrlora_core", "qrlora_plots"}
            assert target.split(".")[0] in allowed or target in FOR_NODES, f"{path.name} reaches for {target}"
            continue
        top = name.split(".")[0]
        assert top in STDLIB | ALLOWED[room] | OPTIONAL.get(room, set()), f"{path.name} imports {name}"
        if room == "nodes" and top in HOST_ROOMS:
            assert parts[1] in HOST_ROOMS[top], f"only nodes/{HOST_ROOMS[top][0]} may import {name}"


@pytest.mark.parametrize("folder", WITHIN)
def test_arrows_inside_a_room_go_one_way(folder):
    for path in python_files(folder.replace(".", "/")):
        for target in imported_modules(path):
            inside = target.split(".")[0] == folder.split(".")[0]
            assert not inside or target.startswith(WITHIN[folder]), f"{path.name} of {folder} imports {target}"


@pytest.mark.parametrize("path", python_files("train", "qrlora_plots"), ids=lambda path: path.name)
def test_optional_packages_are_not_needed_to_import(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {name.split(".")[0] for name in names} & OPTIONAL[path.relative_to(ROOT).parts[0]]


@pytest.mark.parametrize("name", FOR_NODES)
def test_what_the_nodes_share_with_trainer_and_demo_needs_little_else(name):
    path = ROOT / f"{name.replace('.', '/')}.py"
    for module, level in imports(path):
        if level:
            assert resolved(path, module, level) in FOR_NODES
        else:
            assert module.split(".")[0] in STDLIB | FOR_NODES[name]


@pytest.mark.parametrize("path", python_files("train"), ids=lambda path: path.as_posix()[-40:])
def test_only_backbones_know_the_names_inside_a_family(path):
    """What differs between families is a record beside flux.py; everything else speaks to the record."""
    if path.parent.name != "backbones":
        words = r"qkv|double_blocks|single_blocks|single_transformer|FluxTransformer|x_embedder|img_attn"
        assert not re.findall(words, path.read_text(encoding="utf-8"))


def test_the_door_imports_lazily():
    names = [name for name, level in imports(ROOT / "__init__.py") if not level]
    assert not names, "opening the pack must cost nothing"


SOURCES = [
    *python_files("qrlora_core", "qrlora_plots", "train", "nodes", "demo", "benchmarks", "tests"),
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


@pytest.mark.parametrize(
    "path", [*python_files("demo", "benchmarks"), ROOT / "dev.py"], ids=lambda path: path.as_posix()[-40:]
)
def test_nothing_outside_the_tests_imports_them(path):
    assert "tests" not in {name.split(".")[0] for name, level in imports(path) if not level}


def test_what_only_tests_and_demo_need_stays_out_of_the_pack():
    """The tests' own nodes reach ComfyUI only where a test links their folder; benchmarks never do.

    The toy's nodes do ship, so that a first run needs no download: in one file of nodes and one of the host's seam,
    which share `demo.toy` (features, weights, adapters) with the demo and nothing else of it.
    """
    pack = ROOT / "tests" / "host" / "helper_pack"
    for path in [ROOT / "__init__.py", *python_files("qrlora_core", "train", "nodes")]:
        text = path.read_text(encoding="utf-8")
        assert pack.name not in text and "benchmarks" not in text
        assert "QRLoRAToy" not in text or path == ROOT / "nodes" / "demo.py"
    for path in python_files("demo"):
        used = {name.split(".")[0] for name, level in imports(path) if not level}
        assert not used & {"comfy", "comfy_api", "folder_paths"}, f"{path.name} imports {used}"


# What only the families' files may know: names of one model, and how it fuses its weights
FAMILY_WORDS = re.compile(r"flux|qkv|double_blocks|single_blocks|joint_blocks", re.IGNORECASE)
# ids that saved workflows and files hold, and what is a person's text
STABLE_IDS = {"double_blocks", "single_blocks", "flux_residual", "flux_targets"}
FAMILY_ROOMS = (("qrlora_core", "families"), ("train", "model", "backbones"))


def identifiers(tree):
    """Every name that code gives or uses, and every text that is one word (a key, a name of a layer)."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.search(r"\s", node.value):
            yield node.value


@pytest.mark.parametrize(
    "path", python_files("qrlora_core", "qrlora_plots", "train", "nodes"), ids=lambda path: path.as_posix()[-40:]
)
def test_only_families_know_a_family(path):
    parts = path.relative_to(ROOT).parts
    if any(parts[: len(room)] == room for room in FAMILY_ROOMS):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {name for name in identifiers(tree) if FAMILY_WORDS.search(name)} - STABLE_IDS
    assert not said, f"{path.name} says {sorted(said)}"
