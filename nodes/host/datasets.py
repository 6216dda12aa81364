"""Folders of pictures to train on: which ones a drop-down lists, and where a workflow's name leads."""

import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

import folder_paths

from ...train.data.captions import PICTURE_ENDINGS
from .folders import first_inside

log = logging.getLogger(__name__)

NO_DATASET = "none"
_COARSEST_TIME_NS = 2_000_000_000  # of FAT


class _Contents(NamedTuple):
    """What a folder holds, not deeper: names of folders that are not hidden, and whether there are pictures."""

    folders: tuple[str, ...] = ()
    has_pictures: bool = False


_contents: dict[Path, tuple[int, _Contents]] = {}


def dataset_names() -> list[str]:
    """Folders with pictures: those in ComfyUI's input folder, and in its datasets folder where the host has one.

    Two levels deep; a workflow may name deeper ones.
    """
    names: set[str] = set()
    for root in _dataset_roots():
        for first in _look_into(root).folders:
            inner = _look_into(root / first)
            names |= {first} if inner.has_pictures else set()
            names |= {f"{first}/{second}" for second in inner.folders if _look_into(root / first / second).has_pictures}
    return [NO_DATASET, *sorted(names)]


def dataset_folder(name: str) -> Path:
    """The folder that a workflow names. One that is listed may be a link to another disk.

    Raises:
        PathError: the name leaves its folder, or no such folder is there.
    """
    if name in dataset_names():
        for root in _dataset_roots():
            if (path := root / name).is_dir():
                return path
    return first_inside(_dataset_roots(), name, folder=True)


def _look_into(folder: Path) -> _Contents:
    """The contents of a folder, remembered until its time changes: it may hold a hundred thousand files."""
    try:
        time_ns = folder.stat().st_mtime_ns
        remembered = _contents.get(folder)
        if remembered is not None and remembered[0] == time_ns:
            return remembered[1]
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
        folders = tuple(sorted(entry.name for entry in shown if _is_folder(entry)))
        contents = _Contents(folders, any(entry.name.lower().endswith(PICTURE_ENDINGS) for entry in shown))
    except OSError as error:
        log.debug("%s cannot be listed: %s", folder.name, error)
        return _Contents()
    if time.time_ns() - time_ns > _COARSEST_TIME_NS:  # otherwise a change in the same tick would never be seen
        _contents[folder] = (time_ns, contents)
    return contents


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _dataset_roots() -> list[Path]:
    extra = folder_paths.get_folder_paths("datasets") if "datasets" in folder_paths.folder_names_and_paths else []
    return [Path(folder_paths.get_input_directory()), *map(Path, extra)]
