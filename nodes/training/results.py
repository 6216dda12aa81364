"""The finished adapter: found again, verified once, published under the name that the node asks for."""

from pathlib import Path
from typing import NamedTuple

import torch

from ...qrlora_core import MergeRecipe, PathError, QRLoRAError, open_adapter
from ...train.config import FitConfig
from ..host import folders
from .publish import checksum, publish
from .runs import RunFolder, find_runs
from .watch import Ending
from .wording import TrainingError, last_lines


class Trained(NamedTuple):
    """What one execution of a Train node came to.

    Attributes:
        run: the run folder.
        path: the published adapter.
        is_new: False when it was there already.
        recipe: the adapter, opened.
    """

    run: RunFolder
    path: Path
    is_new: bool
    recipe: MergeRecipe


def verified(run: RunFolder, config: FitConfig, ending: Ending) -> str:
    """SHA-256 of the adapter that this very start wrote.

    An adapter of an earlier start was set aside before, so that the checksum in the trainer's report is proof enough,
    whatever the clocks of the disk and of this machine say.

    Raises:
        TrainingError: it is missing, not what was reported, incomplete, or holds NaN.
    """
    path, reported = run.adapter(config.steps), ending.last["finished"].data
    if not path.is_file() or (run.folder / reported["file"]).resolve() != path.resolve():
        state = "there" if path.is_file() else "missing"
        problem = f"it reports {reported['file']!r}, and {path.name} is {state}"
    elif checksum(path) != reported["sha256"]:
        problem = f"{path.name} is not the file that was reported (another checksum)"
    else:
        problem = adapter_problem(path, config)
    if problem:
        raise TrainingError(f"The trainer says that it finished, but {problem}.\n{last_lines(run.log.name, ending)}")
    return checksum(path)


def adapter_problem(path: Path, config: FitConfig) -> str:
    """What is wrong with a trained adapter, "" when nothing is: format, rank, every number of every layer."""
    try:
        adapter = open_adapter(path)
        if adapter.rank not in (config.rank, 2 * config.rank):  # the portable form of full QR has twice the rank
            return f"{path.name} has rank {adapter.rank} instead of {config.rank}"
        for name in adapter.layers:
            layer = adapter.layer(name)
            if not (torch.isfinite(layer.up).all() and torch.isfinite(layer.down).all()):
                return f"{path.name} holds NaN or Inf at {name}"
    except QRLoRAError as error:
        return str(error)
    return ""


def finished_run(root: Path, key: str, steps: int) -> RunFolder | None:
    """The run that has a checked adapter of so many steps, still as it was checked."""
    return next((run for run in find_runs(root, key) if checked_file(run, steps) is not None), None)


def checked_file(run: RunFolder, steps: int) -> Path | None:
    """A file with the checked adapter's content, in the run folder or under a published name."""
    result = run.results().get(steps)
    if result is None:
        return None
    places = [run.adapter(steps), *map(_published_path, result.published.items())]
    return next((path for path in places if path.is_file() and checksum(path) == result.sha256), None)


def published(run: RunFolder, steps: int, name: str, place: str = folders.RESULTS, *, is_new: bool) -> Trained:
    """Give the checked adapter the wanted name in a folder (see `folders.PLACES`), unless it has it already.

    Raises:
        PathError: the adapter disappeared meanwhile, or the name cannot be written.
    """
    folder, result = folders.place(place), run.results().get(steps)
    source = checked_file(run, steps)
    if source is None or result is None:
        raise PathError(f"the adapter in {run.name} disappeared or was changed while it was read")
    wanted = name if place == folders.RESULTS else f"{place}:{name}"  # no file name holds a colon
    path = folder / result.published.get(wanted, "")
    if not path.is_file() or checksum(path) != result.sha256:
        path = publish(source, folder, name)
        run.record(steps, result.sha256, {wanted: path.relative_to(folder.resolve()).as_posix()})
    folders.forget_names(folders.PLACES[place] or folders.FOLDER)
    return Trained(run, path, is_new, MergeRecipe.of(open_adapter(path)))


def _published_path(entry: tuple[str, str]) -> Path:
    """Where a published adapter lies, by an entry of `Result.published`."""
    wanted, file = entry
    place = wanted.partition(":")[0]
    return folders.place(place if place in folders.PLACES else folders.RESULTS) / file
