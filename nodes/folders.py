"""The only file that touches ComfyUI's folders: where adapters and residuals are read and written."""

import logging
from pathlib import Path

import folder_paths

from ..qrlora_core import FileFormatError, PathError, TensorFile, contained_path, file_kind

log = logging.getLogger(__name__)

FOLDER = "qrlora"

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
    """Names for a drop-down: residual files, or all others. Unreadable ones are in both: loading them says why."""
    names = folder_paths.get_filename_list(FOLDER)
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
