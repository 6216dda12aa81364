"""What the registry would ship: small, without tests, and complete."""

import ast
import zipfile

import pytest

from tests.archive import ROOT, archived_files, make_archive

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone: the archive is made of what git tracks"),
]


def test_it_is_small(tmp_path):
    size = make_archive(tmp_path / "node.zip").stat().st_size
    assert size < 3 * 2**20, f"{size / 2**20:.2f} MiB"


def test_it_holds_the_pack_and_nothing_of_its_development():
    names = archived_files()
    rooms = {name.split("/")[0] for name in names if "/" in name}
    assert {"nodes", "qrlora_core", "qrlora_plots", "train", "web", "locales", "demo", "example_workflows"} <= rooms
    assert not rooms & {"tests", "benchmarks", ".github", ".ci"} and "dev.py" not in names
    assert {name for name in names if name.startswith("demo/")} == {
        "demo/__init__.py",
        *(f"demo/toy/{name}" for name in ("__init__.py", "features.py", "files.py")),
        *(f"demo/toy/toy_{name}.safetensors" for name in ("flux_fp8", "style", "content")),
    }
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"} <= set(names)


def test_what_it_imports_of_itself_is_in_it(tmp_path):
    names = set(archived_files())
    for name in sorted(name for name in names if name.endswith(".py")):
        package = name.split("/")[:-1]
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                target = "/".join([*base, *(node.module or "").split(".")]).strip("/")
                places = {f"{target}.py", f"{target}/__init__.py", "__init__.py" if not target else ""}
                inner = {f"{target}/{alias.name}.py".strip("/") for alias in node.names}
                assert (places | inner) & names, f"{name} imports {target}"


def test_it_opens_as_a_zip(tmp_path):
    with zipfile.ZipFile(make_archive(tmp_path / "node.zip")) as archive:
        assert archive.testzip() is None
