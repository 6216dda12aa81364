"""A whole FLUX pipeline folder of a few units with random weights, and pictures: nothing is downloaded."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from demo.small_flux import golden_flux
from qrlora_core.storage import TensorSpec
from qrlora_core.writing import header_bytes

WIDTH = 64  # of the golden transformer's text and pooled inputs
TOKENS = 24


def small_vae(channels: int = 16, scale: float = 0.3611, shift: float | None = 0.1159) -> AutoencoderKL:
    """An autoencoder of 16 channels with one shift and one scale, as several families have it."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def clip_tokenizer() -> CLIPTokenizer:
    """Letters, alone and at the end of a word."""
    letters = [chr(code) for code in range(33, 127)]
    ends = [f"{letter}</w>" for letter in letters]
    words = [*letters, *ends, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def clip_config(tokenizer: CLIPTokenizer, width: int, layers: int = 1) -> CLIPTextConfig:
    """Of a text encoder whose output, pooled and projected, is as wide as it is itself."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def t5_parts(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """Text encoder and tokenizer."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -20.0),
        ("\u2581", -2.0),
        *((letter, -3.0) for letter in letters),
    ]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def save_pipeline(folder: Path) -> Path:
    """Write the folder: the golden transformer in fp32, and a VAE, CLIP and T5 that fit it."""
    torch.manual_seed(0)
    vae, tokenizer = small_vae(), clip_tokenizer()
    clip = CLIPTextModel(clip_config(tokenizer, WIDTH)).eval()
    t5, t5_tokenizer = t5_parts(WIDTH)
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae,
        clip,
        tokenizer,
        t5,
        t5_tokenizer,
        golden_flux(),
    )
    pipeline.save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    return folder


def picture(path: Path, width: int = 96, height: int = 64, mode: str = "RGB", seed: int = 0, **options) -> Path:
    """A picture of smooth random colours; `RGBA` has an opaque left half and a transparent right one."""
    draws = np.random.default_rng(seed)
    small = Image.fromarray(draws.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    if mode == "RGBA":
        alpha = Image.new("L", (width, height), 0)
        alpha.paste(255, (0, 0, width // 2, height))
        image.putalpha(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path, **options)
    return path


def sparse_flux(path: Path, double: int = 19, single: int = 38, dtype: torch.dtype = torch.bfloat16) -> Path:
    """FLUX.1's real shapes in diffusers' names: a header, and a hole where the data would be."""
    arguments = {"num_layers": double, "num_single_layers": single, "guidance_embeds": True}
    return sparse_model(path, FluxTransformer2DModel, arguments, dtype)


def sparse_model(path: Path, kind: Any, arguments: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Path:
    """The same of any of diffusers' models."""
    # a table of positions is computed even where weights are not, and takes seconds
    table = "diffusers.models.embeddings.get_2d_sincos_pos_embed"
    with init_empty_weights(), patch(table, lambda width, side, **_: torch.empty(side**2, width, device="meta")):
        model = kind(**arguments)
    specs = {name: TensorSpec(dtype, tuple(value.shape)) for name, value in model.state_dict().items()}
    with path.open("wb") as file:
        header = header_bytes(specs, {})
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))
    return path
