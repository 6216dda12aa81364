"""The subcommand `similarity`: how alike two adapters are, as JSON and as a picture."""

import argparse
import json
import logging
import os
import uuid
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from qrlora_core import PathError, open_adapter, similarity_report
from qrlora_plots import PlotsUnavailableError, head_lines, similarity_png

from .errors import TrainError

log = logging.getLogger(__name__)


def similarity(args: argparse.Namespace) -> None:
    """Compare two adapters layer by layer; without matplotlib there is the JSON only, and a note that says so.

    Raises:
        TrainError: reason "settings": the output is no .json file.
        PathError: a file exists already or cannot be written.
        QRLoRAError: the adapters cannot be read or have no layer in common.
    """
    output: Path = args.output
    if output.suffix.lower() != ".json":
        raise TrainError("settings", f"--output is a .json file, not {output.name}; the picture goes beside it")
    picture = output.with_suffix(".png")
    for path in (output, picture):
        if path.exists():
            raise PathError(f"{path.name} exists already; choose another name")
    first, second = open_adapter(args.first), open_adapter(args.second)
    report = similarity_report(first, second, lambda names: tqdm(names, desc="comparing"))
    _write(output, json.dumps(report, indent=1).encode())
    for line in head_lines(report):
        log.info("%s", line)
    log.info("numbers of every layer: %s", output)
    try:
        _write(picture, similarity_png(report, fixed_scale=args.fixed_scale))
        log.info("picture: %s", picture)
    except PlotsUnavailableError as error:
        log.warning("no picture: %s", error)


def _write(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f".qrlora-{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise PathError(f"{path.name} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
