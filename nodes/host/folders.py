"""The only file that touches ComfyUI's folders: where adapters and residuals are read and written."""

import logging
from pathlib import Path
from typing import Any

import folder_paths

from ...qrlora_core import FileFormatError, PathError, TensorFile, contained_path, file_kind

log = logging.getLogger(__name__)

FOLDER = "qrlora"
RUNS = "runs"
BASES = "_basis"
MODEL_FOLDERS = ("diffusion_models", "checkpoints")
MODEL_ENDINGS = (".safetensors", ".sft")
NO_DATASET = "none"

_kinds: dict[tuple[str, int, int], str] = {}


def register_folders() -> None:
    """Make `models/qrlora` and `<output>/qrlora` known, beside what extra_model_paths.yaml says."""
    models = Path(folder_paths.models_dir) / FOLDER
    models.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, str(models), is_default=True)
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.get_output_directory()) / FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})


def file_names(residuals: bool) -> list[str]:
    """Names for a drop-down: residual files, or all others. Unreadable ones are in both: loading them says why.

    What training keeps in its run folders (checkpoints, samples, caches) is not listed.
    """
    names = [name for name in folder_paths.get_filename_list(FOLDER) if not _of_a_run(name)]
    return [name for name in names if _kind(name) == "" or (_kind(name) == "residual") == residuals]


def find_file(name: str) -> Path:
    """The file that a workflow names, inside a registered folder.

    Raises:
        PathError: the name leaves its folder, or no such file is there.
    """
    refused = None
    for folder in folder_paths.get_folder_paths(FOLDER):
        try:
            path = contained_path(Path(folder), name)
        except PathError as error:
            refused = error
            continue
        if path.is_file():
            return path
    raise refused or PathError(f"{name!r} is not in models/{FOLDER}; put the file there and refresh (R)")


def save_folder(kind: str = FOLDER) -> Path:
    """Where files of a kind ("qrlora", "loras") are written: the first registered folder."""
    return Path(folder_paths.get_folder_paths(kind)[0])


def results_folder() -> Path:
    """`<output>/qrlora`, where trained adapters get their names."""
    return Path(folder_paths.get_output_directory()) / FOLDER


def runs_folder() -> Path:
    """`<output>/qrlora/runs`."""
    return results_folder() / RUNS


def bases_folder() -> Path:
    """`<output>/qrlora/runs/_basis`, where decompositions of base models are kept."""
    return runs_folder() / BASES


def forget_names() -> None:
    """Make the next listing look at the disk, so that a new file is in it at once."""
    folder_paths.filename_list_cache.pop(FOLDER, None)


def model_names() -> list[str]:
    """Base models that can be trained on: single files in the folders of diffusion models and checkpoints."""
    names = [name for kind in MODEL_FOLDERS for name in folder_paths.get_filename_list(kind)]
    return [name for name in dict.fromkeys(names) if name.lower().endswith(MODEL_ENDINGS)]


def model_file(name: str) -> Path:
    """The base model that a workflow names.

    Raises:
        PathError: not a safetensors file, or not in the folders.
    """
    if not name.lower().endswith(MODEL_ENDINGS):
        raise PathError(f"{name!r} is not a safetensors file; training reads {' and '.join(MODEL_ENDINGS)} only")
    return _inside([folder for kind in MODEL_FOLDERS for folder in folder_paths.get_folder_paths(kind)], name)


def dataset_names() -> list[str]:
    """Folders with pictures: those in ComfyUI's input folder, and in its datasets folder where the host has one."""
    found = set()
    for root in _dataset_roots():
        if root.is_dir():
            found |= {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_dir()}
    return [NO_DATASET, *sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))]


def dataset_folder(name: str) -> Path:
    """The folder that a workflow names.

    Raises:
        PathError: the name leaves its folder, or no such folder is there.
    """
    return _inside(_dataset_roots(), name, folder=True)


def _dataset_roots() -> list[Path]:
    extra = folder_paths.get_folder_paths("datasets") if "datasets" in folder_paths.folder_names_and_paths else []
    return [Path(folder_paths.get_input_directory()), *map(Path, extra)]


def _inside(roots: list[Any], name: str, folder: bool = False) -> Path:
    """The first of `roots` that has it."""
    refused = None
    for root in roots:
        try:
            path = contained_path(Path(root), name)
        except PathError as error:
            refused = error
            continue
        if path.is_dir() if folder else path.is_file():
            return path
    places = " or ".join(dict.fromkeys(Path(root).name for root in roots))
    raise refused or PathError(f"{name!r} is not in {places}; put it there and refresh (R)")


def _of_a_run(name: str) -> bool:
    return name.replace("\\", "/").startswith(f"{RUNS}/") and (results_folder() / name).is_file()


def _kind(name: str) -> str:
    """The format of a file in the folder, "" when it cannot be read. One look at the header per version of the file."""
    try:
        path = find_file(name)
        status = path.stat()
        version = (str(path), status.st_size, status.st_mtime_ns)
        if version not in _kinds:
            _kinds[version] = file_kind(TensorFile(path))
    except (PathError, FileFormatError, OSError) as error:
        log.debug("%s is listed although it cannot be read: %s", name, error)
        return ""
    return _kinds[version]
