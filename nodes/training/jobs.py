"""The trainings that this server runs or has run: what a page needs that is opened in the middle of one."""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

from ...train.events import TrainEvent

log = logging.getLogger(__name__)

MESSAGE = "qrlora.train"
STATES = ("preparing", "running", "stopping", "finished", "stopped", "failed")
_KEPT_JOBS = 20
_KEPT_STEPS = 2000


class Job:
    """One run of a Train node. Its own thread writes, the server's thread reads.

    Attributes:
        node: the node's id as text, "1:2:3" in a subgraph.
        prompt_id: of the queue entry, None where the host does not say.
        run: name of the run folder.
        state: one of STATES.
        text: for people; one line, but for the reason of a failure.
        warnings: what is probably not meant, in sentences.
    """

    def __init__(self, node: str, prompt_id: str | None, send: Callable[[str, dict[str, Any]], None]) -> None:
        self.node, self.prompt_id, self.run = node, prompt_id, ""
        self.state, self.text = "preparing", ""
        self.warnings: list[str] = []
        self._send = send
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._steps: dict[int, dict[str, Any]] = {}
        self._stride = 1
        self._last: dict[str, dict[str, Any]] = {}
        self._samples: list[int] = []
        self._validation: dict[int, dict[str, Any]] = {}

    @property
    def active(self) -> bool:
        return self.state in ("preparing", "running", "stopping")

    @property
    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def request_stop(self) -> None:
        """Ask for a checkpoint and the end; the node sees it within a fifth of a second."""
        self._stop.set()

    def remember(self, events: Iterable[TrainEvent]) -> list[dict[str, Any]]:
        """Take events in, and return them as plain values."""
        raw = [{"event": event.kind, "time": event.time, **event.data} for event in events]
        with self._lock:
            for event in raw:
                kind, step = event["event"], event.get("step")
                if kind == "step":
                    self._add_step(event)
                    continue
                if kind == "started":  # what came after the checkpoint is done again
                    first = event["first_step"]
                    self._steps = {at: earlier for at, earlier in self._steps.items() if at <= first}
                    self._validation = {at: earlier for at, earlier in self._validation.items() if at <= first}
                if kind == "validation":
                    self._validation[event["step"]] = event
                    while len(self._validation) > _KEPT_STEPS:
                        del self._validation[next(iter(self._validation))]
                    continue
                if kind == "sample" and step not in self._samples:
                    self._samples.append(event["step"])
                self._last[kind] = event
        return raw

    def _add_step(self, event: dict[str, Any]) -> None:
        """Keep every `stride`-th step and the newest, at most `_KEPT_STEPS`: all that is drawn and sent of a run."""
        newest = next(reversed(self._steps), 1)
        if (newest - 1) % self._stride:
            del self._steps[newest]
        self._steps[event["step"]] = event
        while len(self._steps) > _KEPT_STEPS:
            self._stride *= 2
            kept = ((at, step) for at, step in self._steps.items() if (at - 1) % self._stride == 0 or step is event)
            self._steps = dict(kept)

    def steps(self) -> list[dict[str, Any]]:
        """Step events in order, thinned evenly when there are many; of a step that was done twice the later one."""
        with self._lock:
            return [self._steps[step] for step in sorted(self._steps)]

    def validation(self) -> list[dict[str, Any]]:
        """Validation events in order."""
        with self._lock:
            return [self._validation[step] for step in sorted(self._validation)]

    def catch_up(self, events: Iterable[TrainEvent]) -> None:
        """Remember what an earlier start of the same run did, and send all of it to the pages, thinned."""
        self.remember(events)
        self._send(MESSAGE, self.summary())

    def tell(self, state: str, text: str, events: Iterable[TrainEvent] = ()) -> None:
        """Remember, and tell every open page."""
        raw = self.remember(events)
        self.state, self.text = state, text
        message = {
            "node": self.node,
            "prompt_id": self.prompt_id,
            "run": self.run,
            "state": state,
            "events": raw,
            "text": text,
            "warnings": self.warnings,
        }
        self._send(MESSAGE, message)

    def summary(self) -> dict[str, Any]:
        """What a page needs to draw all of it: the steps that are kept, the validation, the last event of others."""
        steps = self.steps() + self.validation()
        with self._lock:
            others = list(self._last.values())
            samples = [f"step-{step:08}" for step in sorted(self._samples)]
        return {
            "node": self.node,
            "prompt_id": self.prompt_id,
            "run": self.run,
            "state": self.state,
            "text": self.text,
            "warnings": self.warnings,
            "events": sorted(steps + others, key=lambda event: event["time"]),
            "samples": samples,
        }


class Jobs:
    """The newest twenty jobs of this process."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._lock = threading.Lock()

    def start(self, node: str, prompt_id: str | None, send: Callable[[str, dict[str, Any]], None]) -> Job:
        """A new job, in place of the node's last one."""
        job = Job(node, prompt_id, send)
        with self._lock:
            self._jobs = [other for other in self._jobs if other.active or other.node != node][1 - _KEPT_JOBS :] + [job]
        return job

    def all(self) -> list[Job]:
        with self._lock:
            return list(self._jobs)

    def request_stop(self, node: str) -> bool:
        """Ask the running job of a node to stop; whether there is one."""
        running = [job for job in self.all() if job.node == node and job.active]
        for job in running:
            job.request_stop()
        return bool(running)


JOBS = Jobs()
