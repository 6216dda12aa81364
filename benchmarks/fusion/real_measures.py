"""What a real model's pictures are measured by: DINO for contents, CLIP (or CSD) for styles, CLIP for words.

content: cosine of DINO features to the concept's picture (Caron et al. 2021, arXiv 2104.14294)
style:   cosine of CLIP image features to the style's picture; features trained for styles are better (Somepalli et
         al. 2024, arXiv 2404.01292), where a folder of that shape holds them
words:   whether, of all words of the study, the picture's own are nearest to it by CLIP
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from .measures import harmonic

COLUMNS = {"h": "H", "words": "other words", "words_both": "words beside both", "drift": "drift without triggers"}


class Scores(NamedTuple):
    """Of one picture: similarities, and whether its words are read (0 or 1)."""

    content: float
    style: float
    words: float


class Numbers(NamedTuple):
    """What one way to put one unit's adapters together gives.

    Attributes:
        content, style: how far prompts with both triggers go from the base's similarity to that of the adapter alone
            on prompts of its own; 0 to 1.
        h: their harmonic mean.
        words: words read, mean over prompts with one trigger and with none, both adapters on.
        words_both: words read in prompts with both triggers.
        drift: relative distance to the base's own predictions on prompts without triggers.
    """

    content: float
    style: float
    h: float
    words: float
    words_both: float
    drift: float


Shares = Mapping[str, Scores]  # kind -> means


def numbers(found: Shares, base: Shares, alone: Mapping[str, Scores], drift: float) -> Numbers:
    """The numbers of a unit.

    Args:
        found: of the method.
        base: of the model without adapters, the same prompts and noise.
        alone: side -> of that adapter alone, on prompts that hold its trigger only.
        drift: see `Numbers`.
    """
    content, style = (
        _share(
            getattr(found["both"], side) - getattr(base["both"], side),
            getattr(alone[side], side) - getattr(base[side], side),
        )
        for side in ("content", "style")
    )
    words = sum(found[kind].words for kind in ("content", "style", "none")) / 3
    return Numbers(content, style, harmonic(content, style), words, found["both"].words, drift)


def _share(gained: float, whole: float) -> float:
    """0 to 1; an adapter that alone brings nothing nearer cannot be lost either, and says so by 0."""
    return min(max(gained / whole, 0.0), 1.0) if whole > 0 else 0.0


class Judges:
    """The models that look at pictures, from folders in the layout of transformers; nothing is downloaded.

    Args:
        dino: a DINO or DINOv2 (AutoModel with an image processor).
        clip: a CLIP with tokenizer and image processor.
        style: a CLIP whose image features are for styles; None for `clip`.
        device: where they compute.

    Raises:
        OSError: a folder does not hold such a model.
    """

    def __init__(self, dino: Path, clip: Path, style: Path | None, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

        local = {"local_files_only": True}
        self.device = device
        self.dino = AutoModel.from_pretrained(dino, **local).to(device).eval()
        self.dino_pixels = AutoImageProcessor.from_pretrained(dino, **local)
        self.clip = CLIPModel.from_pretrained(clip, **local).to(device).eval()
        self.clip_inputs = CLIPProcessor.from_pretrained(clip, **local)
        self.style, self.style_inputs = self.clip, self.clip_inputs
        if style is not None:
            self.style = CLIPModel.from_pretrained(style, **local).to(device).eval()
            self.style_inputs = CLIPProcessor.from_pretrained(style, **local)

    @torch.no_grad()
    def content(self, picture: Image.Image) -> Tensor:
        """(width,) DINO's features, of length 1."""
        given = self.dino_pixels(images=picture, return_tensors="pt").to(self.device)
        return _unit(self.dino(**given).last_hidden_state[:, 0])[0]

    @torch.no_grad()
    def styled(self, picture: Image.Image) -> Tensor:
        """(width,) features of the style, of length 1."""
        return _image_features(self.style, self.style_inputs, picture, self.device)

    @torch.no_grad()
    def nearest(self, picture: Image.Image, words: Sequence[str]) -> int:
        """Which of these words the picture is nearest to."""
        given = self.clip_inputs(text=list(words), return_tensors="pt", padding=True, truncation=True).to(self.device)
        texts = _unit(_tensor(self.clip.get_text_features(**given)))
        image = _image_features(self.clip, self.clip_inputs, picture, self.device)
        return int((texts @ image).argmax())


def _image_features(model: Any, inputs: Any, picture: Image.Image, device: torch.device) -> Tensor:
    given = inputs(images=picture, return_tensors="pt").to(device)
    return _unit(_tensor(model.get_image_features(**given)))[0]


def _tensor(features: Any) -> Tensor:
    """Features, which newer versions of transformers wrap."""
    found: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return found


def _unit(features: Tensor) -> Tensor:
    return functional.normalize(features.float(), dim=-1)
