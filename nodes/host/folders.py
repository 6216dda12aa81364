"""ComfyUI's folders of models and results: where adapters, residuals, LoRAs and base models are read and written."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths

from ...qrlora_core import FileFormatError, PathError, QRLoRAError, TensorFile, contained_path, is_residual

log = logging.getLogger(__name__)

FOLDER = "qrlora"
LORAS = "loras"
RUNS = "runs"
BASES = "_basis"
MODEL_FOLDERS = ("diffusion_models", "checkpoints")
MODEL_ENDINGS = (".safetensors", ".sft")
RESULTS = "output/qrlora"
# What a drop-down of folders says -> kind of the folder; none for that of results
PLACES = {RESULTS: "", "models/qrlora": FOLDER, "models/loras": LORAS}
# what an empty drop-down says: a host shows "undefined" there
NO_ADAPTER = "none: put adapters into models/qrlora, press R"
NO_RESIDUAL = "none: put a residual into models/qrlora, press R"
NO_MODEL = "none: put a model into models/diffusion_models, press R"
NO_LORA = "none: put a LoRA into models/loras, press R"
_NOTHING = (NO_ADAPTER, NO_RESIDUAL, NO_MODEL, NO_LORA)

_kinds: dict[tuple[str, int, int], str] = {}
_last_kinds: tuple[Any, dict[str, str]] | None = None


def register_folders() -> None:
    """Make `models/qrlora` and `<output>/qrlora` known, beside what extra_model_paths.yaml says."""
    models = Path(folder_paths.models_dir) / FOLDER
    models.mkdir(parents=True, exist_ok=True)
    # not as the default: what extra_model_paths.yaml lists for this folder stays in front
    folder_paths.add_model_folder_path(FOLDER, str(models))
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.get_output_directory()) / FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})


def file_names(residuals: bool) -> list[str]:
    """Names for a drop-down: residual files, or all others. Unreadable ones are in both: loading them says why.

    What training keeps in its run folders (checkpoints, samples, caches) is not listed. The host asks for this many
    times for a page and for a prompt, in its event loop: headers are read once, and looked at again when a folder or
    the list has changed.
    """
    names = [name for name in folder_paths.get_filename_list(FOLDER) if not _of_a_run(name)]
    shown = ("", "residual" if residuals else "other")
    fitting = [name for name, kind in _kinds_of(tuple(names)).items() if kind in shown]
    return fitting or [NO_RESIDUAL if residuals else NO_ADAPTER]


def find_file(name: str) -> Path:
    """The file that a workflow names, inside a registered folder.

    Raises:
        PathError: the name leaves its folder, or no such file is there.
    """
    _require_name(name)
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


def lora_names() -> list[str]:
    """LoRA files for a drop-down: the safetensors files in the folders of LoRAs."""
    names = [name for name in folder_paths.get_filename_list(LORAS) if name.lower().endswith(MODEL_ENDINGS)]
    return names or [NO_LORA]


def refusal(find: Callable[[str], Path], name: str) -> str:
    """Why a name that a workflow gives cannot be used, or an empty string; asked before anything runs."""
    try:
        find(name)
    except QRLoRAError as error:
        return str(error)
    return ""


def version(find: Callable[[str], Path], name: str) -> str:
    """Changes when the file does, so that a file written anew is read anew; empty for a name that cannot be used."""
    if refusal(find, name):
        return ""
    status = find(name).stat()
    return f"{name}:{status.st_size}:{status.st_mtime_ns}"


def lora_file(name: str) -> Path:
    """The LoRA file that a workflow names. One that is listed may be a link to another disk: its owner put it there.

    Raises:
        PathError: not a safetensors file, or not in the folders.
    """
    _require_name(name)
    if not name.lower().endswith(MODEL_ENDINGS):
        raise PathError(f"{name!r} is not a safetensors file; only {' and '.join(MODEL_ENDINGS)} are read")
    if _listed(name, folder_paths.get_filename_list(LORAS)):
        for root in folder_paths.get_folder_paths(LORAS):
            if (path := Path(root, name.replace("\\", "/"))).is_file():
                return path
    return first_inside(folder_paths.get_folder_paths(LORAS), name)


def _require_name(name: str) -> None:
    """Refuse what stands in an empty drop-down."""
    if name in _NOTHING:
        raise PathError(
            f"nothing is chosen, because nothing was there to choose: {name.removeprefix('none: ')}, choose it"
        )


def save_folder(kind: str = FOLDER) -> Path:
    """Where files of a kind ("qrlora", "loras") are written: the first registered folder."""
    return Path(folder_paths.get_folder_paths(kind)[0])


def spoken(kind: str) -> str:
    """How messages call the folder where files of a kind are written: its last two parts, "models/loras" by default."""
    folder = save_folder(kind)
    return f"{folder.parent.name}/{folder.name}"


def place(label: str) -> Path:
    """Where a node writes adapters, by what its drop-down says (see `PLACES`)."""
    kind = PLACES[label]
    return save_folder(kind) if kind else results_folder()


def output_folder() -> Path:
    """ComfyUI's folder of results."""
    return Path(folder_paths.get_output_directory())


def results_folder() -> Path:
    """`<output>/qrlora`, where trained adapters get their names."""
    return output_folder() / FOLDER


def runs_folder() -> Path:
    """`<output>/qrlora/runs`."""
    return results_folder() / RUNS


def bases_folder() -> Path:
    """`<output>/qrlora/runs/_basis`, where decompositions of base models are kept."""
    return runs_folder() / BASES


def forget_names(kind: str = FOLDER) -> None:
    """Make the next listing of a kind look at the disk, so that a new file is in it at once."""
    folder_paths.filename_list_cache.pop(kind, None)


def model_names() -> list[str]:
    """Base models that can be trained on: single files in the folders of diffusion models and checkpoints."""
    names = [name for kind in MODEL_FOLDERS for name in folder_paths.get_filename_list(kind)]
    return [name for name in dict.fromkeys(names) if name.lower().endswith(MODEL_ENDINGS)] or [NO_MODEL]


def model_file(name: str) -> Path:
    """The base model that a workflow names. One that is listed may be a link to another disk: its owner put it there.

    Raises:
        PathError: not a safetensors file, or not in the folders.
    """
    _require_name(name)
    if not name.lower().endswith(MODEL_ENDINGS):
        raise PathError(f"{name!r} is not a safetensors file; training reads {' and '.join(MODEL_ENDINGS)} only")
    for kind in MODEL_FOLDERS:
        if _listed(name, folder_paths.get_filename_list(kind)):
            for root in folder_paths.get_folder_paths(kind):
                if (path := Path(root, name.replace("\\", "/"))).is_file():
                    return path
    return first_inside([folder for kind in MODEL_FOLDERS for folder in folder_paths.get_folder_paths(kind)], name)


def first_inside(roots: list[Any], name: str, folder: bool = False) -> Path:
    """The file of this name (or `folder`) in the first of `roots` that has it.

    Raises:
        PathError: the name leaves its folder, or none has it.
    """
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


def _listed(name: str, names: list[str]) -> bool:
    return name.replace("\\", "/") in (listed.replace("\\", "/") for listed in names)


def _of_a_run(name: str) -> bool:
    return name.replace("\\", "/").startswith(f"{RUNS}/") and (results_folder() / name).is_file()


def _kinds_of(names: tuple[str, ...]) -> dict[str, str]:
    """Name -> "residual", "other", or "" for a file that cannot be read."""
    global _last_kinds
    roots = [Path(root) for root in folder_paths.get_folder_paths(FOLDER)]
    folders = {(root / name).parent for root in roots for name in names}
    version = (names, tuple((str(folder), _time_of(folder)) for folder in sorted(folders)))
    if _last_kinds is None or _last_kinds[0] != version:
        _last_kinds = (version, {name: _kind(name) for name in names})
    return _last_kinds[1]


def _time_of(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:  # not every root has every sub-folder
        return 0


def _kind(name: str) -> str:
    """What a file is by the keys of its header. One look at the header for each version of the file."""
    try:
        path = find_file(name)
        status = path.stat()
    except (PathError, OSError) as error:
        log.debug("%s is listed although it cannot be found: %s", name, error)
        return ""
    version = (str(path), status.st_size, status.st_mtime_ns)
    if version not in _kinds:
        try:
            _kinds[version] = "residual" if is_residual(TensorFile(path).specs) else "other"
        except FileFormatError as error:
            log.debug("%s is listed although it cannot be read: %s", name, error)
            _kinds[version] = ""
    return _kinds[version]
