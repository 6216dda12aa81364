"""Writes a training cache; its keys and its header are those of `cache`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from .cache import (
    CACHE_VERSION,
    PLAIN,
    PLAIN_KEY,
    SOURCE_KEY,
    CacheItem,
    EncodedPicture,
    EncodedText,
    PlainText,
    TrainingCache,
)
from .errors import FileFormatError
from .linalg import require_finite
from .storage import TensorSpec
from .writing import write_tensors

_STORED = (torch.float32, torch.float16, torch.bfloat16)


def save_cache(
    path: Path,
    items: Sequence[CacheItem],
    pictures: Sequence[EncodedPicture],
    texts: Sequence[EncodedText],
    *,
    empty_text: int | None = None,
    metadata: dict[str, str] | None = None,
    overwrite: bool = False,
    source_key: str = "",
    plain: PlainText | None = None,
) -> Path:
    """Write a training cache, checked by opening it before it takes its name.

    Args:
        path: must not exist unless `overwrite`.
        items, pictures: one of each per picture, in the same order.
        texts: distinct captions.
        empty_text: which text is the empty caption, for caption dropout.
        metadata: more strings for the header.
        source_key: a digest of everything that the content follows from (pixels, captions, encoders, settings). Two
            caches with one key are the same data, although encoding twice may give other last bits.
        plain: the first picture's caption without the trigger.

    Raises:
        FileFormatError: the counts, shapes or references do not fit together.
        WeightError: a tensor holds NaN or Inf.
        PathError: the file exists or cannot be written.
    """
    if len(items) != len(pictures):
        raise FileFormatError(f"a training cache of {len(items)} items got {len(pictures)} pictures")
    tensors: dict[str, Tensor] = {}
    for index, picture in enumerate(pictures):
        tensors[f"latent.{index}"] = picture.latent
        if picture.flipped is not None:
            tensors[f"latent.{index}.flip"] = picture.flipped
        if picture.mask is not None:
            tensors[f"mask.{index}"] = picture.mask
    named = {f"text.{index}": text for index, text in enumerate(texts)} | ({PLAIN: plain.text} if plain else {})
    for key, text in named.items():
        tensors[f"{key}.embeds"] = text.embeds
        if text.pooled is not None:
            tensors[f"{key}.pooled"] = text.pooled
    for key, tensor in tensors.items():
        require_finite(tensor, key)
        if key.startswith("mask.") and not 0 <= float(tensor.min()) <= float(tensor.max()) <= 1:
            raise FileFormatError(f"{key} holds numbers outside of 0 to 1")
    table = {"version": CACHE_VERSION, "items": [asdict(item) for item in items], "empty_text": empty_text}
    header = {"qrlora.format": "training_cache", "qrlora.cache": json.dumps(table), **(metadata or {})}
    if source_key:
        header[SOURCE_KEY] = source_key
    if plain:
        header[PLAIN_KEY] = json.dumps({"trigger": plain.trigger, "prompt": plain.prompt})
    specs = {
        key: TensorSpec(tensor.dtype if tensor.dtype in _STORED else torch.float32, tuple(tensor.shape))
        for key, tensor in tensors.items()
    }

    def check(temporary: Path) -> None:
        problem = ""
        try:
            TrainingCache(temporary)
        except FileFormatError as error:
            problem = str(error).replace(temporary.name, Path(path).name)
        if problem:
            raise FileFormatError(problem)

    return write_tensors(path, specs, tensors.items(), header, overwrite=overwrite, check=check, checksum=True)
