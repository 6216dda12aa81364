"""One training, from pictures to a published adapter: find out whether it was done, prepare, run, verify, name."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence

from ...train.config import FitConfig, as_table
from ...train.events import TrainEvent
from ..host import folders, session
from ..host.base_format import base_format
from . import dataset, owner, preflight, results
from .feed import EventFeed, earlier_events
from .jobs import Job
from .process import Child, ChildError, end_process, still_runs
from .request import Request
from .results import Trained
from .runs import RunFolder, choose_run
from .watch import Ending, watch
from .wording import TrainingError, describe, failure, spoken_duration

log = logging.getLogger(__name__)

CACHES = "_cache"
_LONGEST_REASON = 8000  # characters: a page shows them, and the log has the rest
_ORPHAN_SECONDS = 15.0  # a trainer whose ComfyUI died ends by itself within five


@contextlib.contextmanager
def reporting(job: Job) -> Iterator[None]:
    """Whatever ends the block early is reported to the pages, in the words that the host shows, and raised again.

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


def train(request: Request, job: Job) -> Trained:
    """Train, or find what the same inputs gave before.

    Raises:
        Interrupted, Cancelled: Cancel or the stop button.
        TrainingError, PreflightError, QRLoRAError, ConfigError: with the reason and what to do.
    """
    job.warnings = list(request.warnings)
    job.tell("preparing", "comparing with earlier runs")
    root, steps = folders.runs_folder(), request.steps
    config = request.config(root, root)  # refuses wrong settings first
    data_key = dataset.cache_key(
        request.pictures, request.encode, request.clip, request.vae, config.caption_dropout > 0
    )
    key = request.run_key(config, data_key)
    while True:
        finished = results.finished_run(root, key, steps)
        if finished is not None:
            job.run = finished.name
            job.catch_up(earlier_events(finished.events))
            return results.published(finished, steps, request.output_name, request.folder, is_new=False)
        run = choose_run(root, request.output_name, key, steps, request.options.resume)
        with run.locked() as lock:
            if lock is not None and results.finished_run(root, key, steps) is None:
                job.run = run.name
                _fit(request, job, run, data_key, lock)
                return results.published(run, steps, request.output_name, request.folder, is_new=True)
        if lock is None:
            job.tell("preparing", "another ComfyUI trains just this; waiting for it")
            _pause(job, 1.0)


def _fit(request: Request, job: Job, run: RunFolder, data_key: str, lock: int) -> None:
    """Run the trainer in a locked folder until there is a checked adapter."""
    data = folders.runs_folder() / CACHES / f"{data_key}.safetensors"
    config, who = request.config(run.folder, data), owner.owner()
    _wait_for_orphan(run, job)
    run.write(run.settings, as_table(config))
    job.catch_up(earlier_events(run.events))
    job.tell("preparing", "checking the trainer's Python, the model, memory and disk")
    report = preflight.preflight(who, run.settings, run.log, lambda: _stop_asked(job))
    log.info("QR-LoRA: %s", preflight.summary(report))
    graph = dataset.Encoders(request.clip, request.vae, base_format(request.model), preflight.taken(report))
    job.tell("preparing", f"encoding {len(request.pictures)} pictures with the graph's CLIP and VAE")
    dataset.encode(data, request.pictures, request.encode, graph, config.caption_dropout > 0, config.trigger)
    if _stop_asked(job):
        raise session.Interrupted()
    session.free_models()
    if config.memory_check and config.device == "auto":
        preflight.require_memory(report, *session.memory())
    ending = _supervised(request, job, run, config, who, lock)
    message = failure(ending, run.log.name, run.checkpoint_step())
    if message and not ending.asked:
        raise TrainingError(message)
    if not message:
        run.record(config.steps, results.verified(run, config, ending))
    if ending.asked:
        step = run.checkpoint_step()
        job.tell("stopped", f"stopped at step {ending.step}; queue again to go on from step {step}")
        raise session.Interrupted()


def _supervised(request: Request, job: Job, run: RunFolder, config: FitConfig, who: owner.Owner, lock: int) -> Ending:
    """Start the trainer and stay with it."""
    run.set_aside(config.steps)
    run.stop.unlink(missing_ok=True)
    feed, reporter = EventFeed(run.events), _Reporter(job, config.steps)
    arguments = ["fit", "--settings", str(run.settings), "--events", str(run.events)]
    arguments += ["--stop-file", str(run.stop), "--lifeline"]
    command = who.command(arguments, request.options.processes)
    log.info("QR-LoRA: training in %s", run.name)
    job.tell("running", "starting the trainer")
    try:
        child = Child(command, run.folder, run.log, owner.environment(), (lock,))
    except ChildError as error:
        raise TrainingError(str(error)) from error
    try:
        run.note_trainer(child.pid)
        return watch(
            child,
            feed,
            stop_file=run.stop,
            stop_seconds=request.options.stop_seconds,
            silence_seconds=request.options.silence_seconds,
            cancelled=session.take_interrupt,
            stop_asked=lambda: job.stop_requested,
            news=reporter.news,
        )
    finally:  # nothing that goes wrong from the start of the process on may leave it running
        child.end()
        with contextlib.suppress(OSError):
            run.stop.unlink(missing_ok=True)


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
        text = describe(events[-1]) if events else self._job.text
        if stopping:
            text = "stopping: the trainer writes a checkpoint; Cancel again ends it now"
        self._job.tell("stopping" if stopping else "running", text, events)
        if events and not stopping:
            steps = [event for event in events if event.kind in ("step", "sample")]
            self._show((steps or events)[-1])  # what comes after the last step in the same batch would hide it

    def _show(self, event: TrainEvent) -> None:
        """The bar alone: a picture beside it would make the node grow, and the panel shows the samples already."""
        if event.kind in ("step", "sample"):
            self._bar.show(event.data["step"], self._steps)
        elif event.kind == "phase" and event.data["total"]:
            self._bar.show(event.data["done"], event.data["total"])


def _wait_for_orphan(run: RunFolder, job: Job) -> None:
    """Let the trainer of a ComfyUI that died write its checkpoint, before another one starts in the same folder."""
    noted = run.earlier_trainer()
    until = time.monotonic() + _ORPHAN_SECONDS
    while noted is not None and time.monotonic() < until and still_runs(*noted):
        job.tell("preparing", "an earlier trainer is still writing its checkpoint")
        _pause(job, 0.5)
    if noted is not None and end_process(*noted):
        log.warning("QR-LoRA: ended the trainer of an earlier ComfyUI (process %d)", noted[0])


def _stop_asked(job: Job) -> bool:
    return session.take_interrupt() or job.stop_requested


def _pause(job: Job, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if _stop_asked(job):
            raise session.Interrupted()
        time.sleep(0.1)


def finished_text(trained: Trained, job: Job) -> str:
    """One line about how it ended."""
    steps = job.steps()
    file = f"{trained.path.name} in {'/'.join(trained.path.parent.parts[-2:])}"
    if not trained.is_new:
        return f"already trained: {file}"
    if not steps:
        return f"finished: {file}"
    last = steps[-1]
    seconds = last["step"] * sum(step["seconds"] for step in steps) / len(steps)  # of many steps a part is kept
    loss = last["smoothed_loss"]
    return f"finished: {file}, {last['step']} steps in {spoken_duration(seconds)}, loss {loss:.4f}"
