"""Pictures and captions -> training cache, by a local diffusers pipeline: text encoders first, then the VAE."""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from ..errors import OUT_OF_MEMORY, TrainError
from ..model.transformer import DTYPES, require_package
from ..tools import chosen_device
from .batches import generator_of
from .captions import DatasetError, caption_of, caption_warnings, is_dangling, picture_files, with_trigger
from .pictures import fitted, read_picture, require_visible

log = logging.getLogger(__name__)


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
    with _dataset_errors():
        sources = _readable(_sources(config), config.skip_broken)
        prompt = with_trigger(config.instance_prompt, config.trigger)
    own_captions = [source.caption for source in sources if not source.is_class]
    for warning in caption_warnings(own_captions, config.trigger):
        log.warning("%s", warning)
    device = chosen_device(config.device)
    texts = list(dict.fromkeys(["", *(source.caption for source in sources)]))
    try:
        encoded_texts = _encode_texts(config, texts, device)
        with _dataset_errors():
            pictures = _encode_pictures(config, sources, device)
    except OUT_OF_MEMORY as error:
        raise TrainError(
            "memory",
            f"{device} has too little memory to encode ({error}). Use device cpu, which is slow but needs no GPU, or a "
            "lower resolution",
        ) from error
    items = [
        CacheItem(source.path.name, texts.index(source.caption), source.caption, config.repeats, source.is_class)
        for source in sources
    ]
    metadata = {"qrlora.trigger": config.trigger, "qrlora.prompt": prompt}
    return save_cache(output, items, pictures, encoded_texts, empty_text=0, metadata=metadata)


def require_pipeline(path: Path) -> None:
    """Whether this is a diffusers pipeline folder at all, before anything of it is loaded.

    Raises:
        TrainError: reason "model"; "library" when transformers is not installed.
    """
    require_package("transformers", "a pipeline folder's text encoders")
    if not (path / "model_index.json").is_file():
        state = "is a file" if path.is_file() else "has no model_index.json" if path.is_dir() else "does not exist"
        raise TrainError(
            "model",
            f"the pipeline folder {str(path)!r} {state}. Expected a local diffusers FLUX.1 folder with the sub-folders "
            "vae, text_encoder, text_encoder_2, tokenizer and tokenizer_2; nothing is downloaded",
        )


def _sources(config: EncodeConfig) -> list[Source]:
    sources = [
        Source(path, caption_of(path, config.instance_prompt, config.trigger, source=config.captions), False)
        for path in _files(config.pictures)
    ]
    class_prompt = with_trigger(config.class_prompt, config.trigger)
    return sources + [Source(path, class_prompt, True) for path in _files(config.class_pictures)]


def _readable(sources: Sequence[Source], skip_broken: bool) -> list[Source]:
    """The sources whose pictures can be read; a broken one is an error, or left out on request."""
    kept = []
    for source in sources:
        try:
            read_picture(source.path)
        except DatasetError as error:
            if not skip_broken:
                raise DatasetError(f"{error}, or set skip_broken") from error
            log.warning("%s; it is left out", error)
            continue
        kept.append(source)
    if not any(not source.is_class for source in kept):
        raise DatasetError("none of the pictures can be read")
    return kept


def _files(names: Iterable[str]) -> list[Path]:
    """Files as they are, and the pictures of folders."""
    listed: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            listed += picture_files(path)
        elif path.is_file() or is_dangling(path):
            listed.append(path)
        else:
            raise DatasetError(f"{path.name} does not exist")
    return listed


@contextmanager
def _dataset_errors() -> Iterator[None]:
    """What is wrong with pictures or captions ends the command as its other errors do."""
    try:
        yield
    except DatasetError as error:
        raise TrainError(error.reason, str(error)) from error


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
        words, expected = len(getattr(pipeline, part)), getattr(pipeline, encoder).config.vocab_size
        if words < expected / 2:  # transformers makes an empty tokenizer where files are missing
            raise TrainError(
                "model",
                f"the pipeline folder's {part} has a vocabulary of {words}, {encoder} of {expected}: files lack",
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

    def latent(image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
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
        weights = np.asarray(small, dtype=np.float32) / 255
        require_visible(path.name, weights)
        mask = torch.from_numpy(weights)
    return EncodedPicture(latent(cut), latent(ImageOps.mirror(cut)) if config.flip else None, mask)


def load_part(load: Callable[[], Any], what: str) -> Any:
    """Load something of a pipeline folder.

    Raises:
        TrainError: reason "model".
    """
    try:
        return load()
    except OUT_OF_MEMORY:
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
