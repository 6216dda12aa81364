"""Krea 2: one stream, gated attention with fewer heads for k and v, after a small network that reads the text."""

from .record import BlockKind, Family, Layer, Preset, Stream, outside


def _block(stream: Stream, published: bool) -> tuple[Layer, ...]:
    return (
        Layer("attn.to_q", "attn.wq", "attention", stream, 1, published),
        Layer("attn.to_k", "attn.wk", "attention", stream, None, published),
        Layer("attn.to_v", "attn.wv", "attention", stream, None, published),
        Layer("attn.to_gate", "attn.gate", "attention", stream, 1, published),
        Layer("attn.to_out.0", "attn.wo", "attention", stream, 1, published),
        Layer("ff.gate", "mlp.gate", "feed_forward", stream, None, published),
        Layer("ff.up", "mlp.up", "feed_forward", stream, None, published),
        Layer("ff.down", "mlp.down", "feed_forward", stream, None, published),
    )


KREA2 = Family(
    name="Krea 2",
    architecture="krea-2",
    block_kinds=(
        BlockKind(
            "text_layerwise",
            "text_fusion.layerwise_blocks.{}",
            "txtfusion.layerwise_blocks.{}",
            _block("text", False),
            2,
        ),
        BlockKind(
            "text_refiner", "text_fusion.refiner_blocks.{}", "txtfusion.refiner_blocks.{}", _block("text", False), 2
        ),
        BlockKind("single", "transformer_blocks.{}", "blocks.{}", _block("both", True), 28),
        outside(
            {
                "img_in": "first",
                "time_embed.linear_1": "tmlp.0",
                "time_embed.linear_2": "tmlp.2",
                "time_mod_proj": "tproj.1",
                "txt_in.linear_1": "txtmlp.1",
                "txt_in.linear_2": "txtmlp.3",
                "text_fusion.projector": "txtfusion.projector",
                "final_layer.linear": "last.linear",
            }
        ),
    ),
    marks=("text_fusion.", "txtfusion."),
    aliases=(("attn.to_out", "attn.wo"),),
    presets=(Preset("without text blocks", "text_layerwise: 0, text_refiner: 0"),),
)
