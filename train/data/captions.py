"""Which files of a data set are pictures, and which caption each of them has.

Standard library only: the ComfyUI node and the trainer's `encode` follow these very rules, so that a folder means the
same to both.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")
CAPTION_ENDING = ".txt"
TRIGGER_PLACEHOLDER = "[trigger]"
DEFAULT_PROMPT = "a photo of a [trigger] dog"


class DatasetError(ValueError):
    """A picture or caption is missing, cannot be read, or contradicts the settings.

    Attributes:
        reason: "data" or "settings", as in `train.events.REASONS`.
    """

    def __init__(self, message: str, reason: Literal["data", "settings"] = "data") -> None:
        super().__init__(message)
        self.reason = reason


def is_picture_file(path: Path) -> bool:
    """Whether a file's name says that it is a picture.

    Hidden files are none: macOS leaves a `._dog.jpg` beside every `dog.jpg` on foreign disks. A link that leads nowhere
    is one, so that reading it says what is wrong instead of leaving it out in silence.
    """
    if path.name.startswith(".") or path.suffix.lower() not in PICTURE_ENDINGS:
        return False
    return path.is_file() or is_dangling(path)


def is_dangling(path: Path) -> bool:
    """Whether this is a link that leads nowhere."""
    return path.is_symlink() and not path.exists()


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder, not deeper, in order of their names.

    Raises:
        DatasetError: there is none.
    """
    files = sorted(path for path in folder.iterdir() if is_picture_file(path))
    if not files:
        raise DatasetError(f"no pictures in the folder {folder.name}; known endings: {' '.join(PICTURE_ENDINGS)}")
    return files


def caption_of(picture: Path, prompt: str, trigger: str, *, source: Literal["auto", "files", "prompt"] = "auto") -> str:
    """The caption of a picture: the text file of its name beside it, or else the instance prompt.

    Args:
        picture: the picture's file.
        prompt: the instance prompt, with or without `[trigger]`.
        trigger: what `[trigger]` stands for.
        source: "files": the text file has to be there; "prompt": it is not looked at.

    Raises:
        DatasetError: the text file is not UTF-8, there is no caption, or it holds `[trigger]` and there is no trigger.
    """
    text_file = picture.with_suffix(CAPTION_ENDING)
    caption = prompt
    if source != "prompt" and text_file.is_file():
        try:
            caption = text_file.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise DatasetError(f"the caption {text_file.name} cannot be read as UTF-8 text: {error}") from error
    elif source == "files":
        raise DatasetError(f"{picture.name} has no caption: write {text_file.name} beside it, or set captions to auto")
    if not caption.strip():
        raise DatasetError(
            f"{picture.name} has no caption: write {text_file.name} beside it, or give an instance_prompt"
        )
    return with_trigger(caption.strip(), trigger)


def with_trigger(text: str, trigger: str) -> str:
    """A prompt or caption with the trigger word in the place of `[trigger]`.

    Raises:
        DatasetError: reason "settings": it holds `[trigger]`, and the trigger is empty; or what comes out is not
            Unicode text (a lone surrogate), which no tokenizer and no file could take.
    """
    if TRIGGER_PLACEHOLDER in text and not trigger.strip():
        raise DatasetError(
            f"{text!r} holds {TRIGGER_PLACEHOLDER}, but trigger is not set: give one, or take the word out", "settings"
        )
    replaced = text.replace(TRIGGER_PLACEHOLDER, trigger.strip())
    if any(0xD800 <= ord(letter) < 0xE000 for letter in replaced):
        raise DatasetError(f"{replaced!r} is not valid Unicode text: retype it", "settings")
    return replaced


def caption_warnings(captions: Iterable[str], trigger: str) -> list[str]:
    """What is probably not meant, in sentences: a trigger that no caption holds is never learned."""
    listed = list(captions)
    if trigger.strip() and listed and not any(trigger.strip() in caption for caption in listed):
        return [
            f"no caption holds the trigger {trigger.strip()!r}, so it will call nothing: write {TRIGGER_PLACEHOLDER} "
            f"where it belongs, as in {DEFAULT_PROMPT!r}"
        ]
    return []


def folder_version(folder: Path) -> str:
    """Sixteen hex digits that change when a picture or caption of the folder does, by name, size and time."""
    files = sorted(
        path
        for path in folder.iterdir()
        if is_picture_file(path) or (path.suffix.lower() == CAPTION_ENDING and path.is_file())
    )
    status = [(path, path.lstat() if is_dangling(path) else path.stat()) for path in files]
    listed = [(path.name, state.st_size, state.st_mtime_ns) for path, state in status]
    return hashlib.sha256(repr(listed).encode(errors="surrogateescape")).hexdigest()[:16]
