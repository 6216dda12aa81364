"""Concepts that the toy FLUX has never seen, in pairs: as pictures, training caches and adapters."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from qrlora_core import CacheItem, EncodedPicture, EncodedText, save_cache

from .model import WEIGHTS
from .pictures import CONTENT_TRIGGER, NEW_SHAPES, NEW_STYLES, STYLE_TRIGGER, Look, draw
from .toy.features import SIZE, text_features, to_latents

Settings = Mapping[str, str | int | float]
PACK = Path(__file__).resolve().parents[1]
ENLARGED = 4  # times that a picture file is larger than the toy's 32 pixels


class Concept(NamedTuple):
    """What an adapter learns.

    Attributes:
        name: of its file.
        trigger: its word.
        prompt: the caption of its one picture.
        look: what that picture shows.
        words: what is new in it, for a person.
    """

    name: str
    trigger: str
    prompt: str
    look: Look
    words: str


class Pair(NamedTuple):
    """A style and a content that are merged."""

    style: Concept
    content: Concept

    @property
    def look(self) -> Look:
        """What a picture of both shows."""
        return Look(self.content.look.shape, self.style.look.colour, self.style.look.texture)


WORDS = {
    "heart": "a heart",
    "ell": "a letter L",
    "bow": "a bow",
    "arch": "an arch",
    "tee": "a letter T",
    "sunset": "upright bars in orange and violet",
    "violet": "slanting lines in violet and yellow",
    "slate": "slanting lines in grey and orange",
    "rose": "a grid in rose and dark blue",
    "brown": "small blocks in brown and mint",
}


def pair_of(content: str, style: str) -> Pair:
    """A shape and a palette (with its texture) that the toy has never seen; the first of each have the plain names.

    Raises:
        KeyError: there is no such shape or palette.
    """
    learned = Concept(
        "toy_content" if content == NEW_SHAPES[0] else f"toy_content_{content}",
        CONTENT_TRIGGER,
        f"a {CONTENT_TRIGGER} in red plain style",
        Look(content, "red", "plain"),
        WORDS[content],
    )
    name = "toy_style" if style == next(iter(NEW_STYLES)) else f"toy_style_{style}"
    look = Look("circle", style, NEW_STYLES[style])
    return Pair(Concept(name, STYLE_TRIGGER, f"a circle in {STYLE_TRIGGER} style", look, WORDS[style]), learned)


PAIRS = {f"{content}-{style}": pair_of(content, style) for content in NEW_SHAPES for style in NEW_STYLES}
DEFAULT_PAIR = next(iter(PAIRS))
STYLE, CONTENT = PAIRS[DEFAULT_PAIR]
ACT, SUM = "by prompt, one pass each", "always"  # of Merge: what the demo shows, and what it is compared with
MERGED_PROMPT = f"a {CONTENT_TRIGGER} in {STYLE_TRIGGER} style"

# What training is told beyond its defaults: settings of `fit`, the first ones widgets of the Train node
FIT: Settings = {
    "method": "delta_r_triangular",
    "rank": 16,
    "alpha": 16.0,
    "steps": 160,
    "learning_rate": 1.5e-3,
    "batch_size": 8,
    "gradient_accumulation": 1,
    "seed": 0,
}
MORE: Settings = {"precision": "fp32", "base_storage": "fp32"}


def draw_picture(concept: Concept, folder: Path) -> Path:
    """Write the concept's one picture, 128 x 128 pixels, as a PNG."""
    path = folder / f"{concept.name}.png"
    to_image(draw(concept.look)).save(path)
    return path


def to_image(picture: Tensor) -> Image.Image:
    """A picture of the toy, (3, 32, 32), 0 to 1, as it is shown and saved: 128 x 128 pixels."""
    pixels = picture.movedim(0, -1).mul(255).round().to(torch.uint8)
    side = SIZE * ENLARGED
    return Image.fromarray(pixels.numpy()).resize((side, side), Image.Resampling.NEAREST)


def read_picture(path: Path) -> Tensor:
    """A picture file as the toy sees it, (1, 3, 32, 32), 0 to 1."""
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255)
    return functional.interpolate(pixels.movedim(-1, 0)[None], size=(SIZE, SIZE), mode="area")


def write_cache(concept: Concept, picture: Path, path: Path) -> Path:
    """What `encode` does with FLUX's encoders: the picture's latent and the caption's features in one file."""
    features, pooled = text_features(concept.prompt)
    return save_cache(
        path,
        [CacheItem(picture.name, 0, concept.prompt)],
        [EncodedPicture(to_latents(read_picture(picture))[0])],
        [EncodedText(features[0], pooled[0])],
        overwrite=True,
    )


def fit(concept: Concept, out: Path, scratch: Path, **changes: str | int | float) -> Path:
    """Draw the picture, write the cache, and run the trainer's own command; its progress bar goes to the terminal.

    Args:
        out: where picture and adapter go; those of an earlier demo are replaced.
        scratch: where cache, basis and run go; the next concept finds the basis there.
        changes: settings other than FIT and MORE.

    Raises:
        subprocess.CalledProcessError: the trainer failed; it has said why.
    """
    for folder in (out, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    data = write_cache(concept, draw_picture(concept, out), scratch / f"{concept.name}_cache.safetensors")
    made = scratch / concept.name / f"{concept.name}.safetensors"
    settings = {
        "model": WEIGHTS,
        "data": data,
        "run_dir": scratch / concept.name,
        "output": made,
        "basis_cache": scratch / "bases",
        "name": concept.name,
        "trigger": concept.trigger,
        "prompt": concept.prompt,
        **FIT,
        **MORE,
        **changes,
    }
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "train", "fit", *flags, "--no-gradient-checkpointing"]
    # layers this small take microseconds: threads that wait busily for one another slow a shared machine down tenfold
    subprocess.run(command, cwd=PACK, check=True, env={"OMP_WAIT_POLICY": "passive", **os.environ})
    return Path(shutil.move(made, out / made.name))  # the trainer itself replaces no file
