"""Settings of the trainer: what they are called, what they may be, where they come from.

Standard library only, so that a host can check settings without torch. `FitConfig` is what `fit` needs and
`EncodeConfig` what `encode` needs. Settings come from a TOML or JSON file and from flags, flags win; an unknown key is
an error. Defaults are those of the published scripts.
"""

import difflib
import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

Method = Literal["delta_r", "delta_r_triangular", "qr"]
Optimizer = Literal["adamw", "adamw8bit", "prodigy"]
Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"
]
TimestepSampling = Literal["uniform", "logit_normal", "mode"]
Shift = Literal["none", "constant", "resolution"]
LossWeighting = Literal["none", "sigma_sqrt", "cosmap"]
Precision = Literal["bf16", "fp16", "fp32"]
Storage = Literal["bf16", "fp16", "fp32", "fp8", "int8", "nf4"]
Resume = Literal["auto", "never", "require"]
Auto = Literal["auto"]
AUTO = "auto"


# Raised whenever equal settings and data would give another adapter than before (another order of draws, another loss):
# runs that began before are then not gone on with. A new version of the pack alone changes nothing of a run.
TRAJECTORY_VERSION = 1

_TEXTS = ("name", "trigger", "prompt", "instance_prompt", "class_prompt")
_RULES = re.compile(r"(\d{1,9}(\.\d{1,9})?:\d{1,9},)+\d{1,9}(\.\d{1,9})?")
_LONGEST_SHOWN = 200


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


def _setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    trajectory: bool = True,
    key: bool = True,
) -> Any:
    """One setting. `trajectory`: a run that is resumed must have the same. `key`: part of what identifies a run."""
    details = MappingProxyType({"help": help, "low": low, "high": high, "trajectory": trajectory, "key": key})
    if default is MISSING:
        return field(metadata=details)
    return field(default=default, metadata=details)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """Everything that `fit` is told. Each field's meaning is its help text; ranges are inclusive."""

    model: str = _setting(
        MISSING,
        "base model: a ComfyUI single file or a diffusers folder; nothing is downloaded",
        trajectory=False,
        key=False,
    )
    data: str = _setting(MISSING, "the cache that `encode` wrote", trajectory=False, key=False)
    run_dir: str = _setting(
        MISSING, "folder of this run: settings, checkpoints, samples, adapter", trajectory=False, key=False
    )
    output: str = _setting(
        "", "where the adapter goes (default: adapter.safetensors in run_dir)", trajectory=False, key=False
    )
    output_format: Literal["portable", "published"] = _setting(
        "portable",
        "portable: any LoRA loader applies it; published: as the scripts write it",
        trajectory=False,
    )
    save_dtype: Precision = _setting("fp32", "how the adapter's tensors are stored", trajectory=False)
    name: str = _setting("", "title in the adapter's metadata (default: the file's name)", trajectory=False, key=False)
    trigger: str = _setting("", "trigger word, for the metadata", trajectory=False)
    prompt: str = _setting("", "instance prompt, for the metadata", trajectory=False)

    # what is trained
    method: Method = _setting(
        "delta_r_triangular", "delta_r, delta_r_triangular (upper trapezoidal like R), or qr (Q and R)"
    )
    rank: int = _setting(64, "columns of Q: how much the adapter can hold, and how large it is", low=1, high=3072)
    alpha: float = _setting(0.0, "scaling is alpha / rank; 0: as rank, so that scaling is 1", low=0.0, high=1e5)
    targets: tuple[str, ...] = _setting((), "layers by name or dotted suffix (default: the published ones)")
    init: Literal["zero", "random"] = _setting("zero", "what \u0394R starts as")
    delta_scale: float = _setting(1e-3, "standard deviation of a random start", low=0.0, high=1.0)
    training_adapter: str = _setting(
        "",
        "LoRA file that is on while training and off while sampling, for distilled models",
        trajectory=False,  # its content is, see prepare
        key=False,
    )
    decomposition: Literal["fast", "exact"] = _setting("fast", "how Q is found: block Krylov, or a full SVD")

    # steps
    steps: int = _setting(1000, "optimizer steps", low=1, high=1_000_000, trajectory=False)
    batch_size: int = _setting(1, "pictures per forward pass", low=1, high=256)
    gradient_accumulation: int = _setting(4, "forward passes per step and process", low=1, high=1024)
    learning_rate: float = _setting(1e-4, "learning rate (Prodigy: 1)", low=1e-9, high=10.0)
    scheduler: Scheduler = _setting("constant", "learning rate schedule (diffusers' names)")
    warmup_steps: int = _setting(0, "steps of linear warm-up", low=0, high=1_000_000)
    scheduler_cycles: int = _setting(1, "restarts of cosine_with_restarts", low=1, high=1000)
    scheduler_power: float = _setting(1.0, "power of the polynomial schedule", low=0.0, high=10.0)
    scheduler_rules: str = _setting("", 'rules of piecewise_constant, such as "1:100,0.1:500,0.01"')
    optimizer: Optimizer = _setting("adamw", "adamw, adamw8bit (needs bitsandbytes), prodigy (needs prodigyopt)")
    beta1: float = _setting(0.9, "decay of the mean gradient, AdamW and Prodigy", low=0.0, high=0.9999)
    beta2: float = _setting(0.999, "decay of the mean square, AdamW and Prodigy", low=0.0, high=0.99999)
    epsilon: float = _setting(1e-8, "smallest divisor, AdamW and Prodigy", low=1e-16, high=1.0)
    weight_decay: float = _setting(1e-4, "decoupled weight decay", low=0.0, high=1.0)
    max_grad_norm: float = _setting(1.0, "gradient clipping, 0 for none", low=0.0, high=1e6)
    seed: int = _setting(0, "order of the data, noise, timesteps, dropout, random start", low=0, high=2**63 - 1)

    # loss
    timestep_sampling: TimestepSampling = _setting("uniform", "how sigma is drawn before the shift")
    logit_mean: float = _setting(
        0.0, "mean of timestep_sampling logit_normal, 0: as much noise as picture", low=-10.0, high=10.0
    )
    logit_std: float = _setting(1.0, "spread of timestep_sampling logit_normal", low=1e-3, high=10.0)
    mode_scale: float = _setting(1.29, "strength of timestep_sampling mode", low=-1.0, high=1.75)
    shift: Shift = _setting("none", "none (published), constant, or resolution: the family's own, by number of tokens")
    shift_value: float = _setting(3.0, "factor of a constant shift; above 1 there is more noise", low=0.01, high=100.0)
    guidance: float = _setting(1.0, "distilled guidance value during training", low=0.0, high=100.0)
    loss_weighting: LossWeighting = _setting("none", "weight of the loss over sigma")
    caption_dropout: float = _setting(0.0, "share of pictures trained with an empty caption", low=0.0, high=1.0)
    prior_weight: float = _setting(1.0, "weight of the class pictures, where the cache has some", low=0.0, high=100.0)
    use_mask: bool = _setting(True, "weigh the loss by the pictures' alpha channel, where the cache has it")

    # memory
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1, mps", trajectory=False, key=False)
    precision: Precision = _setting("bf16", "arithmetic of the forward pass; trained tensors are always fp32")
    base_storage: Storage | Auto = _setting(
        "auto", "how the base is held; int8 needs torchao, nf4 bitsandbytes; auto: as exact as memory allows"
    )
    gradient_checkpointing: bool | Auto = _setting(
        "auto",
        "recompute blocks in the backward pass: far less memory, a third slower; auto: where memory asks for it",
        trajectory=False,
        key=False,
    )
    offload: float | Auto = _setting(
        "auto",
        "share of the blocks' weights that waits in RAM; auto: as little as memory allows",
        low=0.0,
        high=1.0,
        trajectory=False,
        key=False,
    )
    memory_check: bool = _setting(True, "refuse to start when the estimate does not fit", trajectory=False, key=False)

    # files
    basis_cache: str = _setting("", "folder of decompositions (default: next to the runs)", trajectory=False, key=False)
    checkpoint_every: int = _setting(
        250, "steps between checkpoints, 0: only at the end", low=0, high=1_000_000, trajectory=False, key=False
    )
    keep_checkpoints: int = _setting(2, "how many checkpoints are kept", low=1, high=1000, trajectory=False, key=False)
    resume: Resume = _setting(
        "auto",
        "auto: go on where the run folder ends; never: refuse a used one; require",
        trajectory=False,
        key=False,
    )
    sample_every: int = _setting(
        0, "steps between sample latents, 0: none", low=0, high=1_000_000, trajectory=False, key=False
    )
    sample_steps: int = _setting(8, "Euler steps of a sample", low=1, high=100, trajectory=False, key=False)
    sample_guidance: float = _setting(3.5, "guidance of a sample", low=0.0, high=100.0, trajectory=False, key=False)
    validate_every: int = _setting(
        0, "steps between validation losses, 0: none", low=0, high=1_000_000, trajectory=False, key=False
    )
    validation_draws: int = _setting(
        8, "noises and timesteps of a validation loss", low=1, high=1024, trajectory=False, key=False
    )

    def __post_init__(self) -> None:
        _check(self)
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            raise ConfigError(
                f"prodigy finds its own step: learning_rate is a factor near 1, not {self.learning_rate:g}"
            )
        if self.scheduler == "piecewise_constant" and not _RULES.fullmatch(self.scheduler_rules):
            raise ConfigError(
                f"scheduler_rules is {_shown(self.scheduler_rules)}: piecewise_constant needs factor:step "
                'pairs and a last factor, such as "1:100,0.1:500,0.01"'
            )
        if self.method == "qr" and self.init == "random":
            raise ConfigError("init random is about \u0394R; method qr has none and starts from Q and R")
        if self.offload not in (AUTO, 0.0) and self.base_storage in ("int8", "nf4"):
            raise ConfigError("offload works with base_storage bf16, fp16, fp32 and fp8")

    @property
    def adapter_alpha(self) -> float:
        """The alpha that the adapter gets: as stated, or the rank."""
        return self.alpha or float(self.rank)

    @property
    def scaling(self) -> float:
        return self.adapter_alpha / self.rank

    def trajectory(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run that it goes on from."""
        return _selected(self, "trajectory")

    def key_fields(self) -> dict[str, Any]:
        """The settings that decide what comes out; where files lie and how memory is spent does not."""
        return _selected(self, "key")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeConfig:
    """Everything that `encode` is told."""

    pipeline: str = _setting(MISSING, "local diffusers folder of the model: vae, text encoders, tokenizers")
    pictures: tuple[str, ...] = _setting(MISSING, "picture files and folders (a folder's own pictures, not deeper)")
    output: str = _setting(MISSING, "the cache to write, a safetensors file")
    captions: Literal["auto", "files", "prompt"] = _setting(
        "auto", "files: a .txt beside each picture; prompt: instance_prompt for all; auto: the first, else the second"
    )
    instance_prompt: str = _setting("", 'such as "a photo of a [trigger] dog"')
    trigger: str = _setting("", "trigger word; replaces [trigger] in captions and prompts")
    repeats: int = _setting(1, "how often each picture counts in one pass over the data", low=1, high=10_000)
    resolution: int = _setting(512, "side of the square whose area all buckets have", low=64, high=4096)
    buckets: bool = _setting(True, "keep aspect ratios; otherwise every picture becomes a square")
    bucket_step: int = _setting(64, "sides of buckets are multiples of this", low=16, high=512)
    center_crop: bool = _setting(True, "cut what the bucket does not take from the middle; otherwise at random (seed)")
    flip: bool = _setting(False, "also encode every picture mirrored")
    mask: bool = _setting(False, "use alpha channels as loss masks")
    class_pictures: tuple[str, ...] = _setting((), "pictures of the class, for prior preservation")
    class_prompt: str = _setting("", "caption of the class pictures")
    max_tokens: int = _setting(512, "tokens of a caption at most", low=16, high=512)
    skip_broken: bool = _setting(False, "leave pictures out that cannot be read; otherwise they are an error")
    seed: int = _setting(0, "random crops and the draws of the VAE", low=0, high=2**63 - 1)
    sample_latents: bool = _setting(False, "draw from the VAE's distribution; otherwise its mean")
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: Precision = _setting("bf16", "of the text encoders and the VAE")

    def __post_init__(self) -> None:
        _check(self)
        if not self.pictures:
            raise ConfigError("pictures is empty: name at least one picture or folder")
        if self.captions == "prompt" and not self.instance_prompt:
            raise ConfigError("captions is 'prompt', but instance_prompt is empty")
        if bool(self.class_pictures) != bool(self.class_prompt):
            raise ConfigError("class_pictures and class_prompt go together")
        if self.resolution % 16 or self.bucket_step % 16:
            raise ConfigError("resolution and bucket_step are multiples of 16 (8 by the VAE, 2 by the patches)")
        if self.bucket_step > self.resolution:
            raise ConfigError(f"bucket_step {self.bucket_step} is larger than resolution {self.resolution}")


Config = TypeVar("Config", FitConfig, EncodeConfig)


def load_settings(path: Path) -> dict[str, Any]:
    """The table in a .toml or .json file.

    Raises:
        ConfigError: another ending, not readable, or not a table.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editor writes a byte order mark
        if path.suffix.lower() == ".json":
            values = json.loads(text)
        elif path.suffix.lower() == ".toml":
            values = _toml()(text)
        else:
            raise ConfigError(f"{path.name}: settings are read from .toml or .json files")
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        # Windows paths are the commonest mistake: TOML and JSON take a backslash for the start of an escape
        hint = "; write backslashes double, or the text in single quotes" if "\\" in str(error) else ""
        hint = hint or ("; write backslashes double" if "escape" in str(error).lower() else "")
        raise ConfigError(f"{path.name} is not valid: {error}{hint}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} holds {type(values).__name__}, expected a table of settings")
    return values


def make_config(kind: type[Config], *sources: Mapping[str, Any]) -> Config:
    """A checked config from tables of settings; later ones win.

    Raises:
        ConfigError: a key that `kind` does not have, one that is missing, or a value that does not fit.
    """
    settings = {setting.name: setting for setting in fields(kind)}
    values: dict[str, Any] = {}
    for source in sources:
        for key, value in source.items():
            if key not in settings:
                close = difflib.get_close_matches(key[:_LONGEST_SHOWN], settings, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"unknown setting {_shown(key)}{hint}")
            values[key] = _converted(settings[key], value)
    missing = [name for name, setting in settings.items() if setting.default is MISSING and name not in values]
    if missing:
        raise ConfigError(f"missing settings: {', '.join(missing)}")
    return kind(**values)


def as_table(config: FitConfig | EncodeConfig) -> dict[str, Any]:
    """A config as plain JSON values; `make_config` reads it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def choices(setting: "Field[Any]") -> tuple[str, ...] | None:
    """The allowed strings of a setting, "auto" first where it is one; None when it is free."""
    if get_origin(setting.type) is Literal:
        return get_args(setting.type)
    if may_be_auto(setting) and plain_type(setting) is str:
        return (AUTO, *(name for part in get_args(setting.type) for name in get_args(part) if name != AUTO))
    return None


def may_be_auto(setting: "Field[Any]") -> bool:
    """Whether a setting may be left to the trainer."""
    return setting.default == AUTO and get_origin(setting.type) is Union


def plain_type(setting: "Field[Any]") -> Any:
    """What a setting's value is when it is not "auto": bool, int, float, str or tuple."""
    kind: Any = setting.type
    if may_be_auto(setting):
        kind = next((part for part in get_args(setting.type) if get_origin(part) is not Literal), str)
    return tuple if get_origin(kind) is tuple else str if get_origin(kind) is Literal else kind


def _selected(config: FitConfig, mark: str) -> dict[str, Any]:
    table = as_table(config) | {"alpha": config.adapter_alpha}
    return {setting.name: table[setting.name] for setting in fields(config) if setting.metadata[mark]}


def _check(config: FitConfig | EncodeConfig) -> None:
    """Types, choices and ranges of every field; a value of the wrong type never gets further."""
    for setting in fields(config):
        value, wanted, allowed = getattr(config, setting.name), plain_type(setting), choices(setting)
        if allowed is not None:
            if value not in allowed:
                raise ConfigError(f"{setting.name} is {_shown(value)}, expected one of {', '.join(allowed)}")
            continue
        if value == AUTO and may_be_auto(setting):
            continue
        if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
            alternative = " or auto" if may_be_auto(setting) else ""
            raise ConfigError(f"{setting.name} is {_shown(value)}, expected {wanted.__name__}{alternative}")
        if isinstance(value, str):
            _check_text(setting, value)
        if isinstance(value, tuple) and not all(isinstance(item, str) and item for item in value):
            raise ConfigError(f"{setting.name} is {_shown(value)}, expected a list of names")
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = setting.metadata["low"], setting.metadata["high"]
            if not low <= value <= high:  # NaN is in no range
                raise ConfigError(f"{setting.name} is {_shown(value)}, expected {low:g} to {high:g}")


def _shown(value: Any) -> str:
    """A value as a message shows it. A number of 5000 digits, as TOML's 0xfff... gives one, cannot be printed."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} of {value.bit_length()} bits" if isinstance(value, int) else "too deep"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"


def _check_text(setting: "Field[Any]", value: str) -> None:
    if "\0" in value or (setting.default is MISSING and not value):
        raise ConfigError(f"{setting.name} is {_shown(value)}, expected a path")
    # a path may hold whatever its system gave it; a text that no tokenizer and no file takes would fail at the end
    if setting.name in _TEXTS and any(0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise ConfigError(f"{setting.name} is {_shown(value)}, which is not valid Unicode text: retype it")


def _converted(setting: "Field[Any]", value: Any) -> Any:
    """JSON and TOML know no tuples and write 1 for 1.0; nothing else is converted."""
    kind = plain_type(setting)
    if kind is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):  # the range check says what is wrong with a number of 400 digits
            return float(value)
        return math.inf
    return value


def _toml() -> Any:
    for name in ("tomllib", "tomli"):
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name).loads
    raise ConfigError("TOML needs Python 3.11 or the package tomli; a .json file works everywhere")
