"""Pictures and captions -> training cache, by a local diffusers pipeline: text encoders first, then the VAE."""

import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from qrlora_core import CacheItem, EncodedPicture, EncodedText, bucket_size, save_cache

from ..config import EncodeConfig
from ..errors import TrainError
from ..model.transformer import DTYPES, require_package
from ..tools import chosen_device
from .batches import generator_of
from .pictures import PICTURES, fitted, read_picture

log = logging.getLogger(__name__)

TRIGGER = "[trigger]"


@dataclass(frozen=True, slots=True)
class Source:
    """One picture to encode: its file, caption, and whether it is one of the class."""

    path: Path
    caption: str
    is_class: bool


def encode(config: EncodeConfig) -> Path:
    """Write the training cache.

    Captions are tokenized, padded and pooled as FluxPipeline does it; latents are shifted and scaled as the transformer
    expects them. The empty caption is always there, for caption dropout.

    Everything that costs little is looked at before the text encoders are loaded: captions, and whether every picture
    can be read.

    Returns:
        The file.

    Raises:
        TrainError: reason "data": no pictures, a broken picture, a missing caption; "settings": the output exists;
            "model": the pipeline folder lacks a part; "memory": the device has too little.
    """
    output = Path(config.output)
    if output.exists():
        raise TrainError("settings", f"{output.name} exists already; choose another output")
    require_pipeline(Path(config.pipeline))
    sources = _readable(_sources(config), config.skip_broken)
    device = chosen_device(config.device)
    texts = list(dict.fromkeys(["", *(source.caption for source in sources)]))
    try:
        encoded_texts = _encode_texts(config, texts, device)
        pictures = _encode_pictures(config, sources, device)
    except torch.OutOfMemoryError as error:
        raise TrainError(
            "memory",
            f"{device} has too little memory to encode ({error}). Use device cpu, which is slow but needs no GPU, or a "
            "lower resolution",
        ) from error
    items = [
        CacheItem(source.path.name, texts.index(source.caption), source.caption, config.repeats, source.is_class)
        for source in sources
    ]
    metadata = {"qrlora.trigger": config.trigger, "qrlora.prompt": _with_trigger(config.instance_prompt, config)}
    return save_cache(output, items, pictures, encoded_texts, empty_text=0, metadata=metadata)


def require_pipeline(path: Path) -> None:
    """Whether this is a diffusers pipeline folder at all, before anything of it is loaded.

    Raises:
        TrainError: reason "model"; "library" when transformers is not installed.
    """
    require_package("transformers", "a pipeline folder's text encoders")
    if not (path / "model_index.json").is_file():
        found = "is a file" if path.is_file() else "has no model_index.json" if path.is_dir() else "does not exist"
        raise TrainError(
            "model",
            f"the pipeline folder {str(path)!r} {found}. Expected a local diffusers FLUX.1 folder with the sub-folders "
            "vae, text_encoder, text_encoder_2, tokenizer and tokenizer_2; nothing is downloaded",
        )


def _sources(config: EncodeConfig) -> list[Source]:
    sources = [Source(path, _caption(path, config), False) for path in _files(config.pictures)]
    class_prompt = _with_trigger(config.class_prompt, config)
    return sources + [Source(path, class_prompt, True) for path in _files(config.class_pictures)]


def _readable(sources: Sequence[Source], skip_broken: bool) -> list[Source]:
    """The sources whose pictures can be read; a broken one is an error, or left out on request."""
    kept = []
    for source in sources:
        try:
            read_picture(source.path)
        except TrainError as error:
            if not skip_broken:
                raise
            log.warning("%s", error)
            continue
        kept.append(source)
    if not any(not source.is_class for source in kept):
        raise TrainError("data", "none of the pictures can be read")
    return kept


def _files(names: Iterable[str]) -> list[Path]:
    """Files as they are, and pictures of folders in order of their names, without hidden ones (macOS: `._x.jpg`)."""
    found: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            inside = sorted(one for one in path.iterdir() if one.suffix.lower() in PICTURES and one.is_file())
            inside = [one for one in inside if not one.name.startswith(".")]
            if not inside:
                raise TrainError("data", f"no pictures in the folder {path.name}; known: {' '.join(sorted(PICTURES))}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise TrainError("data", f"{path.name} does not exist")
    return found


def _caption(path: Path, config: EncodeConfig) -> str:
    beside = path.with_suffix(".txt")
    caption = config.instance_prompt
    if config.captions != "prompt" and beside.is_file():
        try:
            caption = beside.read_text(encoding="utf-8-sig").strip()
        except (OSError, ValueError) as error:
            raise TrainError("data", f"the caption {beside.name} cannot be read as UTF-8: {error}") from error
    elif config.captions == "files":
        raise TrainError("data", f"{path.name} has no caption: write {beside.name} beside it, or set captions to auto")
    if not caption:
        raise TrainError("data", f"{path.name} has no caption: write {beside.name} beside it, or give instance_prompt")
    return _with_trigger(caption, config)


def _with_trigger(text: str, config: EncodeConfig) -> str:
    if TRIGGER in text and not config.trigger:
        raise TrainError("settings", f"a caption holds {TRIGGER}, but trigger is not set: {text!r}")
    return text.replace(TRIGGER, config.trigger)


@torch.no_grad()
def _encode_texts(config: EncodeConfig, texts: Sequence[str], device: torch.device) -> list[EncodedText]:
    pipeline = load_part(
        lambda: FluxPipeline.from_pretrained(
            config.pipeline,
            transformer=None,
            vae=None,
            torch_dtype=DTYPES[config.precision],
            local_files_only=True,
        ).to(device),
        "text encoders and tokenizers",
    )
    for part, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        known, wanted = len(getattr(pipeline, part)), getattr(pipeline, encoder).config.vocab_size
        if known < wanted / 2:  # transformers makes an empty tokenizer where files are missing
            raise TrainError(
                "model", f"the pipeline folder's {part} has a vocabulary of {known}, {encoder} of {wanted}: files lack"
            )
    encoded = []
    for text in tqdm(texts, desc="captions"):
        embeds, pooled, _ = pipeline.encode_prompt(text, None, device=device, max_sequence_length=config.max_tokens)
        encoded.append(EncodedText(embeds[0].cpu(), pooled[0].cpu()))
    del pipeline
    _free(device)
    return encoded


@torch.no_grad()
def _encode_pictures(config: EncodeConfig, sources: Sequence[Source], device: torch.device) -> list[EncodedPicture]:
    """Latents of every picture."""
    vae = load_part(
        lambda: AutoencoderKL.from_pretrained(
            config.pipeline, subfolder="vae", torch_dtype=DTYPES[config.precision], local_files_only=True
        ).to(device),
        "VAE",
    )
    if config.precision == "fp16" and vae.config.force_upcast:  # its numbers do not fit into fp16
        vae.float()
    pictures = [
        _encode_picture(config, vae, source.path, number)
        for number, source in enumerate(tqdm(sources, desc="pictures"))
    ]
    del vae
    _free(device)
    return pictures


def _encode_picture(config: EncodeConfig, vae: Any, path: Path, number: int) -> EncodedPicture:
    picture = read_picture(path)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = bucket_size(*picture.size, config.resolution, config.bucket_step, config.buckets)
    generator = generator_of(config.seed, "encode", number)
    x, y = torch.rand(2, generator=generator).tolist()
    cut = fitted(picture, size, (0.5, 0.5) if config.center_crop else (x, y))

    def latent(one: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.asarray(one.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        distribution = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
        drawn = distribution.mean
        if config.sample_latents:
            noise = torch.randn(drawn.shape, generator=generator)
            drawn = drawn + distribution.std * noise.to(drawn)
        scaled: Tensor = (drawn.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        return scaled[0].cpu()

    mask = None
    if config.mask and "A" in cut.getbands():
        small = cut.getchannel("A").resize((size[0] // factor, size[1] // factor), Image.Resampling.BOX)
        mask = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)
        if not mask.any():
            raise TrainError(
                "data", f"{path.name} is transparent everywhere: as a mask that leaves nothing to train on"
            )
    return EncodedPicture(latent(cut), latent(ImageOps.mirror(cut)) if config.flip else None, mask)


def load_part(load: Callable[[], Any], what: str) -> Any:
    """Load something of a pipeline folder.

    Raises:
        TrainError: reason "model".
    """
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except ImportError as error:
        raise TrainError("library", f"the pipeline folder's {what} need a package: {error}") from error
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise TrainError(
            "model",
            f"the pipeline folder's {what} cannot be loaded: {error}. Expected a local diffusers FLUX.1 folder with "
            "model_index.json; nothing is downloaded",
        ) from error


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
