"""The flags of every subcommand; those of settings are made from the settings' own help texts."""

import argparse
import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .config import EncodeConfig, FitConfig
from .settings import AUTO, choices, may_be_auto, plain_type

_MISMATCH = (
    "when the two were trained on different bases: stack is exact and adds the ranks; align keeps the style's basis "
    "and rank, and says what is lost; raise refuses"
)
_ABOUT = """\
Train and handle QR-LoRA adapters of FLUX.1, FLUX.2, Qwen-Image, Z-Image, Krea 2, SD3.5 and SDXL. Nothing is ever
downloaded.

A first run, with the base model as a ComfyUI file (flux1-dev.safetensors) and as diffusers' folder (FLUX.1-dev):

  python -m train check --model flux1-dev.safetensors
  python -m train encode --pipeline FLUX.1-dev --pictures dog.jpg \\
      --instance-prompt "a photo of a [trigger] dog" --trigger "<c>" --output dog.cache.safetensors
  python -m train fit --model flux1-dev.safetensors --data dog.cache.safetensors --run-dir runs/dog

The adapter is then runs/dog/adapter.safetensors; put it into ComfyUI/models/qrlora. The same `fit` command again goes
on where a run was interrupted. `python -m train COMMAND --help` explains every setting of a command.

Exit codes: 0 done, 1 failed (the last line says why), 2 wrong settings, 3 stopped on request."""


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    command = _command(commands, "encode", "pictures and captions -> training cache")
    _add_settings(command, EncodeConfig)
    command = _command(commands, "fit", "training cache and base model -> adapter; goes on where the run folder ends")
    _add_settings(command, FitConfig)
    _add_channel(command)
    command.add_argument("--dry-run", action="store_true", help="print settings, memory estimate and layers, then end")
    command = _command(commands, "check", "can this machine train? versions, device, memory, model; in seconds")
    _add_settings(command, FitConfig, needed=False)
    command.add_argument("--no-data", action="store_true", help="the training cache does not exist yet")
    command.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    _add_tools(commands)
    return parser


def _add_tools(commands: Any) -> None:
    """Subcommands that do not train."""
    command = _command(commands, "basis", "decompose a base model and keep Q and R")
    _add_model(command)
    command.add_argument("--output", type=Path, required=True, help="folder for the basis file, as basis_cache of fit")
    command = _command(commands, "residual", "base model -> residual file of 10-21 GB")
    _add_model(command)
    command.add_argument("--adapter", type=Path, help="use this adapter's own Q and R instead of decomposing")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the file")
    command.add_argument("--output", type=Path, required=True, help="the file to write; must not exist")
    command = _command(commands, "merge", "alpha * style + beta * content -> one adapter")
    command.add_argument("--style", type=Path, required=True, help="adapter file")
    command.add_argument("--alpha", type=_finite, default=1.0, help="how much style")
    command.add_argument("--content", type=Path, required=True, help="adapter file")
    command.add_argument("--beta", type=_finite, default=1.0, help="how much content")
    command.add_argument("--on-basis-mismatch", choices=("stack", "align", "raise"), default="stack", help=_MISMATCH)
    _add_adapter_output(command)
    command = _command(commands, "export", "adapter -> the other format, or a standard LoRA")
    command.add_argument("--adapter", type=Path, required=True, help="adapter file")
    command.add_argument("--strength", type=_finite, default=1.0, help="a factor for all of it")
    _add_adapter_output(command)
    command = _command(commands, "similarity", "how alike two adapters are -> JSON and picture")
    command.add_argument("first", type=Path, help="adapter file")
    command.add_argument("second", type=Path, help="adapter file")
    command.add_argument("--output", type=Path, required=True, help="a .json file; a .png goes beside it")
    command.add_argument("--fixed-scale", action="store_true", help="cosines from -1 to 1, so that pictures compare")
    command = _command(commands, "sample", "pictures over lists of alpha and beta, with contact sheets")
    command.add_argument("--pipeline", type=Path, required=True, help="local diffusers folder of the model")
    command.add_argument("--style", type=Path, help="adapter file")
    command.add_argument("--content", type=Path, help="adapter file")
    command.add_argument("--alphas", type=_finite, nargs="+", default=[1.0], help="strengths of the style")
    command.add_argument("--betas", type=_finite, nargs="+", default=[1.0], help="strengths of the content")
    command.add_argument("--prompts", nargs="+", required=True, help="one or more prompts")
    command.add_argument("--seeds", type=int, nargs="+", default=[0], help="one or more seeds")
    command.add_argument("--steps", type=_positive, default=28, help="sampling steps")
    command.add_argument("--guidance", type=_finite, default=3.5, help="guidance; 0 for Z-Image-Turbo")
    command.add_argument("--width", type=_positive, default=1024, help="of the pictures")
    command.add_argument("--height", type=_positive, default=1024, help="of the pictures")
    command.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the pipeline")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    command.add_argument("--offload", action="store_true", help="keep in RAM what is not used: less GPU memory, slower")
    command.add_argument("--output", type=Path, required=True, help="folder for the pictures")


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    return command


# The first setting of every group of a command's help
_GROUPS = {
    "model": "what and where (model, data and run_dir are required)",
    "method": "what is trained",
    "steps": "steps",
    "timestep_sampling": "loss",
    "device": "memory",
    "basis_cache": "files",
    "pipeline": "what and where (pipeline, pictures and output are required)",
    "captions": "captions",
    "repeats": "pictures",
    "max_tokens": "encoding",
}


def _add_settings(parser: argparse.ArgumentParser, config: Any, needed: bool = True) -> None:
    """`--settings`, and one flag per setting, in groups. A flag that is not given is None: a file's value stays.

    `needed`: whether the command cannot do without the settings that have no default.
    """
    required = [spec.name for spec in fields(config) if spec.default is MISSING] if needed else []
    flags = [f"--{name.replace('_', '-')} ..." for name in required]
    parser.usage = " ".join([parser.prog, *flags, "[settings, see --help]"])  # a line instead of a page
    parser.add_argument("--settings", type=Path, help="a .toml or .json file with settings; flags win over it")
    group: Any = parser
    for setting in fields(config):
        if setting.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[setting.name])
        _add_setting(group, setting)


def _add_setting(group: Any, setting: Any) -> None:
    flag, text = f"--{setting.name.replace('_', '-')}", setting.metadata["help"]
    if setting.default is not MISSING and setting.default != "" and setting.default != ():
        text += f" (default: {setting.default})"
    options: dict[str, Any] = {"dest": setting.name, "default": None, "help": text.replace("%", "%%")}
    allowed, kind = choices(setting), plain_type(setting)
    if kind is bool and may_be_auto(setting):
        # the flag alone switches it on, --no-... off
        group.add_argument(flag, type=_switch, nargs="?", const=True, metavar="{auto,on,off}", **options)
        off = {"dest": setting.name, "default": None, "help": f"the same as {flag} off"}
        group.add_argument(f"--no-{flag[2:]}", action="store_false", **off)
    elif kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif setting.name == "resume":  # alone it means what it says: there has to be something to go on from
        group.add_argument(flag, choices=allowed, nargs="?", const="require", **options)
    elif allowed is not None:
        group.add_argument(flag, choices=allowed, **options)
    elif kind is tuple:
        group.add_argument(flag, nargs="+", metavar="NAME", **options)
    elif may_be_auto(setting):
        group.add_argument(flag, type=_auto_or_number, metavar="{auto,0..1}", **options)
    else:
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **options)


def _switch(text: str) -> bool | str:
    values: dict[str, bool | str] = {"on": True, "true": True, "off": False, "false": False, AUTO: AUTO}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, on, off")
    return values[text.lower()]


def _auto_or_number(text: str) -> float | str:
    return AUTO if text.lower() == AUTO else float(text)


def _add_channel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", default="", help="append events as JSON lines to this file; - is standard output")
    parser.add_argument("--stop-file", type=Path, help="when this file appears: save a checkpoint and end")
    parser.add_argument(
        "--lifeline", action="store_true", help="end when standard input ends: whoever started this is gone"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="ComfyUI single file or diffusers folder")
    parser.add_argument("--rank", type=_positive, default=64, help="columns of Q (default: 64)")
    parser.add_argument("--targets", nargs="+", default=[], help="layers by name or dotted suffix (default: published)")
    parser.add_argument("--decomposition", choices=("fast", "exact"), default="exact", help="how Q is found")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def _add_adapter_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("portable", "published"), default="portable", help="portable is a LoRA too"
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="base model, for 'published' where the adapter does not hold base R, and for full-QR files",
    )
    parser.add_argument("--output", type=Path, required=True, help="the file to write; must not exist")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
