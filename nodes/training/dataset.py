"""Pictures and captions, as they come from the graph or a folder, and as the trainer's cache."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...qrlora_core import (
    CacheItem,
    EncodedPicture,
    EncodedText,
    FileFormatError,
    PathError,
    QRLoRAError,
    TrainingCache,
    bucket_size,
    save_cache,
)
from ...train.config import EncodeConfig
from .. import host
from ..host import encoders

log = logging.getLogger(__name__)

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_RECIPE = 1  # raised when the same pictures would be encoded otherwise


class DataError(QRLoRAError):
    """There are no pictures, one cannot be read, or one has no caption."""


class Picture(NamedTuple):
    """`load()` gives (height, width, 3 or 4), 0 to 1; the fourth channel is alpha."""

    name: str
    caption: str
    load: Callable[[], Tensor]


def graph_pictures(batches: Sequence[Tensor], caption: str) -> list[Picture]:
    """Every picture of every batch (n, height, width, channels)."""
    if not caption.strip():
        raise DataError('instance_prompt is empty; pictures from the graph need one, such as "a photo of a <c> dog"')
    pictures = [picture for batch in batches for picture in batch]
    return [
        Picture(f"image {number}", caption, lambda picture=picture: picture.detach().float().cpu())
        for number, picture in enumerate(pictures, 1)
    ]


def folder_pictures(folder: Path, prompt: str, trigger: str) -> list[Picture]:
    """The pictures of a folder, not deeper; the caption is in a .txt beside each, or else the instance prompt.

    Raises:
        DataError: no picture, a caption that is not UTF-8 text, or neither caption nor prompt.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
    if not files:
        raise DataError(f"the dataset {folder.name!r} holds no pictures ({', '.join(ENDINGS)})")
    pictures = []
    for path in files:
        caption = prompt
        beside = path.with_suffix(".txt")
        if beside.is_file():
            try:
                caption = with_trigger(beside.read_text(encoding="utf-8-sig").strip(), trigger)
            except (OSError, UnicodeError) as error:
                raise DataError(f"the caption {beside.name} cannot be read ({error}); save it as UTF-8 text") from error
        if not caption.strip():
            raise DataError(f"{path.name} has no caption: write {beside.name} beside it, or an instance_prompt")
        pictures.append(Picture(path.name, caption, lambda path=path: _read(path)))
    return pictures


def folder_version(folder: Path) -> str:
    """Changes when a picture or caption of the folder does."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (*ENDINGS, ".txt"))
    status = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(status).encode()).hexdigest()[:16]


def with_trigger(text: str, trigger: str) -> str:
    """`[trigger]` in a prompt or caption is the trigger word."""
    return text.replace("[trigger]", trigger)


def cache_key(pictures: Sequence[Picture], settings: EncodeConfig, clip: Any, vae: Any, empty_caption: bool) -> str:
    """Sixteen hex digits of everything that the cache's content follows from: pixels, captions, encoders, settings."""
    digest = hashlib.sha256()
    for picture in pictures:
        pixels = picture.load().contiguous()
        digest.update(json.dumps([picture.caption, list(pixels.shape)]).encode())
        digest.update(pixels.numpy().data)
    rest = [encoders.weights_identity(clip), encoders.weights_identity(vae), empty_caption, _RECIPE]
    rest += [settings.resolution, settings.bucket_step, settings.buckets, settings.flip, settings.mask]
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()[:16]


def encode(
    path: Path, pictures: Sequence[Picture], settings: EncodeConfig, clip: Any, vae: Any, empty_caption: bool
) -> Path:
    """Write the training cache with the graph's own CLIP and VAE, unless it is there already.

    Args:
        path: named after `cache_key`.
        pictures: what to encode.
        settings: resolution, buckets, flip, mask.
        clip, vae: the graph's.
        empty_caption: also encode "", for caption dropout.

    Raises:
        DataError: a picture cannot be read.
        EncodeError: the CLIP or VAE is not FLUX's.
    """
    if path.is_file():
        try:
            TrainingCache(path)
            return path
        except FileFormatError as error:
            log.warning("QR-LoRA: the cache is encoded again: %s", error)
    captions = list(dict.fromkeys(picture.caption for picture in pictures))
    texts = captions + ([""] if empty_caption and "" not in captions else [])
    items = [CacheItem(picture.name, captions.index(picture.caption), picture.caption) for picture in pictures]
    work: list[Any] = [*texts, *pictures]
    encoded_texts: list[EncodedText] = []
    encoded: list[EncodedPicture] = []
    for one in host.with_progress(work):
        if isinstance(one, str):
            encoded_texts.append(encoders.encode_text(clip, one))
        else:
            encoded.append(_encoded(one.load(), settings, vae))
    broken = path.is_file()
    empty_text = texts.index("") if "" in texts else None
    try:
        save_cache(path, items, encoded, encoded_texts, empty_text=empty_text, overwrite=broken, source_key=path.stem)
    except PathError:
        if broken or not path.is_file():  # otherwise another ComfyUI wrote the same meanwhile
            raise
    return path


def _encoded(pixels: Tensor, settings: EncodeConfig, vae: Any) -> EncodedPicture:
    height, width = pixels.shape[:2]
    size = bucket_size(width, height, settings.resolution, settings.bucket_step, settings.buckets)
    pixels = encoders.resized(pixels, *size)
    color, alpha = pixels[..., :3], pixels[..., 3] if pixels.shape[-1] > 3 else None
    latent = encoders.encode_picture(vae, color)
    flipped = encoders.encode_picture(vae, color.flip(1)) if settings.flip else None
    mask = None
    if settings.mask and alpha is not None:
        mask = torch.nn.functional.interpolate(alpha[None, None], size=latent.shape[1:], mode="area")[0, 0]
    return EncodedPicture(latent, flipped, mask)


def _read(path: Path) -> Tensor:
    """(height, width, 3 or 4), 0 to 1, turned as its EXIF says."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            transparent = "A" in picture.getbands() or "transparency" in picture.info
            if picture.mode.startswith("I"):  # 16 bits of grey, which PIL's own conversion would clip to 8
                grey = np.asarray(picture, dtype=np.float32) / 65535.0
                pixels = np.repeat(grey[..., None], 3, axis=2)
            else:
                pixels = np.asarray(picture.convert("RGBA" if transparent else "RGB"), dtype=np.float32) / 255.0
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path.name} cannot be read as a picture ({error}); repair it or take it out") from error
    return torch.from_numpy(pixels)
