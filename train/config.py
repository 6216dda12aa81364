"""Settings of the trainer: `FitConfig` is what `fit` needs, `EncodeConfig` what `encode` needs.

Standard library only, so that a host can check settings without torch. Settings come from a TOML or JSON file and from
flags, flags win; an unknown key is an error (`settings`). Defaults are those of the published scripts.
"""

import re
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from .settings import AUTO, Auto, ConfigError, check, setting, shown

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

# Raised whenever equal settings and data would give another adapter than before (another order of draws, another loss):
# runs that began before are then not gone on with. A new version of the pack alone changes nothing of a run.
TRAJECTORY_VERSION = 1

_RULES = re.compile(r"(\d{1,9}(\.\d{1,9})?:\d{1,9},)+\d{1,9}(\.\d{1,9})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """All settings of `fit`. Each field's meaning is its help text; ranges are inclusive."""

    model: str = setting(
        MISSING,
        "base model: a ComfyUI single file or a diffusers folder; nothing is downloaded",
        trajectory=False,
        key=False,
    )
    data: str = setting(MISSING, "the cache that `encode` wrote", trajectory=False, key=False)
    run_dir: str = setting(
        MISSING, "folder of this run: settings, checkpoints, samples, adapter", trajectory=False, key=False
    )
    output: str = setting(
        "", "where the adapter goes (default: adapter.safetensors in run_dir)", trajectory=False, key=False
    )
    output_format: Literal["portable", "published"] = setting(
        "portable",
        "portable: any LoRA loader applies it; published: as the scripts write it",
        trajectory=False,
    )
    save_dtype: Precision = setting("fp32", "how the adapter's tensors are stored", trajectory=False)
    name: str = setting(
        "", "title in the adapter's metadata (default: the file's name)", trajectory=False, key=False, text=True
    )
    trigger: str = setting("", "trigger word, for the metadata", trajectory=False, text=True)
    prompt: str = setting("", "instance prompt, for the metadata", trajectory=False, text=True)

    # what is trained
    method: Method = setting(
        "delta_r_triangular", "delta_r, delta_r_triangular (upper trapezoidal like R), or qr (Q and R)"
    )
    rank: int = setting(64, "columns of Q: how much the adapter can hold, and how large it is", low=1, high=3072)
    alpha: float = setting(0.0, "scaling is alpha / rank; 0: as rank, so that scaling is 1", low=0.0, high=1e5)
    targets: tuple[str, ...] = setting((), "layers by name or dotted suffix (default: the published ones)")
    init: Literal["zero", "random"] = setting("zero", "what \u0394R starts as")
    delta_scale: float = setting(1e-3, "standard deviation of a random start", low=0.0, high=1.0)
    training_adapter: str = setting(
        "",
        "LoRA file that is on while training and off while sampling, for distilled models",
        trajectory=False,  # its content is, see prepare
        key=False,
    )
    decomposition: Literal["fast", "exact"] = setting("fast", "how Q is found: block Krylov, or a full SVD")

    # steps
    steps: int = setting(1000, "optimizer steps", low=1, high=1_000_000, trajectory=False)
    batch_size: int = setting(1, "pictures per forward pass", low=1, high=256)
    gradient_accumulation: int = setting(4, "forward passes per step and process", low=1, high=1024)
    learning_rate: float = setting(1e-4, "learning rate (Prodigy: 1)", low=1e-9, high=10.0)
    scheduler: Scheduler = setting("constant", "learning rate schedule (diffusers' names)")
    warmup_steps: int = setting(0, "steps of linear warm-up", low=0, high=1_000_000)
    scheduler_cycles: int = setting(1, "restarts of cosine_with_restarts", low=1, high=1000)
    scheduler_power: float = setting(1.0, "power of the polynomial schedule", low=0.0, high=10.0)
    scheduler_rules: str = setting("", 'rules of piecewise_constant, such as "1:100,0.1:500,0.01"')
    optimizer: Optimizer = setting("adamw", "adamw, adamw8bit (needs bitsandbytes), prodigy (needs prodigyopt)")
    beta1: float = setting(0.9, "decay of the mean gradient, AdamW and Prodigy", low=0.0, high=0.9999)
    beta2: float = setting(0.999, "decay of the mean square, AdamW and Prodigy", low=0.0, high=0.99999)
    epsilon: float = setting(1e-8, "smallest divisor, AdamW and Prodigy", low=1e-16, high=1.0)
    weight_decay: float = setting(1e-4, "decoupled weight decay", low=0.0, high=1.0)
    max_grad_norm: float = setting(1.0, "gradient clipping, 0 for none", low=0.0, high=1e6)
    seed: int = setting(0, "order of the data, noise, timesteps, dropout, random start", low=0, high=2**63 - 1)

    # loss
    timestep_sampling: TimestepSampling = setting("uniform", "how sigma is drawn before the shift")
    logit_mean: float = setting(
        0.0, "mean of timestep_sampling logit_normal, 0: as much noise as picture", low=-10.0, high=10.0
    )
    logit_std: float = setting(1.0, "spread of timestep_sampling logit_normal", low=1e-3, high=10.0)
    mode_scale: float = setting(1.29, "strength of timestep_sampling mode", low=-1.0, high=1.75)
    shift: Shift = setting("none", "none (published), constant, or resolution: the family's own, by number of tokens")
    shift_value: float = setting(3.0, "factor of a constant shift; above 1 there is more noise", low=0.01, high=100.0)
    guidance: float = setting(1.0, "distilled guidance value during training", low=0.0, high=100.0)
    loss_weighting: LossWeighting = setting("none", "weight of the loss over sigma")
    caption_dropout: float = setting(0.0, "share of pictures trained with an empty caption", low=0.0, high=1.0)
    prior_weight: float = setting(1.0, "weight of the class pictures, where the cache has some", low=0.0, high=100.0)
    use_mask: bool = setting(True, "weigh the loss by the pictures' alpha channel, where the cache has it")

    # memory
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps", trajectory=False, key=False)
    precision: Precision = setting("bf16", "arithmetic of the forward pass; trained tensors are always fp32")
    base_storage: Storage | Auto = setting(
        "auto", "how the base is held; int8 needs torchao, nf4 bitsandbytes; auto: as exact as memory allows"
    )
    fp8_products: bool = setting(
        False,
        "multiply a base that is held in fp8 as it is (RTX 40 and newer): faster, and inputs are rounded to fp8",
        trajectory=False,  # where it is on it decides, see prepare
        key=False,
    )
    gradient_checkpointing: bool | Auto = setting(
        "auto",
        "recompute blocks in the backward pass: far less memory, a third slower; auto: where memory asks for it",
        trajectory=False,
        key=False,
    )
    offload: float | Auto = setting(
        "auto",
        "share of the blocks' weights that waits in RAM (on a CPU: in the file); auto: as little as memory allows",
        low=0.0,
        high=1.0,
        trajectory=False,
        key=False,
    )
    memory_check: bool = setting(True, "refuse to start when the estimate does not fit", trajectory=False, key=False)

    # files
    basis_cache: str = setting("", "folder of decompositions (default: next to the runs)", trajectory=False, key=False)
    checkpoint_every: int = setting(
        250, "steps between checkpoints, 0: only at the end", low=0, high=1_000_000, trajectory=False, key=False
    )
    keep_checkpoints: int = setting(2, "how many checkpoints are kept", low=1, high=1000, trajectory=False, key=False)
    resume: Resume = setting(
        "auto",
        "auto: go on where the run folder ends; never: refuse a used one; require",
        trajectory=False,
        key=False,
    )
    sample_every: int = setting(
        0, "steps between sample latents, 0: none", low=0, high=1_000_000, trajectory=False, key=False
    )
    sample_steps: int = setting(8, "Euler steps of a sample", low=1, high=100, trajectory=False, key=False)
    sample_guidance: float = setting(3.5, "guidance of a sample", low=0.0, high=100.0, trajectory=False, key=False)
    validate_every: int = setting(
        0, "steps between validation losses, 0: none", low=0, high=1_000_000, trajectory=False, key=False
    )
    validation_draws: int = setting(
        8, "noises and timesteps of a validation loss", low=1, high=1024, trajectory=False, key=False
    )
    strengths: Literal["auto", "on", "off"] = setting(
        "auto",
        "at the end: pictures and curves of the adapter at several strengths; auto: where they are a tenth of the work",
        trajectory=False,
        key=False,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            raise ConfigError(
                f"prodigy finds its own step: learning_rate is a factor near 1, not {self.learning_rate:g}"
            )
        if self.scheduler == "piecewise_constant" and not _RULES.fullmatch(self.scheduler_rules):
            raise ConfigError(
                f"scheduler_rules is {shown(self.scheduler_rules)}: piecewise_constant needs factor:step "
                'pairs and a last factor, such as "1:100,0.1:500,0.01"'
            )
        if self.method == "qr" and self.init == "random":
            raise ConfigError("init random is about \u0394R; method qr has none and starts from Q and R")
        if self.fp8_products and self.base_storage != "fp8":
            raise ConfigError(f"fp8_products needs base_storage fp8, which is {self.base_storage}")
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
    """All settings of `encode`."""

    pipeline: str = setting(MISSING, "local diffusers folder of the model: vae, text encoders, tokenizers")
    pictures: tuple[str, ...] = setting(MISSING, "picture files and folders (a folder's own pictures, not deeper)")
    output: str = setting(MISSING, "the cache to write, a safetensors file")
    captions: Literal["auto", "files", "prompt"] = setting(
        "auto", "files: a .txt beside each picture; prompt: instance_prompt for all; auto: the first, else the second"
    )
    instance_prompt: str = setting("", 'such as "a photo of a [trigger] dog"', text=True)
    trigger: str = setting("", "trigger word; replaces [trigger] in captions and prompts", text=True)
    repeats: int = setting(1, "how often each picture counts in one pass over the data", low=1, high=10_000)
    resolution: int = setting(512, "side of the square whose area all buckets have", low=64, high=4096)
    resolutions: tuple[str, ...] = setting(
        (), "further sides, such as 768 1024: every picture is there in each of them", numbers=True
    )
    buckets: bool = setting(True, "keep aspect ratios; otherwise every picture becomes a square")
    bucket_step: int = setting(64, "sides of buckets are multiples of this", low=16, high=512)
    center_crop: bool = setting(True, "cut what the bucket does not take from the middle; otherwise at random (seed)")
    flip: bool = setting(False, "also encode every picture mirrored")
    mask: bool = setting(False, "use alpha channels as loss masks")
    class_pictures: tuple[str, ...] = setting((), "pictures of the class, for prior preservation")
    class_prompt: str = setting("", "caption of the class pictures", text=True)
    max_tokens: int = setting(512, "tokens of a caption at most", low=16, high=512)
    skip_broken: bool = setting(False, "leave pictures out that cannot be read; otherwise they are an error")
    seed: int = setting(0, "random crops and the draws of the VAE", low=0, high=2**63 - 1)
    sample_latents: bool = setting(False, "draw from the VAE's distribution; otherwise its mean")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: Precision = setting("bf16", "of the text encoders and the VAE")

    def __post_init__(self) -> None:
        check(self)
        if not self.pictures:
            raise ConfigError("pictures is empty: name at least one picture or folder")
        if self.captions == "prompt" and not self.instance_prompt:
            raise ConfigError("captions is 'prompt', but instance_prompt is empty")
        if bool(self.class_pictures) != bool(self.class_prompt):
            raise ConfigError("class_pictures and class_prompt go together")
        for side in self.sides:
            if side % 16 or self.bucket_step % 16:
                raise ConfigError("resolution and bucket_step are multiples of 16 (8 by the VAE, 2 by the patches)")
            if self.bucket_step > side:
                raise ConfigError(f"bucket_step {self.bucket_step} is larger than resolution {side}")

    @property
    def sides(self) -> tuple[int, ...]:
        """All resolutions, each once.

        Raises:
            ConfigError: one of the further ones is no number from 64 to 4096.
        """
        for text in self.resolutions:
            if not (text.isascii() and text.isdecimal() and len(text) < 5 and 64 <= int(text) <= 4096):
                raise ConfigError(f"resolutions holds {text[:40]!r}, expected numbers from 64 to 4096")
        return tuple(dict.fromkeys((self.resolution, *map(int, self.resolutions))))


def as_table(config: FitConfig | EncodeConfig) -> dict[str, Any]:
    """A config as plain JSON values; `make_config` reads it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def _selected(config: FitConfig, mark: str) -> dict[str, Any]:
    table = as_table(config) | {"alpha": config.adapter_alpha}
    return {spec.name: table[spec.name] for spec in fields(config) if spec.metadata[mark]}
