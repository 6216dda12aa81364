"""The command line: one subcommand per job, flags made from the settings' own help texts.

Exit codes: 0 done; 1 failed, with the reason on stderr and as event `failed`; 2 wrong settings; 3 stopped on request.
"""

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_origin

from .config import ConfigError, EncodeConfig, FitConfig, as_table, choices, load_settings, make_config
from .events import EventWriter

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 3

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except ConfigError as error:
        log.error("%s", error)
        return USAGE
    except KeyboardInterrupt:
        return STOPPED


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train and handle QR-LoRA adapters of FLUX.1. Nothing is ever downloaded. A first run:\n"
        '  python -m train encode --pipeline FLUX.1-dev --pictures dog.jpg --instance-prompt "a photo of a <c> dog" '
        "--output dog.cache.safetensors\n"
        "  python -m train fit --model flux1-dev.safetensors --data dog.cache.safetensors --run-dir runs/dog",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = _command(commands, "encode", "pictures and captions -> training cache", _encode)
    _add_settings(one, EncodeConfig)
    one = _command(commands, "fit", "training cache and base model -> adapter", _fit)
    _add_settings(one, FitConfig)
    _add_channel(one)
    one.add_argument("--dry-run", action="store_true", help="print settings, memory estimate and layers, then end")
    one = _command(commands, "check", "can this machine train? versions, device, memory, model; in seconds", _check)
    _add_settings(one, FitConfig)
    one.add_argument("--no-data", action="store_true", help="the training cache does not exist yet")
    one.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    _add_tools(commands)
    return parser


def _add_tools(commands: Any) -> None:
    """Subcommands that do not train."""
    one = _command(commands, "basis", "decompose a base model and keep Q and R", _tool("tools", "basis"))
    _add_model(one)
    one.add_argument("--output", type=Path, required=True, help="folder for the basis file, as basis_cache of fit")
    one = _command(commands, "residual", "base model -> residual file of 10-21 GB", _tool("tools", "residual"))
    _add_model(one)
    one.add_argument("--adapter", type=Path, help="use this adapter's own Q and R instead of decomposing")
    one.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the file")
    one.add_argument("--output", type=Path, required=True, help="the file to write; must not exist")
    one = _command(commands, "merge", "alpha * style + beta * content -> one adapter", _tool("tools", "merge_files"))
    one.add_argument("--style", type=Path, required=True, help="adapter file")
    one.add_argument("--alpha", type=float, default=1.0, help="how much style")
    one.add_argument("--content", type=Path, required=True, help="adapter file")
    one.add_argument("--beta", type=float, default=1.0, help="how much content")
    one.add_argument("--on-basis-mismatch", choices=("stack", "align", "raise"), default="stack", help="see the README")
    _add_adapter_output(one)
    one = _command(commands, "export", "adapter -> the other format, or a standard LoRA", _tool("tools", "export"))
    one.add_argument("--adapter", type=Path, required=True, help="adapter file")
    one.add_argument("--strength", type=float, default=1.0, help="a factor for all of it")
    _add_adapter_output(one)
    one = _command(
        commands, "similarity", "how alike two adapters are -> JSON and picture", _tool("similarity", "similarity")
    )
    one.add_argument("first", type=Path, help="adapter file")
    one.add_argument("second", type=Path, help="adapter file")
    one.add_argument("--output", type=Path, required=True, help="a .json file; a .png of the same name goes beside it")
    one.add_argument("--fixed-scale", action="store_true", help="cosines from -1 to 1, so that pictures compare")
    one = _command(commands, "sample", "pictures over lists of alpha and beta", _tool("sample", "sample"))
    one.add_argument("--pipeline", type=Path, required=True, help="local diffusers FLUX folder")
    one.add_argument("--style", type=Path, help="adapter file")
    one.add_argument("--content", type=Path, help="adapter file")
    one.add_argument("--alphas", type=float, nargs="+", default=[1.0], help="strengths of the style")
    one.add_argument("--betas", type=float, nargs="+", default=[1.0], help="strengths of the content")
    one.add_argument("--prompts", nargs="+", required=True, help="one or more prompts")
    one.add_argument("--seeds", type=int, nargs="+", default=[0], help="one or more seeds")
    one.add_argument("--steps", type=int, default=28, help="sampling steps")
    one.add_argument("--guidance", type=float, default=3.5, help="distilled guidance")
    one.add_argument("--width", type=int, default=1024, help="of the pictures")
    one.add_argument("--height", type=int, default=1024, help="of the pictures")
    one.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the pipeline")
    one.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    one.add_argument("--offload", action="store_true", help="keep in RAM what is not in use")
    one.add_argument("--output", type=Path, required=True, help="folder for the pictures")


def _fit(args: argparse.Namespace) -> int:
    config = _config(args, FitConfig)
    if args.dry_run:
        from .check import dry_run

        return _guarded(lambda: sys.stdout.write(dry_run(config) + "\n"), EventWriter(None), config)
    from .watch import Stopped, StopWatch

    watch = StopWatch(args.stop_file)
    if args.lifeline:
        watch.hold_lifeline()
    events = EventWriter.open(args.events)

    def work() -> None:
        from .fit import fit

        with watch.signals():
            path = fit(config, events, watch)
        log.info("adapter written: %s", path)

    try:
        return _guarded(work, events, config)
    except Stopped:
        log.info("stopped on request; the same command goes on")
        return STOPPED


def _encode(args: argparse.Namespace) -> int:
    config = _config(args, EncodeConfig)

    def work() -> None:
        from .encode import encode

        log.info("training cache written: %s", encode(config))

    return _guarded(work, EventWriter(None), None)


def _check(args: argparse.Namespace) -> int:
    config = _config(args, FitConfig)
    from .check import check, readable

    found = check(config, data=not args.no_data)
    sys.stdout.write((json.dumps(found) if args.json else readable(found)) + "\n")
    return FAILED if found["problems"] else DONE


def _tool(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        def work() -> None:
            getattr(importlib.import_module(f".{module}", __package__), name)(args)

        return _guarded(work, EventWriter(None), None)

    return run


def _guarded(work: Callable[[], Any], events: EventWriter, config: FitConfig | None) -> int:
    """Run `work`; a failure becomes a message, an event and exit code 1. What nobody foresaw keeps its traceback."""
    try:
        work()
        return DONE
    except ConfigError:
        raise
    except Exception as error:  # the last line of defence: logged, reported, and turned into exit code 1
        from .failures import explained

        reason, message, expected = explained(error, config)
        log.error("%s", message, exc_info=not expected)
        with suppress(OSError):  # the disk that the events are on may be the one that is full
            events.emit("failed", reason=reason, message=message)
        return FAILED


def _config(args: argparse.Namespace, kind: Any) -> Any:
    """Settings file, then flags."""
    file = load_settings(args.settings) if args.settings else {}
    flags = {one.name: getattr(args, one.name) for one in fields(kind) if getattr(args, one.name) is not None}
    return make_config(kind, file, flags)


def _command(commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    one: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one.set_defaults(run=run)
    return one


def _add_settings(parser: argparse.ArgumentParser, kind: Any) -> None:
    """`--settings`, and one flag per setting. A flag that is not given is None, so that a file's value stays."""
    parser.add_argument("--settings", type=Path, help="a .toml or .json file with settings; flags win over it")
    for one in fields(kind):
        flag, text = f"--{one.name.replace('_', '-')}", one.metadata["help"]
        if one.default is not MISSING and one.default != "" and one.default != ():
            text += f" (default: {one.default})"
        text = text.replace("%", "%%")
        options: dict[str, Any] = {"dest": one.name, "default": None, "help": text}
        allowed = choices(one)
        if one.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif allowed is not None:
            parser.add_argument(flag, choices=allowed, **options)
        elif get_origin(one.type) is tuple:
            parser.add_argument(flag, nargs="+", metavar="NAME", **options)
        else:
            parser.add_argument(
                flag, type=one.type, metavar=str(getattr(one.type, "__name__", one.type)).upper(), **options
            )


def _add_channel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", default="", help="append events as JSON lines to this file; - is standard output")
    parser.add_argument("--stop-file", type=Path, help="when this file appears: save a checkpoint and end")
    parser.add_argument(
        "--lifeline", action="store_true", help="end when standard input ends: whoever started this is gone"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="ComfyUI single file or diffusers folder")
    parser.add_argument("--rank", type=int, default=64, help="columns of Q (default: 64)")
    parser.add_argument("--targets", nargs="+", default=[], help="layers by name or dotted suffix (default: published)")
    parser.add_argument("--decomposition", choices=("fast", "exact"), default="exact", help="how Q is found")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def _add_adapter_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("portable", "published"), default="portable", help="portable is a LoRA too"
    )
    parser.add_argument("--model", type=Path, help="for 'published', where the adapter does not hold base R")
    parser.add_argument("--output", type=Path, required=True, help="the file to write; must not exist")


def describe(config: FitConfig | EncodeConfig) -> str:
    """The settings, one a line."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in as_table(config).items())
