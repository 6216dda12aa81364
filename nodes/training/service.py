"""One training, from pictures to a published adapter: find out whether it was done, prepare, run, verify, name."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...qrlora_core import MergeRecipe, PathError, QRLoRAError, model_fingerprint, open_adapter
from ...train.config import TRAJECTORY_VERSION, EncodeConfig, FitConfig, as_table, make_config
from ...train.events import TrainEvent
from ..host import folders, session
from ..train_options import TrainOptions
from . import dataset, owner, preflight
from .jobs import Job
from .process import Child, ChildError, end_process, still_runs
from .runs import Run, choose_run, find_runs, key_of, publish, sha256
from .watch import Ending, EventFeed, TrainingError, duration, earlier_events, failure, last_lines, told, watch

log = logging.getLogger(__name__)

CACHES = "_cache"
_LONGEST_REASON = 8000  # characters: a page shows them, and the log has the rest
_ORPHAN_SECONDS = 15.0  # a trainer whose ComfyUI died ends by itself within five


@dataclass(frozen=True, slots=True)
class Request:
    """What one Train node was asked to do.

    Attributes:
        model: the base model's file.
        pictures: with captions.
        clip, vae: the graph's.
        output_name: of the adapter, inside `<output>/qrlora`.
        fit: fields of FitConfig that the node's own widgets hold.
        encode: resolution, buckets, flip, mask.
        options: the rest.
    """

    model: Path
    pictures: Sequence[dataset.Picture]
    clip: Any
    vae: Any
    output_name: str
    fit: dict[str, Any]
    encode: EncodeConfig
    options: TrainOptions

    def config(self, run: Path, data: Path) -> FitConfig:
        """The trainer's settings for a run folder."""
        paths = {
            "model": str(self.model),
            "data": str(data),
            "run_dir": str(run),
            "output": str(Run(run).adapter(self.fit["steps"])),
            "basis_cache": str(folders.bases_folder()),
            "name": Path(self.output_name).name.removesuffix(".safetensors"),
        }
        return make_config(FitConfig, self.options.fit_fields(session.card_memory()), self.fit, paths)


class Result(NamedTuple):
    """`path`: the published adapter. `trained`: False when it was there already."""

    run: Run
    path: Path
    trained: bool
    recipe: MergeRecipe


@contextlib.contextmanager
def reporting(job: Job) -> Iterator[None]:
    """Whatever ends the block early is told to the pages, in the words that the host shows, and raised again.

    Raises:
        Interrupted: Cancel or the stop button; the run can be gone on with.
    """
    try:
        yield
    except (preflight.Cancelled, session.Interrupted) as error:
        if job.active:
            job.tell("stopped", "stopped before the first step; queue again to go on")
        raise session.Interrupted() from error
    except Exception as error:
        if job.active:
            job.tell("failed", f"{type(error).__name__}: {error}"[:_LONGEST_REASON])
        raise


def train(request: Request, job: Job) -> Result:
    """Train, or find what the same inputs gave before.

    Raises:
        Interrupted, Cancelled: Cancel or the stop button.
        TrainingError, PreflightError, QRLoRAError, ConfigError: with the reason and what to do.
    """
    job.tell("preparing", "comparing with earlier runs")
    root, steps = folders.runs_folder(), int(request.fit["steps"])
    config = request.config(root, root)  # refuses wrong settings first
    empty_caption = config.caption_dropout > 0
    cache = dataset.cache_key(request.pictures, request.encode, request.clip, request.vae, empty_caption)
    identity = {**config.key_fields(), **config.trajectory(), "steps": None}
    key = key_of([identity, cache, model_fingerprint(request.model), request.options.processes, TRAJECTORY_VERSION])
    while True:
        found = _finished(root, key, steps)
        if found is not None:
            return _already(found, request, job)
        run = choose_run(root, request.output_name, key, steps, request.options.resume)
        with run.locked() as descriptor:
            if descriptor is not None and _finished(root, key, steps) is None:
                job.run = run.name
                data = root / CACHES / f"{cache}.safetensors"
                _fit(request, job, run, data, descriptor)
                return _result(run, request, trained=True)
        if descriptor is None:
            job.tell("preparing", "another ComfyUI trains just this; waiting for it")
            _pause(job, 1.0)


def _fit(request: Request, job: Job, run: Run, data: Path, lock: int) -> None:
    """Run the trainer in a locked folder until there is a checked adapter."""
    config, who = request.config(run.folder, data), owner.owner()
    _wait_for_orphan(run, job)
    run.write(run.settings, as_table(config))
    job.catch_up(earlier_events(run.events))
    job.tell("preparing", "checking the trainer's Python, the model, memory and disk")
    report = preflight.preflight(who, run.settings, run.log, lambda: _stopped(job))
    log.info("QR-LoRA: %s", preflight.summary(report))
    job.tell("preparing", f"encoding {len(request.pictures)} pictures with the graph's CLIP and VAE")
    dataset.encode(data, request.pictures, request.encode, request.clip, request.vae, config.caption_dropout > 0)
    if _stopped(job):
        raise session.Interrupted()
    session.free_models()
    if config.memory_check and config.device == "auto":
        preflight.require_memory(report, *session.memory())
    ending, started = _supervised(request, job, run, config, who, lock)
    message = failure(ending, run.log.name, run.checkpoint_step())
    if not message or not ending.asked:
        if message:
            raise TrainingError(message)
        digest = _verified(run, config, ending, started)
        run.record(config.steps, digest)
    if ending.asked:
        step = run.checkpoint_step()
        job.tell("stopped", f"stopped at step {ending.step}; queue again to go on from step {step}")
        raise session.Interrupted()


def _supervised(
    request: Request, job: Job, run: Run, config: FitConfig, who: owner.Owner, lock: int
) -> tuple[Ending, float]:
    """Start the trainer and stay with it."""
    run.set_aside(config.steps)
    run.stop.unlink(missing_ok=True)
    feed = EventFeed(run.events)
    arguments = ["fit", "--settings", str(run.settings), "--events", str(run.events)]
    arguments += ["--stop-file", str(run.stop), "--lifeline"]
    command = who.command(arguments, request.options.processes)
    log.info("QR-LoRA: training in %s", run.name)
    job.tell("running", "starting the trainer")
    try:
        child = Child(command, run.folder, run.log, owner.environment(), (lock,))
    except ChildError as error:
        raise TrainingError(str(error)) from error
    run.note_trainer(child.pid)
    reporter = _Reporter(job, config.steps)
    ending = watch(
        child,
        feed,
        stop_file=run.stop,
        stop_seconds=request.options.stop_seconds,
        silence_seconds=request.options.silence_seconds,
        cancelled=session.take_interrupt,
        stop_asked=lambda: job.stop_requested,
        news=reporter.news,
    )
    run.stop.unlink(missing_ok=True)
    return ending, child.started


class _Reporter:
    """Passes what the trainer reports on to the page and to ComfyUI's progress bar."""

    def __init__(self, job: Job, steps: int) -> None:
        self._job, self._steps = job, steps
        self._bar = session.Progress()
        self._stopping = False

    def news(self, events: Sequence[TrainEvent], stopping: bool) -> None:
        if not events and stopping == self._stopping:
            return
        self._stopping = stopping
        text = told(events[-1]) if events else self._job.text
        if stopping:
            text = "stopping: the trainer writes a checkpoint; Cancel again ends it now"
        self._job.tell("stopping" if stopping else "running", text, events)
        if events and not stopping:
            self._show(events)

    def _show(self, events: Sequence[TrainEvent]) -> None:
        """The bar alone: a picture beside it would make the node grow, and the panel shows the samples already."""
        steps = [event for event in events if event.kind in ("step", "sample")]
        last = (steps or events)[-1]  # what comes after the last step in the same batch would hide it
        if steps:
            self._bar.show(last.data["step"], self._steps)
        elif last.kind == "phase" and last.data["total"]:
            self._bar.show(last.data["done"], last.data["total"])


def _verified(run: Run, config: FitConfig, ending: Ending, started: float) -> str:
    """SHA-256 of the adapter that this very start wrote.

    Raises:
        TrainingError: it is missing, older, not what was reported, incomplete, or holds NaN.
    """
    path, data = run.adapter(config.steps), ending.last["finished"].data
    problem = ""
    digest = ""
    if not path.is_file() or (run.folder / data["file"]).resolve() != path.resolve():
        problem = f"it reports {data['file']!r}, and {path.name} is {'there' if path.is_file() else 'missing'}"
    elif path.stat().st_mtime < started - 2.0:
        problem = f"{path.name} is older than this start"
    elif (digest := sha256(path)) != data["sha256"]:
        problem = f"{path.name} is not the file that was reported (another checksum)"
    else:
        problem = adapter_problem(path, config)
    if problem:
        raise TrainingError(f"The trainer says that it finished, but {problem}.\n{last_lines(run.log.name, ending)}")
    return digest


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
    return "" if adapter.layers else f"{path.name} holds no layer"


def _finished(root: Path, key: str, steps: int) -> Run | None:
    """The run that has a checked adapter of so many steps, still as it was checked."""
    return next((run for run in find_runs(root, key) if _source(run, steps) is not None), None)


def _source(run: Run, steps: int) -> Path | None:
    """A file with the checked adapter's content, in the run folder or under a published name."""
    digest = run.finished(steps)
    names = run.results().get(str(steps), {}).get("published", {}).values() if digest else ()
    places = [run.adapter(steps), *(folders.results_folder() / name for name in names)]
    return next((path for path in places if digest and path.is_file() and sha256(path) == digest), None)


def _already(run: Run, request: Request, job: Job) -> Result:
    job.run = run.name
    job.catch_up(earlier_events(run.events))
    return _result(run, request, trained=False)


def _result(run: Run, request: Request, trained: bool) -> Result:
    """Publish under the wanted name, unless it is there already."""
    steps, folder = int(request.fit["steps"]), folders.results_folder()
    source, digest = _source(run, steps), run.finished(steps)
    if source is None:
        raise PathError(f"the adapter in {run.name} disappeared or was changed while it was read")
    name = run.results()[str(steps)]["published"].get(request.output_name, "")
    path = folder / name
    if not name or not path.is_file() or sha256(path) != digest:
        path = publish(source, folder, request.output_name)
        name = path.relative_to(folder.resolve()).as_posix()
        run.record(steps, digest, {request.output_name: name})
    folders.forget_names()
    return Result(run, path, trained, MergeRecipe.of(open_adapter(path)))


def _wait_for_orphan(run: Run, job: Job) -> None:
    """Let the trainer of a ComfyUI that died write its checkpoint, before another one starts in the same folder."""
    noted = run.earlier_trainer()
    until = time.monotonic() + _ORPHAN_SECONDS
    while noted is not None and time.monotonic() < until and still_runs(*noted):
        job.tell("preparing", "an earlier trainer is still writing its checkpoint")
        _pause(job, 0.5)
    if noted is not None and end_process(*noted):
        log.warning("QR-LoRA: ended the trainer of an earlier ComfyUI (process %d)", noted[0])


def _stopped(job: Job) -> bool:
    return session.take_interrupt() or job.stop_requested


def _pause(job: Job, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if _stopped(job):
            raise session.Interrupted()
        time.sleep(0.1)


def finished_text(result: Result, job: Job) -> str:
    """One line about how it ended."""
    steps = job.steps()
    if not result.trained:
        return f"already trained: {result.path.name}"
    if not steps:
        return f"finished: {result.path.name}"
    last = steps[-1]
    seconds = last["step"] * sum(one["seconds"] for one in steps) / len(steps)  # of many steps a part is kept
    loss = last["smoothed_loss"]
    return f"finished: {result.path.name}, {last['step']} steps in {duration(seconds)}, loss {loss:.4f}"
