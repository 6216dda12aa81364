"""Pictures and captions -> training cache, by a local diffusers pipeline: text encoders first, then the VAE."""

import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from qrlora_core import CacheItem, EncodedPicture, EncodedText, bucket_size, save_cache

from .config import EncodeConfig
from .data import generator_of
from .errors import TrainError
from .model import DTYPES
from .tools import chosen_device

log = logging.getLogger(__name__)

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"}


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

    Returns:
        The file.

    Raises:
        TrainError: reason "data": no pictures, a broken picture, a missing caption; "model": the pipeline folder lacks
            a part.
    """
    output = Path(config.output)
    if output.exists():
        raise TrainError("settings", f"{output.name} exists already; choose another output")
    sources = _sources(config)
    device = chosen_device(config.device)
    texts = list(dict.fromkeys(["", *(source.caption for source in sources)]))
    encoded_texts = _encode_texts(config, texts, device)
    pictures, kept = _encode_pictures(config, sources, device)
    items = [
        CacheItem(source.path.name, texts.index(source.caption), source.caption, config.repeats, source.is_class)
        for source in kept
    ]
    metadata = {"qrlora.trigger": config.trigger, "qrlora.prompt": config.instance_prompt}
    return save_cache(output, items, pictures, encoded_texts, empty_text=0, metadata=metadata)


def read_picture(path: Path) -> Image.Image:
    """A picture, turned as its camera was held, RGB or RGBA.

    Raises:
        TrainError: reason "data", naming the file.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            transparent = "A" in picture.getbands() or "transparency" in picture.info
            return picture.convert("RGBA" if transparent else "RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise TrainError(
            "data", f"the picture {path.name} cannot be read ({error}); mend or remove it, or set skip_broken"
        ) from error


def fitted(picture: Image.Image, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Resize to cover `size` (width, height) and cut off what is too much; `place` 0.5, 0.5 keeps the middle."""
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS, centering=place)


def _sources(config: EncodeConfig) -> list[Source]:
    sources = [Source(path, _caption(path, config), False) for path in _files(config.pictures)]
    if not sources:
        raise TrainError("data", f"no pictures in {', '.join(Path(p).name for p in config.pictures)}")
    sources += [Source(path, config.class_prompt, True) for path in _files(config.class_pictures)]
    return sources


def _files(names: Iterable[str]) -> list[Path]:
    """Files as they are, and the pictures of folders in order of their names."""
    found: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            found += sorted(one for one in path.iterdir() if one.suffix.lower() in PICTURES and one.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise TrainError("data", f"{path.name} does not exist")
    return found


def _caption(path: Path, config: EncodeConfig) -> str:
    beside = path.with_suffix(".txt")
    caption = config.instance_prompt
    if config.captions != "prompt" and beside.is_file():
        try:
            caption = beside.read_text(encoding="utf-8-sig").strip()
        except ValueError as error:
            raise TrainError("data", f"the caption {beside.name} is not UTF-8") from error
    elif config.captions == "files":
        raise TrainError("data", f"{path.name} has no caption: write {beside.name} beside it, or set captions to auto")
    if not caption:
        raise TrainError("data", f"{path.name} has no caption: write {beside.name} beside it, or give instance_prompt")
    return caption.replace("[trigger]", config.trigger)


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
    encoded = []
    for text in tqdm(texts, desc="captions"):
        embeds, pooled, _ = pipeline.encode_prompt(text, None, device=device, max_sequence_length=config.max_tokens)
        encoded.append(EncodedText(embeds[0].cpu(), pooled[0].cpu()))
    del pipeline
    _free(device)
    return encoded


@torch.no_grad()
def _encode_pictures(
    config: EncodeConfig, sources: Sequence[Source], device: torch.device
) -> tuple[list[EncodedPicture], list[Source]]:
    """Latents of every picture that can be read, and which those are."""
    vae = load_part(
        lambda: AutoencoderKL.from_pretrained(
            config.pipeline, subfolder="vae", torch_dtype=DTYPES[config.precision], local_files_only=True
        ).to(device),
        "VAE",
    )
    pictures, kept = [], []
    for number, source in enumerate(tqdm(sources, desc="pictures")):
        try:
            picture = read_picture(source.path)
        except TrainError as error:
            if not config.skip_broken:
                raise
            log.warning("%s", error)
            continue
        pictures.append(_encode_picture(config, vae, picture, number))
        kept.append(source)
    if not any(not source.is_class for source in kept):
        raise TrainError("data", "none of the pictures can be read")
    del vae
    _free(device)
    return pictures, kept


def _encode_picture(config: EncodeConfig, vae: Any, picture: Image.Image, number: int) -> EncodedPicture:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = bucket_size(*picture.size, config.resolution, config.bucket_step, config.buckets)
    generator = generator_of(config.seed, "encode", number)
    x, y = torch.rand(2, generator=generator).tolist()
    cut = fitted(picture, size, (0.5, 0.5) if config.center_crop else (x, y))

    def latent(one: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.asarray(one.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
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
        mask = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)
    return EncodedPicture(latent(cut), latent(ImageOps.mirror(cut)) if config.flip else None, mask)


def load_part(load: Callable[[], Any], what: str) -> Any:
    """Load something of a pipeline folder.

    Raises:
        TrainError: reason "model".
    """
    try:
        return load()
    except (OSError, ValueError, ImportError) as error:
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
