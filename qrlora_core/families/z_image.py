"""Z-Image: one stream for text and image, after refiners for each of them."""

from .record import BlockKind, Family, Layer, Preset, Stream, outside


def _block(stream: Stream, published: bool) -> tuple[Layer, ...]:
    return (
        Layer("attention.to_q", "attention.qkv", "attention", stream, 1, published),
        Layer("attention.to_k", "attention.qkv", "attention", stream, 1, published),
        Layer("attention.to_v", "attention.qkv", "attention", stream, 1, published),
        Layer("attention.to_out.0", "attention.out", "attention", stream, 1, published),
        Layer("feed_forward.w1", "feed_forward.w1", "feed_forward", stream, 8 / 3, published),
        Layer("feed_forward.w2", "feed_forward.w2", "feed_forward", stream, 3 / 8, published),
        Layer("feed_forward.w3", "feed_forward.w3", "feed_forward", stream, 8 / 3, published),
        Layer("adaLN_modulation.0", "adaLN_modulation.0", "modulation", stream),
    )


Z_IMAGE = Family(
    name="Z-Image",
    architecture="z-image",
    block_kinds=(
        BlockKind("noise_refiner", "noise_refiner.{}", "noise_refiner.{}", _block("image", False), 2),
        BlockKind("context_refiner", "context_refiner.{}", "context_refiner.{}", _block("text", False)[:-1], 2),
        BlockKind("single", "layers.{}", "layers.{}", _block("both", True), 30),
        outside(
            {
                "all_x_embedder.2-1": "x_embedder",
                "all_final_layer.2-1.linear": "final_layer.linear",
                "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
                "cap_embedder.1": "cap_embedder.1",
                "t_embedder.mlp.0": "t_embedder.mlp.0",
                "t_embedder.mlp.2": "t_embedder.mlp.2",
            }
        ),
    ),
    marks=("noise_refiner.", "context_refiner.", "all_x_embedder.", "cap_embedder."),
    presets=(Preset("without refiners", "noise_refiner: 0, context_refiner: 0"),),
)
