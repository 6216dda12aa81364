"""What a trained adapter does at several strengths, as one picture: samples by the graph's VAE, and the two curves."""

import json
import logging
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...qrlora_core import PathError, QRLoRAError, TensorFile, whole_file
from ...qrlora_plots import contact_sheet, images_of, strengths_image
from ..host import encoders
from ..host.base_format import base_format
from . import run_pictures
from .request import Request
from .runs import RunFolder

log = logging.getLogger(__name__)

_NONE = "strengths were not looked at: see the log, or 'strengths' in Train \u0394R Options"
# of a damaged file, or a VAE that fails, as when memory runs out: neither may fail a training that is done
_DAMAGED = (OSError, ValueError, LookupError, TypeError, RuntimeError, QRLoRAError)


def show_strengths(run: RunFolder, request: Request) -> Tensor:
    """(1, height, width, 3), also left in the run folder for the panel; a line of text where nothing was looked at."""
    path = run.strengths(request.steps, ".json")
    if not path.is_file():
        return run_pictures.note(_NONE)
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        latents = TensorFile(run.strengths(request.steps, ".safetensors")).tensor("latent")
        sheet = _sheet(measured, latents, request)
    except _DAMAGED as error:
        log.warning("QR-LoRA: %s: %s", path.name, error)
        return run_pictures.note(f"{path.name} cannot be shown: {error!r:.60}")
    try:
        with whole_file(run.strengths(request.steps, ".png"), overwrite=True) as file:
            sheet.save(file, "PNG")
    except PathError as error:  # a disk that refuses it does not fail a training
        log.warning("QR-LoRA: no picture of strengths in the run folder: %s", error)
    return run_pictures.to_image(sheet)


def _sheet(measured: dict[str, Any], latents: Tensor, request: Request) -> Image.Image:
    """Two rows of samples above the curves."""
    base = base_format(request.model)
    decoded = torch.cat([encoders.decode_latent(request.vae, latent[None], base) for latent in latents])
    strengths = measured["pictures"]["strengths"]
    labels = [f"trigger={trigger}, strength={strength:g}" for trigger in ("yes", "no") for strength in strengths]
    prompts = measured["prompts"]
    title = f"{prompts['with_trigger']}   |   {prompts['without'] or '(no text)'}"
    samples = contact_sheet(images_of(decoded.numpy()), labels, max_size=256, title=title).image
    curves = strengths_image(measured, samples.width)
    sheet = Image.new("RGB", (samples.width, samples.height + curves.height), "white")
    sheet.paste(samples, (0, 0))
    sheet.paste(curves, (0, samples.height))
    return sheet
