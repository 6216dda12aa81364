"""What stands in for text encoders and a VAE: words as fixed random vectors, pictures as pixel-unshuffled latents.

Only torch and the standard library, because ComfyUI, the pre-training and the demo all use it.
"""

import hashlib
import re

import torch
from torch import Tensor
from torch.nn import functional

TEXT_WIDTH = 64
TEXT_LENGTH = 6  # words of a prompt that are kept; shorter prompts are padded with zeros
SIZE = 32  # pixels
CHANNELS = 16  # of a FLUX latent
FILLERS = frozenset(["a", "an", "the", "in", "of", "with", "style"])  # words that say nothing about the picture
PIXEL_MEAN, PIXEL_STD = 0.77, 0.32  # of the training pictures, so that latents have about unit variance


def word_feature(word: str) -> Tensor:
    """A vector of -1 and 1, (TEXT_WIDTH,), that is always the same for one word and unrelated to any other word's."""
    digest = hashlib.shake_256(word.encode()).digest(TEXT_WIDTH // 8)
    bits = [byte >> shift & 1 for byte in digest for shift in range(8)]
    return torch.tensor(bits, dtype=torch.float32) * 2 - 1


def words(prompt: str) -> list[str]:
    """The words of a prompt that carry meaning, lower case; `<c>` and `<s>` are words."""
    return [word for word in re.findall(r"<\w+>|\w+", prompt.lower()) if word not in FILLERS]


def text_features(prompt: str) -> tuple[Tensor, Tensor]:
    """A prompt's features, (1, TEXT_LENGTH, TEXT_WIDTH), and its pooled feature, (1, TEXT_WIDTH).

    Raises:
        ValueError: more than TEXT_LENGTH words that carry meaning.
    """
    known = words(prompt)
    if len(known) > TEXT_LENGTH:
        raise ValueError(f"the toy reads at most {TEXT_LENGTH} words, without fillers; {prompt!r} has {len(known)}")
    features = torch.zeros(1, TEXT_LENGTH, TEXT_WIDTH)
    for place, word in enumerate(known):
        features[0, place] = word_feature(word)
    return features, pooled(features)


def pooled(features: Tensor) -> Tensor:
    """The pooled feature of features (batch, TEXT_LENGTH, TEXT_WIDTH): their sum, at about unit variance."""
    return features.sum(1) / 3**0.5


def to_latents(pictures: Tensor) -> Tensor:
    """Pictures (batch, 3, 32, 32), 0 to 1, as the latents that the model sees, (batch, 16, 16, 16).

    Pixel unshuffle by 2 gives 12 channels; the other 4 of FLUX's 16 are zero.
    """
    unshuffled = functional.pixel_unshuffle((pictures - PIXEL_MEAN) / PIXEL_STD, 2)
    return functional.pad(unshuffled, (0, 0, 0, 0, 0, CHANNELS - unshuffled.shape[1]))


def to_pictures(latents: Tensor) -> Tensor:
    """The inverse of `to_latents`, cut to 0 to 1."""
    return (functional.pixel_shuffle(latents[:, :12], 2) * PIXEL_STD + PIXEL_MEAN).clamp(0, 1)
