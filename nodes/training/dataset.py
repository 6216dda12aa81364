"""Pictures and captions, as they come from the graph or a folder, and as the trainer's cache."""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...qrlora_core import (
    CacheItem,
    EncodedPicture,
    EncodedText,
    FileFormatError,
    ModelInputs,
    PathError,
    PlainText,
    TrainingCache,
    bucket_size,
    plain_caption,
    save_cache,
)
from ...train.config import EncodeConfig
from ...train.data.captions import DEFAULT_PROMPT, DatasetError, caption_of, picture_files
from ...train.data.pictures import read_picture, require_visible
from .. import host
from ..host import encoders
from ..host.base_format import BaseFormat
from ..host.protocols import Clip, Vae

log = logging.getLogger(__name__)

_MADE_FOR = "qrlora.made_for"  # kind of model; caches of FLUX.1 from before it was kept lack it
_RECIPE = 2  # raised when the same pictures would be encoded otherwise


class Picture(NamedTuple):
    """`load()` gives (height, width, 3 or 4), 0 to 1; the fourth channel is alpha. `is_class`: of the class, for prior
    preservation.
    """

    name: str
    caption: str
    load: Callable[[], Tensor]
    is_class: bool = False


def graph_pictures(batches: Sequence[Tensor], caption: str) -> list[Picture]:
    """Every picture of every batch (n, height, width, channels)."""
    if not caption.strip():
        raise DatasetError(f"instance_prompt is empty; pictures from the graph need one, such as {DEFAULT_PROMPT!r}")
    pictures = [picture for batch in batches for picture in batch]
    return [
        Picture(f"image {number}", caption, functools.partial(_plain, picture))
        for number, picture in enumerate(pictures, 1)
    ]


def class_pictures(batches: Sequence[Tensor], prompt: str) -> list[Picture]:
    """Pictures of the class, and what they all are called; none where none are connected, whatever the prompt.

    Raises:
        DatasetError: there are pictures and no prompt.
    """
    if batches and not prompt.strip():
        raise DatasetError("class_images need a class_prompt, such as 'a photo of a dog', without the trigger")
    pictures = [picture for batch in batches for picture in batch]
    return [
        Picture(f"class image {number}", prompt.strip(), functools.partial(_plain, picture), True)
        for number, picture in enumerate(pictures, 1)
    ]


def folder_pictures(folder: Path, prompt: str, trigger: str) -> list[Picture]:
    """The pictures of a folder, not deeper; the caption is in a .txt beside each, or else the instance prompt.

    Raises:
        DatasetError: no picture, a caption that is not UTF-8 text, or neither caption nor prompt.
    """
    return [
        Picture(path.name, caption_of(path, prompt, trigger), functools.partial(_pixels, path))
        for path in picture_files(folder)
    ]


def cache_key(pictures: Sequence[Picture], settings: EncodeConfig, clip: Clip, vae: Vae, empty_caption: bool) -> str:
    """Sixteen hex digits of everything that the cache's content follows from: pixels, captions, encoders, settings."""
    digest = hashlib.sha256()
    for picture in pictures:
        pixels = picture.load().contiguous()
        described = [picture.caption, list(pixels.shape), *(["class"] if picture.is_class else [])]
        digest.update(json.dumps(described).encode())
        digest.update(pixels.numpy().data)
    settings_used = [encoders.weights_identity(clip), encoders.weights_identity(vae), empty_caption, _RECIPE]
    settings_used += [settings.resolution, settings.bucket_step, settings.buckets, settings.flip, settings.mask]
    if len(settings.sides) > 1 or settings.repeats > 1:  # caches from before there were these keep their names
        settings_used += [settings.sides, settings.repeats]
    digest.update(json.dumps(settings_used).encode())
    return digest.hexdigest()[:16]


class Encoders(NamedTuple):
    """The graph's CLIP and VAE, and what the model that is trained on takes of them."""

    clip: Clip
    vae: Vae
    base: BaseFormat
    taken: ModelInputs


def encode(
    path: Path,
    pictures: Sequence[Picture],
    settings: EncodeConfig,
    graph: Encoders,
    empty_caption: bool,
    trigger: str = "",
) -> Path:
    """Write the training cache with the graph's own CLIP and VAE, unless it is there already.

    Args:
        path: named after `cache_key`.
        pictures: what to encode.
        settings: resolutions, repeats, buckets, flip, mask.
        graph: what they are encoded with.
        empty_caption: also encode "", for caption dropout.
        trigger: also encode the first caption without it, which is not trained on and so no part of `cache_key`.

    Raises:
        DatasetError: a picture cannot be read, or its mask leaves nothing to train on.
        EncodeError: the CLIP or VAE is of another model.
    """
    if path.is_file():
        try:
            if TrainingCache(path).metadata.get(_MADE_FOR, graph.base.name) == graph.base.name:
                return path
            log.info("QR-LoRA: the cache was made for another kind of model; it is written anew")
        except FileFormatError as error:
            log.warning("QR-LoRA: the cache is encoded again: %s", error)
    captions = list(dict.fromkeys(picture.caption for picture in pictures))
    texts = captions + ([""] if empty_caption and "" not in captions else [])
    items = [
        CacheItem(picture.name, captions.index(picture.caption), picture.caption, settings.repeats, picture.is_class)
        for picture in pictures
        for _ in settings.sides
    ]
    plain = plain_caption(captions[0], trigger)
    sized = [(picture, side) for picture in pictures for side in settings.sides]
    work: list[Any] = [*texts, *([] if plain is None else [plain]), *sized]
    encoded_texts: list[EncodedText] = []
    encoded: list[EncodedPicture] = []
    for item in host.with_progress(work):
        if isinstance(item, str):
            encoded_texts.append(encoders.encode_text(graph.clip, item, graph.base, graph.taken))
        else:
            picture, side = item
            encoded.append(_encoded(picture, side, settings, graph))
    without = None if plain is None else PlainText(trigger, plain, encoded_texts.pop())
    useless = path.is_file()
    empty_text = texts.index("") if "" in texts else None
    try:
        save_cache(
            path, items, encoded, encoded_texts, empty_text=empty_text, overwrite=useless, source_key=path.stem,
            metadata={_MADE_FOR: graph.base.name}, plain=without,
        )  # fmt: skip
    except PathError:
        if useless or not path.is_file():  # otherwise another ComfyUI wrote the same meanwhile
            raise
    return path


def _encoded(picture: Picture, side: int, settings: EncodeConfig, graph: Encoders) -> EncodedPicture:
    pixels = picture.load()
    height, width = pixels.shape[:2]
    size = bucket_size(width, height, side, settings.bucket_step, settings.buckets)
    pixels = encoders.resized(pixels, *size)
    color, alpha = pixels[..., :3], pixels[..., 3] if pixels.shape[-1] > 3 else None

    def latent_of(colors: Tensor) -> Tensor:
        return encoders.encode_picture(graph.vae, colors, graph.base, graph.taken)

    latent, flipped = latent_of(color), latent_of(color.flip(1)) if settings.flip else None
    mask = None
    if settings.mask and alpha is not None:
        mask = torch.nn.functional.interpolate(alpha[None, None], size=latent.shape[1:], mode="area")[0, 0]
        require_visible(picture.name, mask.numpy())
    return EncodedPicture(latent, flipped, mask)


def _plain(picture: Tensor) -> Tensor:
    return picture.detach().float().cpu()


def _pixels(path: Path) -> Tensor:
    """(height, width, 3 or 4), 0 to 1."""
    return torch.from_numpy(np.asarray(read_picture(path), dtype=np.float32) / 255.0)
