"""The archive that the registry would make: what git tracks, without what .comfyignore leaves out."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pathspec  # which mypy brings

ROOT = Path(__file__).resolve().parents[1]


def archived_files():
    """Paths from the pack's root.

    Raises:
        FileNotFoundError: this is no clone, or there is no git.
    """
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        raise FileNotFoundError("the archive is made of what git tracks: clone the repository")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text().splitlines())
    return [name for name in listed.split("\0") if name and not ignored.match_file(name) and (ROOT / name).is_file()]


def make_archive(path):
    """Write it; `path`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in archived_files():
            archive.write(ROOT / name, name)
    return path
