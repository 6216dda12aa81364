"""Whole pipeline folders of the other families, a few units wide with random weights: nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
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


def _qwen3_vl(words: int) -> Any:
    text = {
        "vocab_size": words, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


def _vae_qwen() -> Any:
    return AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1).eval()


def _vae_flux2() -> Any:
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=32,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()


def _chat(encoder: Callable[[int], Any]) -> Callable[[], dict[str, Any]]:
    """One text encoder with a chat's tokenizer."""

    def parts() -> dict[str, Any]:
        words = tokenizer()
        return {"text_encoder": encoder(len(words)), "tokenizer": words}

    return parts


def _clips(layers: int, widths: tuple[int, int]) -> dict[str, Any]:
    words = tiny.clip_tokenizer()
    configs = [tiny.clip_config(words, width, layers) for width in widths]
    return {"tokenizer": words, "tokenizer_2": words, "text_encoder_2": CLIPTextModelWithProjection(configs[1])} | {
        "text_encoder": configs[0]
    }


def _sd3_parts() -> dict[str, Any]:
    parts = _clips(2, (WIDTH, WIDTH))
    parts["text_encoder"] = CLIPTextModelWithProjection(parts["text_encoder"])
    parts["text_encoder_3"], parts["tokenizer_3"] = tiny.t5_parts(4 * WIDTH)
    return parts


def _sdxl_parts() -> dict[str, Any]:
    parts = _clips(2, (WIDTH, WIDTH))
    parts["text_encoder"] = CLIPTextModel(parts["text_encoder"])
    return parts


@dataclass(frozen=True)
class TinyPipeline:
    """How to make one.

    Attributes:
        class_name: of diffusers' pipeline.
        text_width: of what its transformer takes.
        arguments: of the transformer's class that say so.
        parts: makes text encoders and tokenizers.
        vae: makes one.
        factor: pixels for a latent pixel.
        pooled: width of the pooled text, where the transformer takes one.
        scheduler: class of diffusers' and its arguments.
    """

    class_name: str
    text_width: int
    arguments: dict[str, Any]
    parts: Callable[[], dict[str, Any]]
    vae: Callable[[], Any]
    factor: int = 8
    pooled: int = 0
    scheduler: tuple[str, dict[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True})


PIPELINES = {
    "flux2": TinyPipeline(
        "Flux2KleinPipeline",
        3 * WIDTH,
        {"joint_attention_dim": 3 * WIDTH},
        _chat(lambda words: _qwen3(Qwen3ForCausalLM, 28, words)),
        _vae_flux2,
        factor=16,
    ),
    "qwen_image": TinyPipeline("QwenImagePipeline", WIDTH, {"joint_attention_dim": WIDTH}, _chat(_qwen_vl), _vae_qwen),
    "z_image": TinyPipeline(
        "ZImagePipeline",
        WIDTH,
        {"cap_feat_dim": WIDTH},
        _chat(lambda words: _qwen3(Qwen3Model, 2, words)),
        tiny.small_vae,
    ),
    "sd3": TinyPipeline(
        "StableDiffusion3Pipeline",
        4 * WIDTH,
        {"joint_attention_dim": 4 * WIDTH, "pooled_projection_dim": 2 * WIDTH},
        _sd3_parts,
        tiny.small_vae,
        pooled=2 * WIDTH,
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ),
    "sdxl": TinyPipeline(
        "StableDiffusionXLPipeline",
        2 * WIDTH,
        {"cross_attention_dim": 2 * WIDTH, "projection_class_embeddings_input_dim": WIDTH + 6 * 256},
        _sdxl_parts,
        lambda: tiny.small_vae(4, 0.13025, None),
        pooled=WIDTH,
        scheduler=(
            "EulerDiscreteScheduler",
            {
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "timestep_spacing": "leading",
                "steps_offset": 1,
            },
        ),
    ),
    "krea2": TinyPipeline(
        "Krea2Pipeline",
        2 * WIDTH,
        {
            "text_hidden_dim": WIDTH,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": WIDTH,
        },
        lambda: _chat(_qwen3_vl)() | {"text_encoder_select_layers": (1, 2)},
        _vae_qwen,
    ),
}


def save_pipeline(name: str, folder: Path) -> Path:
    """Write a family's folder."""
    torch.manual_seed(0)
    recipe, small = PIPELINES[name], FAMILIES[name]
    small = replace(small, arguments=small.arguments | recipe.arguments)
    kind, settings = recipe.scheduler
    pipeline = getattr(diffusers, recipe.class_name)(
        scheduler=getattr(diffusers, kind)(**settings),
        vae=recipe.vae(),
        **{small.network: small.model()},
        **recipe.parts(),
    )
    pipeline.save_pretrained(folder)
    return folder
