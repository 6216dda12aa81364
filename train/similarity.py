"""The subcommand `similarity`: how alike two adapters are, as JSON and as a picture."""

import argparse
import json
import logging
from pathlib import Path

from tqdm import tqdm

from qrlora_core import open_adapter, require_free_name, similarity_report, whole_file
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
        require_free_name(path)
    first, second = open_adapter(args.first), open_adapter(args.second)
    report = similarity_report(first, second, lambda names: tqdm(names, desc="comparing"))
    with whole_file(output) as file:
        file.write(json.dumps(report, indent=1).encode())
    for line in head_lines(report):
        log.info("%s", line)
    log.info("numbers of every layer: %s", output)
    try:
        drawn = similarity_png(report, fixed_scale=args.fixed_scale)
    except PlotsUnavailableError as error:
        log.warning("no picture: %s", error)
        return
    with whole_file(picture) as file:
        file.write(drawn)
    log.info("picture: %s", picture)
