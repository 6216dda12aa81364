"""The two concepts that the toy FLUX has never seen, as pictures, training caches and adapters."""

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
from .pictures import BARRED, CONTENT_TRIGGER, HEART, STYLE_TRIGGER, SUNSET, Look, draw
from .toy.features import SIZE, text_features, to_latents

Settings = Mapping[str, str | int | float]
PACK = Path(__file__).resolve().parents[1]
ENLARGED = 4  # times that a picture file is larger than the toy's 32 pixels


class Concept(NamedTuple):
    """What an adapter learns: its file's name, its trigger word, and the caption of its one picture."""

    name: str
    trigger: str
    prompt: str
    look: Look


CONTENT = Concept(
    "toy_content", CONTENT_TRIGGER, f"a {CONTENT_TRIGGER} in red plain style", Look(HEART, "red", "plain")
)
STYLE = Concept("toy_style", STYLE_TRIGGER, f"a circle in {STYLE_TRIGGER} style", Look("circle", SUNSET, BARRED))
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
