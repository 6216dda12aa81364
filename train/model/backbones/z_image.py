"""Z-Image: base, Turbo and fine-tunes of them."""

from typing import Any

import torch
from torch import Tensor

from qrlora_core import EncodedText

from ...errors import TrainError
from .backbone import Backbone, ModelFacts, Specs, StoredRows, count_blocks
from .pipeline import Pipeline, shifted_and_scaled

_ADVICE = "Use Z-Image, Z-Image-Turbo or a fine-tune of them"
_SWAPPED_NAMES = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
_IN_BLOCKS = {
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    "attention.out": "attention.to_out.0",
}
_BLOCKS = ("noise_refiner", "context_refiner", "layers")
_LAYERS = (
    "attention.to_q",
    "attention.to_k",
    "attention.to_v",
    "attention.to_out.0",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


def stored_rows(key: str, rows: int) -> list[StoredRows]:
    """What diffusers calls a tensor of ComfyUI's layout, such as `layers.0.attention.qkv.weight`."""
    module, _, kind = key.rpartition(".")
    if module in _SWAPPED_NAMES:
        return [StoredRows(f"{_SWAPPED_NAMES[module]}.{kind}", 0, rows)]
    parts = module.split(".", 2)
    if parts[0] not in _BLOCKS or len(parts) < 3:
        return [StoredRows(key, 0, rows)]
    block, suffix = f"{parts[0]}.{parts[1]}", parts[2]
    if suffix == "attention.qkv":
        third = rows // 3
        return [StoredRows(f"{block}.attention.to_{name}.{kind}", i * third, third) for i, name in enumerate("qkv")]
    return [StoredRows(f"{block}.{_IN_BLOCKS.get(suffix, suffix)}.{kind}", 0, rows)]


def facts(specs: Specs, title: str) -> ModelFacts:
    """See `Backbone.facts`.

    Raises:
        TrainError: reason "model": a tensor is missing, or it is Lumina 2, which shares these names.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in specs:
            raise TrainError("model", f"{title} is not a Z-Image transformer: it has no {name}. {_ADVICE}")
        return specs[name].shape

    shape("x_pad_token")  # Lumina 2 has none
    hidden, text = shape("cap_embedder.1.weight")
    head = shape("layers.0.attention.norm_q.weight")[0]
    channels = shape("all_x_embedder.2-1.weight")[1] // 4
    arguments = {
        "in_channels": channels,
        "dim": hidden,
        "n_layers": count_blocks(specs, "layers"),
        "n_refiner_layers": count_blocks(specs, "noise_refiner"),
        "n_heads": hidden // head,
        "n_kv_heads": hidden // head,
        "cap_feat_dim": text,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "t_scale": 1000.0,
    }
    return ModelFacts(arguments, hidden, channels, (text,))


def inputs(model: Any, latents: Tensor, sigmas: Tensor, text: EncodedText, guidance: float) -> dict[str, Any]:
    """One latent with a frame's dimension and one caption for each picture; time runs from noise (0) to picture (1)."""
    return {
        "x": list(latents.unsqueeze(2)),
        "t": 1 - sigmas,
        "cap_feats": [embeds[embeds.any(dim=-1)] for embeds in text.embeds],  # rows of zeros are no text
    }


def prediction(output: Any, size: torch.Size) -> Tensor:
    """The model points from noise to picture."""
    return -torch.stack(list(output[0])).reshape(size)


def encode_text(pipeline: Any, text: str, max_tokens: int, device: torch.device) -> EncodedText:
    """The text encoder's last layer but one, without what fills the caption up."""
    (embeds,), _ = pipeline.encode_prompt(
        text, device=device, do_classifier_free_guidance=False, max_sequence_length=max_tokens
    )
    return EncodedText(embeds, None)


PIPELINE = Pipeline(
    classes={"ZImagePipeline": "ZImagePipeline"},
    vae_class="AutoencoderKL",
    encoders={"tokenizer": "text_encoder"},
    encode_text=encode_text,
    encode_picture=shifted_and_scaled,
)

Z_IMAGE = Backbone(
    family="z_image",
    title="Z-Image",
    advice=_ADVICE,
    model_class="ZImageTransformer2DModel",
    since="0.36",
    file_mark="layers.0.attention.qkv.weight",
    folder_mark="all_x_embedder.2-1.weight",
    block_lists=_BLOCKS,
    activation_counts={"noise_refiner": 22.7, "context_refiner": 22.7, "layers": 22.7},
    default_layers={"layers": _LAYERS},
    stored_rows=stored_rows,
    facts=facts,
    stated=("axes_dims", "axes_lens", "rope_theta", "t_scale"),
    inputs=inputs,
    prediction=prediction,
    shift=lambda tokens: 3.0,
    pipeline=PIPELINE,
)
