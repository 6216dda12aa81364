"""The training cache: what `encode` or a host's own CLIP and VAE made of pictures and captions, in one file.

| key | shape | |
|---|---|---|
| `latent.<i>` | (channels, height, width) | in the transformer's own latent space, shifted and scaled |
| `latent.<i>.flip` | the same | the picture mirrored, where that was asked for |
| `mask.<i>` | (height, width) | weight of the loss, 0 to 1, where the picture has one |
| `text.<j>.embeds` | (tokens, width) | what the model sees of the text; zeros are no text to models that know masks |
| `text.<j>.pooled` | (width,) | CLIP's pooled output, for the families that take one |
| `plain.embeds`, `plain.pooled` | as `text` | the first picture's caption without the trigger, see `PlainText` |

The header's `qrlora.cache` is JSON: `{"version": 1, "items": [{"name", "text", "caption", "repeats", "is_class"}, ...],
"empty_text": j or null}`. Item i has latent i; `text` is its caption's j. `qrlora.plain` is `{"trigger", "prompt"}`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import FileFormatError
from .linalg import require_finite
from .storage import TensorFile
from .writing import verify_checksum

CACHE_VERSION = 1
MAX_REPEATS = 10_000
SOURCE_KEY = "qrlora.source_key"
PLAIN, PLAIN_KEY = "plain", "qrlora.plain"


@dataclass(frozen=True, slots=True)
class CacheItem:
    """One picture of a cache.

    Attributes:
        name: the picture's file name or a description, for messages.
        text: which text belongs to it.
        caption: that text in words.
        repeats: how often it counts in one pass over the data.
        is_class: a picture of the class, for prior preservation.
    """

    name: str
    text: int
    caption: str = ""
    repeats: int = 1
    is_class: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for what a damaged or foreign header may hold."""
        words = isinstance(self.name, str) and isinstance(self.caption, str) and isinstance(self.is_class, bool)
        numbers = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.text, self.repeats))
        if not words or not numbers or self.text < 0 or not 1 <= self.repeats <= MAX_REPEATS:
            raise ValueError(f"an item is {self.name!r}, text {self.text!r}, repeats {self.repeats!r}")


class EncodedText(NamedTuple):
    """`embeds` (tokens, width) and, where a family of models takes one, `pooled` (width,)."""

    embeds: Tensor
    pooled: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "EncodedText":
        """The same of every tensor that is there."""
        return EncodedText(change(self.embeds), None if self.pooled is None else change(self.pooled))


class PlainText(NamedTuple):
    """A caption without the trigger: nothing that is trained on, and no part of what tells data from others.

    Attributes:
        trigger: what was taken out.
        prompt: what is left, in words.
        text: of that.
    """

    trigger: str
    prompt: str
    text: EncodedText


class ModelInputs(NamedTuple):
    """What a model takes of a cache: `family`, its name for people; `channels` of latents; `text`, field of an
    EncodedText -> its width."""

    family: str
    channels: int
    text: Mapping[str, int]


class EncodedPicture(NamedTuple):
    """`latent` and `flipped` (channels, height, width), `mask` (height, width)."""

    latent: Tensor
    flipped: Tensor | None = None
    mask: Tensor | None = None


class TrainingCache:
    """A training cache. Its checksum is compared when it is opened; latents and texts are read when they are used.

    Attributes:
        path: where it lies.
        items: the pictures.
        text_count: how many captions.
        empty_text: index of the empty caption, or None.
        metadata: the header's strings.

    Raises:
        FileFormatError: another kind of file, a damaged one, or parts that are missing or do not fit together.
    """

    def __init__(self, path: Path) -> None:
        verify_checksum(path)
        file = TensorFile(path)
        self.path, self.metadata = file.path, file.metadata
        self._file = file
        try:
            table = json.loads(file.metadata["qrlora.cache"])
            if table["version"] != CACHE_VERSION:
                raise ValueError(f"version {table['version']}")
            self.items = tuple(CacheItem(**item) for item in table["items"])
            self.empty_text: int | None = table["empty_text"]
            if self.empty_text is not None and type(self.empty_text) is not int:
                raise ValueError(f"empty_text {self.empty_text!r}")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise FileFormatError(
                f"{file.path.name} is not a training cache of version {CACHE_VERSION} ({error}); write one with "
                "`python -m train encode`"
            ) from error
        self.text_count = sum(key.startswith("text.") and key.endswith(".embeds") for key in file.specs)
        self._check()

    def latent(self, index: int, flipped: bool = False) -> Tensor:
        """(channels, height, width); the mirrored one only where `has_flip` says so."""
        return self._tensor(f"latent.{index}.flip" if flipped else f"latent.{index}")

    def latent_shape(self, index: int) -> tuple[int, ...]:
        return self._file.specs[f"latent.{index}"].shape

    def has_flip(self, index: int) -> bool:
        return f"latent.{index}.flip" in self._file.specs

    def mask(self, index: int) -> Tensor | None:
        """(height, width), 0 to 1, or None."""
        key = f"mask.{index}"
        return self._tensor(key) if key in self._file.specs else None

    def text(self, index: int) -> EncodedText:
        return self._text(f"text.{index}")

    def plain(self) -> PlainText | None:
        """The first picture's caption without the trigger; None where there is none, as in older caches."""
        if PLAIN_KEY not in self.metadata:
            return None
        words = json.loads(self.metadata[PLAIN_KEY])
        return PlainText(words["trigger"], words["prompt"], self._text(PLAIN))

    def _text(self, key: str) -> EncodedText:
        pooled = f"{key}.pooled"
        return EncodedText(self._tensor(f"{key}.embeds"), self._tensor(pooled) if pooled in self._file.specs else None)

    def identity(self) -> str:
        """What tells these data from others: the key of what they were made from, else the fingerprint."""
        return self.metadata.get(SOURCE_KEY) or self.fingerprint()

    def fingerprint(self) -> str:
        """Sixteen hex digits of everything in the file that is trained on."""
        digest = hashlib.sha256(self.metadata["qrlora.cache"].encode())
        for key, spec in sorted(self._file.specs.items()):
            if key.startswith(f"{PLAIN}."):
                continue
            digest.update(f"{key}{spec.dtype}{spec.shape}".encode())
            digest.update(self._tensor(key).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def _tensor(self, key: str) -> Tensor:
        tensor = self._file.tensor(key)
        require_finite(tensor, f"{self.path.name}: {key}")
        return tensor

    def _check(self) -> None:
        specs, name = self._file.specs, self.path.name
        for index, item in enumerate(self.items):
            latent = specs.get(f"latent.{index}")
            if latent is None or len(latent.shape) != 3 or any(side % 2 for side in latent.shape[1:]):
                held = latent.shape if latent else "none"
                raise FileFormatError(f"{name}: latent {index} of {item.name} is {held}, expected 3-D, even sides")
            if 0 in latent.shape:
                raise FileFormatError(f"{name}: latent {index} of {item.name} is {latent.shape}: empty")
            for key, shape in ((f"latent.{index}.flip", latent.shape), (f"mask.{index}", latent.shape[1:])):
                if key in specs and specs[key].shape != shape:
                    raise FileFormatError(f"{name}: {key} is {specs[key].shape}, expected {shape}")
            if item.text >= self.text_count:
                raise FileFormatError(f"{name}: item {item.name} names text {item.text} of {self.text_count}")
        for index in range(self.text_count):
            self._check_text(f"text.{index}", f"text {index}")
        if PLAIN_KEY in self.metadata:
            self._check_text(PLAIN, "the caption without the trigger")
            try:
                words = json.loads(self.metadata[PLAIN_KEY])
                if not all(isinstance(words[key], str) for key in ("trigger", "prompt")):
                    raise TypeError(str(words))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise FileFormatError(f"{name}: {PLAIN_KEY} is damaged ({error!r:.80})") from error
        if self.empty_text is not None and not 0 <= self.empty_text < self.text_count:
            raise FileFormatError(f"{name}: the empty caption is text {self.empty_text} of {self.text_count}")
        if not any(not item.is_class for item in self.items):
            raise FileFormatError(f"{name} holds no picture to train on")

    def _check_text(self, key: str, title: str) -> None:
        specs, name = self._file.specs, self.path.name
        embeds, pooled = specs.get(f"{key}.embeds"), specs.get(f"{key}.pooled")
        one_kind = (pooled is None) == ("text.0.pooled" not in specs)
        if embeds is None or len(embeds.shape) != 2 or not one_kind or (pooled and len(pooled.shape) != 1):
            raise FileFormatError(f"{name}: {title} is incomplete")
        if 0 in embeds.shape or (pooled and 0 in pooled.shape):
            raise FileFormatError(f"{name}: {title} is empty")
