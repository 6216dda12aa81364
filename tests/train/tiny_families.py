"""Whole pipeline folders of the other families, a few units wide with random weights: nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.train import tiny
from tests.train.families import FAMILIES

WIDTH = 16  # of the text encoders
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Qwen2Tokenizer:
    """Bytes, and the marks of a chat."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = {word: index for index, word in enumerate([*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    made = Qwen2Tokenizer(vocab=words, merges=[])
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = _TEMPLATE
    return made


def _qwen3(kind: Any, layers: int, words: int) -> Any:
    config = Qwen3Config(
        vocab_size=words, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return kind(config).eval()


def _qwen_vl(words: int) -> Any:
    text = {
        "vocab_size": words, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def _vae_flux2() -> Any:
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=32,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()


@dataclass(frozen=True)
class TinyPipeline:
    """How to make one.

    Attributes:
        class_name: of diffusers' pipeline.
        text_width: of what its transformer takes.
        encoder: number of words -> text encoder.
        vae: makes one.
        factor: pixels for a latent pixel.
    """

    class_name: str
    text_width: int
    encoder: Callable[[int], Any]
    vae: Callable[[], Any]
    factor: int = 8


PIPELINES = {
    "flux2": TinyPipeline(
        "Flux2KleinPipeline", 3 * WIDTH, lambda words: _qwen3(Qwen3ForCausalLM, 28, words), _vae_flux2, factor=16
    ),
    "qwen_image": TinyPipeline(
        "QwenImagePipeline", WIDTH, _qwen_vl, lambda: AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1).eval()
    ),
    "z_image": TinyPipeline("ZImagePipeline", WIDTH, lambda words: _qwen3(Qwen3Model, 2, words), tiny.small_vae),
}
_TEXT_ARGUMENTS = {"flux2": "joint_attention_dim", "qwen_image": "joint_attention_dim", "z_image": "cap_feat_dim"}


def save_pipeline(name: str, folder: Path) -> Path:
    """Write a family's folder."""
    torch.manual_seed(0)
    recipe, words = PIPELINES[name], tokenizer()
    small = FAMILIES[name]
    small = replace(small, arguments=small.arguments | {_TEXT_ARGUMENTS[name]: recipe.text_width})
    pipeline = getattr(diffusers, recipe.class_name)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=recipe.vae(),
        text_encoder=recipe.encoder(len(words)),
        tokenizer=words,
        transformer=small.model(),
    )
    pipeline.save_pretrained(folder)
    return folder
