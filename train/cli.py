"""The command line: one subcommand per job.

Exit codes: 0 done; 1 failed, with the reason on stderr and as event `failed`; 2 wrong settings; 3 stopped on request.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from .arguments import make_parser
from .config import EncodeConfig, FitConfig
from .events import EventWriter
from .imports import quiet_imports, quietly_imported
from .settings import ConfigError, load_settings, make_config

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 3

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows takes few letters; better a ? than no help text at all
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    args = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        return RUN[args.command](args)
    except ConfigError as error:
        log.error("%s", error)
        return USAGE
    except KeyboardInterrupt:
        return STOPPED


def _fit(args: argparse.Namespace) -> int:
    if args.dry_run:
        config = _config(args, FitConfig)

        def show() -> None:
            from .check import dry_run

            quietly_imported(".run.plan", __package__)
            sys.stdout.write(dry_run(config) + "\n")

        return _guarded(show, EventWriter(None), config)
    from .run.stop import Stopped, StopWatch

    watch = StopWatch(args.stop_file)
    if args.lifeline:
        watch.hold_lifeline()
    try:
        events = EventWriter.open(args.events)
    except OSError as error:
        raise ConfigError(f"the events cannot be written to {args.events}: {error.strerror or error}") from error
    try:
        config = _config(args, FitConfig)
    except ConfigError as error:
        events.emit("failed", reason="settings", message=str(error))
        raise

    def work() -> None:
        with quiet_imports():
            from .run.fit import fit

        with watch.signals():
            path = fit(config, events, watch)
        log.info("adapter written: %s", path)

    try:
        return _guarded(work, events, config)
    except Stopped:
        log.info("stopped on request; the same command goes on")
        if watch.orphaned:  # all is written; taking the interpreter down can take seconds that nobody waits for
            os._exit(STOPPED)
        return STOPPED
    finally:
        events.close()


def _encode(args: argparse.Namespace) -> int:
    config = _config(args, EncodeConfig)

    def work() -> None:
        with quiet_imports():
            from .data.encode import encode

        log.info("training cache written: %s", encode(config))

    return _guarded(work, EventWriter(None), None)


def _check(args: argparse.Namespace) -> int:
    # what is not known yet does not keep anybody from asking whether the machine is good enough
    no_data = args.no_data or (args.data is None and not args.settings)
    no_model = args.model is None and not args.settings
    unknown = {"run_dir": ".", **({"data": "none"} if no_data else {}), **({"model": "none"} if no_model else {})}
    config = _config(args, FitConfig, unknown)
    from .check import check, readable

    report = check(config, data=not no_data, model=not no_model)
    sys.stdout.write((json.dumps(report) if args.json else readable(report)) + "\n")
    return FAILED if report["problems"] else DONE


def _tool(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        def work() -> None:
            getattr(quietly_imported(f".{module}", __package__), name)(args)

        return _guarded(work, EventWriter(None), None)

    return run


def _guarded(work: Callable[[], Any], events: EventWriter, config: FitConfig | None) -> int:
    """Run `work`; a failure becomes a message, an event and exit code 1. What nobody foresaw keeps its traceback."""
    try:
        work()
        return DONE
    except ConfigError as error:
        events.emit("failed", reason="settings", message=str(error))
        raise
    except Exception as error:  # the last line of defence: logged, reported, and turned into exit code 1
        reason, message, expected = _explained(error, config)
        log.error("%s", message, exc_info=not expected)
        with suppress(OSError):  # the disk that the events are on may be the one that is full
            events.emit("failed", reason=reason, message=message)
        return FAILED


def _explained(error: Exception, config: FitConfig | None) -> tuple[str, str, bool]:
    try:
        with quiet_imports():
            from .failures import explained
    except ImportError:  # without torch, which is then what `error` is about
        fix = f'"{sys.executable}" -m train check says what to install'
        return "library", f"a package cannot be imported: {error}; {fix}", isinstance(error, ImportError)
    return explained(error, config)


def _config(args: argparse.Namespace, kind: Any, defaults: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Defaults, settings file, then flags."""
    file = load_settings(args.settings) if args.settings else {}
    flags = {
        setting.name: getattr(args, setting.name) for setting in fields(kind) if getattr(args, setting.name) is not None
    }
    return make_config(kind, defaults, file, flags)


RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "encode": _encode,
    "fit": _fit,
    "check": _check,
    "basis": _tool("tools", "basis"),
    "residual": _tool("tools", "residual"),
    "merge": _tool("tools", "merge_files"),
    "export": _tool("tools", "export"),
    "similarity": _tool("similarity", "similarity"),
    "sample": _tool("run.sample", "sample"),
}
