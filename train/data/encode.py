"""Pictures and captions -> training cache, by a local diffusers pipeline: text encoders first, then the VAE."""

import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from qrlora_core import CacheItem, EncodedPicture, EncodedText, PlainText, bucket_size, plain_caption, save_cache

from ..config import EncodeConfig
from ..errors import OUT_OF_MEMORY, TrainError
from ..model.backbones import Pipeline
from ..model.device import chosen_device
from ..model.pipeline_folder import PipelineFolder, open_pipeline
from ..model.transformer import DTYPES
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

    Captions become what the family's own pipeline makes of them; latents are those that its transformer expects. The
    empty caption is always there, for caption dropout.

    Everything that costs little is looked at before the text encoders are loaded: captions, and whether every picture
    can be read.

    Returns:
        The file.

    Raises:
        TrainError: reason "data": no pictures, a broken picture, a missing caption; "settings": the output exists;
            "model": the pipeline folder lacks a part or is of another model; "memory": the device has too little.
    """
    output = Path(config.output)
    if output.exists():
        raise TrainError("settings", f"{output.name} exists already; choose another output")
    folder = open_pipeline(Path(config.pipeline))
    with _dataset_errors():
        sources = _readable(_sources(config), config.skip_broken)
        prompt = with_trigger(config.instance_prompt, config.trigger)
    own_captions = [source.caption for source in sources if not source.is_class]
    for warning in caption_warnings(own_captions, config.trigger):
        log.warning("%s", warning)
    device = chosen_device(config.device)
    texts = list(dict.fromkeys(["", *(source.caption for source in sources)]))
    plain = plain_caption(own_captions[0], config.trigger)
    try:
        encoded_texts = _encode_texts(folder, config, texts if plain is None else [*texts, plain], device)
        with _dataset_errors():
            pictures = _encode_pictures(folder, config, sources, device)
    except OUT_OF_MEMORY as error:
        raise TrainError(
            "memory",
            f"{device} has too little memory to encode ({error}). Use device cpu, which is slow but needs no GPU, or a "
            "lower resolution",
        ) from error
    items = [
        CacheItem(source.path.name, texts.index(source.caption), source.caption, config.repeats, source.is_class)
        for source in sources
        for _ in config.sides
    ]
    metadata = {"qrlora.trigger": config.trigger, "qrlora.prompt": prompt}
    without = None if plain is None else PlainText(config.trigger, plain, encoded_texts.pop())
    return save_cache(output, items, pictures, encoded_texts, empty_text=0, metadata=metadata, plain=without)


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
def _encode_texts(
    folder: PipelineFolder, config: EncodeConfig, texts: Sequence[str], device: torch.device
) -> list[EncodedText]:
    family = folder.backbone.pipeline
    what, dtype = "text encoders and tokenizers", DTYPES[config.precision]
    pipeline = folder.load(what, dtype, device, **{family.network: None, "vae": None})
    for part, encoder in family.encoders.items():
        _require_vocabulary(pipeline, part, encoder)
    encoded = []
    for text in tqdm(texts, desc="captions"):
        encoded_text = family.encode_text(pipeline, text, config.max_tokens, device)
        encoded.append(encoded_text.map(lambda tensor: tensor.cpu().clone()))
    del pipeline
    _free(device)
    return encoded


def _require_vocabulary(pipeline: Any, part: str, encoder: str) -> None:
    """Raise TrainError for an empty tokenizer: transformers makes one where files are missing."""
    if getattr(pipeline, encoder) is None:  # the folder does without it on purpose, as SD3.5's may without T5
        return
    tokenizer, config = getattr(pipeline, part), getattr(pipeline, encoder).config
    words = len(getattr(tokenizer, "tokenizer", tokenizer))  # a processor for pictures, too, has one inside
    expected = getattr(config, "text_config", config).vocab_size
    if words < expected / 2:
        raise TrainError(
            "model",
            f"the pipeline folder's {part} has a vocabulary of {words}, {encoder} of {expected}: files lack",
        )


@torch.no_grad()
def _encode_pictures(
    folder: PipelineFolder, config: EncodeConfig, sources: Sequence[Source], device: torch.device
) -> list[EncodedPicture]:
    """Latents of every picture, in every size."""
    vae = folder.load_vae(DTYPES[config.precision], device)
    if config.precision == "fp16" and vae.config.get("force_upcast"):  # its numbers do not fit into fp16
        vae.float()
    family = folder.backbone.pipeline
    pictures = [
        _encode_picture(config, family, vae, source.path, number, side)
        for number, source in enumerate(tqdm(sources, desc="pictures"))
        for side in config.sides
    ]
    del vae
    _free(device)
    return pictures


def _encode_picture(
    config: EncodeConfig, family: Pipeline, vae: Any, path: Path, number: int, side: int
) -> EncodedPicture:
    picture = read_picture(path)
    size = bucket_size(*picture.size, side, config.bucket_step, config.buckets)
    generator = generator_of(config.seed, "encode", number)
    x, y = torch.rand(2, generator=generator).tolist()
    cut = fitted(picture, size, (0.5, 0.5) if config.center_crop else (x, y))

    def draw(distribution: Any) -> Tensor:
        mean: Tensor = distribution.mean
        if not config.sample_latents:
            return mean
        noise = torch.randn(mean.shape, generator=generator)
        drawn: Tensor = mean + distribution.std * noise.to(mean)
        return drawn

    def latent(image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        return family.encode_picture(vae, pixels[None].to(vae.device, vae.dtype), draw)[0].cpu()

    encoded = EncodedPicture(latent(cut), latent(ImageOps.mirror(cut)) if config.flip else None)
    if config.mask and "A" in cut.getbands():
        height, width = encoded.latent.shape[1:]
        weights = np.asarray(cut.getchannel("A").resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255
        require_visible(path.name, weights)
        encoded = encoded._replace(mask=torch.from_numpy(weights))
    return encoded


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
