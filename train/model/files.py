"""The files of a base model on disk: which they are, and whether all of them are there."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qrlora_core import TensorFile

from ..errors import TrainError


def located(path: Path) -> Path:
    """The file, or the folder that holds the transformer's own files.

    Raises:
        TrainError: there is none, or it is no safetensors file.
    """
    if path.is_file():
        if path.suffix.lower() not in (".safetensors", ".sft"):
            raise TrainError(
                "model",
                f"{path.name}: only safetensors files can be trained on, not {path.suffix or 'a file without ending'}. "
                "Use the bf16 or fp8 safetensors file of this model, or its diffusers folder",
            )
        return path
    for folder in (path / "transformer", path / "unet", path):
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            return folder
    state = "holds no safetensors file" if path.is_dir() else "does not exist"
    raise TrainError("model", f"the base model {str(path)!r} {state}; nothing is downloaded, so put it there first")


def require_all_files(folder: Path) -> None:
    """A folder's index names files that must all be there; a download that broke off leaves some out.

    Raises:
        TrainError: one is missing; the message names it.
    """
    for index in folder.glob("*.safetensors.index.json") if folder.is_dir() else ():
        listed = read_table(index).get("weight_map")
        names = {str(name) for name in listed.values()} if isinstance(listed, dict) else set()
        missing = sorted(names - {path.name for path in folder.glob("*.safetensors")})
        if missing:
            raise TrainError(
                "model", f"{folder.name} lacks {missing[0]:.80}, which {index.name} names: the download is not complete"
            )


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        TrainError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrainError("model", f"{path.name} of the base model cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TrainError("model", f"{path.name} of the base model is no table")
    return value


def files_by_key(files: Sequence[TensorFile], title: str) -> dict[str, TensorFile]:
    """Which file holds which tensor.

    Raises:
        TrainError: two files hold the same one: they are two models.
    """
    file_of: dict[str, TensorFile] = {}
    for file in files:
        keys = [*file.specs, *file.other]
        twice = next((key for key in keys if key in file_of), None)
        if twice is not None:
            names = f"{file_of[twice].path.name} and {file.path.name}"
            raise TrainError(
                "model",
                f"{names} in {title} both hold {twice}: they are two models. Name one file, or leave one model in the "
                "folder",
            )
        file_of |= dict.fromkeys(keys, file)
    return file_of
