"""Stable Diffusion XL: a U-Net. Block numbers are those of its native layout: input 0-8, middle 0, output 0-8."""

from .record import BlockKind, Family, Layer, Preset, layers_of, outside

_TRANSFORMER = (
    *layers_of(
        {f"{attention}.{part}": f"{attention}.{part}" for attention in ("attn1",) for part in ("to_q", "to_k", "to_v")}
        | {"attn1.to_out.0": "attn1.to_out.0"},
        "attention",
        "image",
        True,
    ),
    Layer("attn2.to_q", "attn2.to_q", "attention", "image", None, True),
    Layer("attn2.to_k", "attn2.to_k", "attention", "text", None, True),
    Layer("attn2.to_v", "attn2.to_v", "attention", "text", None, True),
    Layer("attn2.to_out.0", "attn2.to_out.0", "attention", "image", None, True),
    *layers_of({name: name for name in ("ff.net.0.proj", "ff.net.2")}, "feed_forward", "image", True),
)
_BLOCKS = "transformer_blocks.{}"
_AROUND = layers_of({"proj_in": "proj_in", "proj_out": "proj_out"}, "attention", "image")
_RESNET = layers_of(
    {
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "other",
    "image",
)

# (kind, native number, diffusers' block, index in it)
_STEPS = (
    *(("input", 3 * level + 1 + index, f"down_blocks.{level}", index) for level in range(3) for index in range(2)),
    *(("output", 3 * level + index, f"up_blocks.{level}", index) for level in range(3) for index in range(3)),
)


def _attention(kind: str, number: int, path: str, native: str) -> tuple[BlockKind, ...]:
    return (
        BlockKind(kind, path, native, _AROUND, number=number),
        BlockKind(kind, f"{path}.{_BLOCKS}", f"{native}.{_BLOCKS}", _TRANSFORMER, number=number),
    )


def _sampler(kind: str, number: int, path: str, native: str, suffix: str) -> BlockKind:
    return BlockKind(kind, path, native, (Layer("conv", suffix, "other", "image"),), number=number)


_INPUT_OUTPUT = tuple(
    block
    for kind, number, level, index in _STEPS
    for block in (
        BlockKind(kind, f"{level}.resnets.{index}", f"{kind}_blocks.{number}.0", _RESNET, number=number),
        *_attention(kind, number, f"{level}.attentions.{index}", f"{kind}_blocks.{number}.1"),
    )
)
_MIDDLE = (
    BlockKind("middle", "mid_block.resnets.0", "middle_block.0", _RESNET, number=0),
    *_attention("middle", 0, "mid_block.attentions.0", "middle_block.1"),
    BlockKind("middle", "mid_block.resnets.1", "middle_block.2", _RESNET, number=0),
)

SDXL = Family(
    name="SDXL",
    architecture="stable-diffusion-xl-v1-base",
    block_kinds=(
        *(block for block in _INPUT_OUTPUT if block.name == "input"),
        _sampler("input", 3, "down_blocks.0.downsamplers.0", "input_blocks.3.0", "op"),
        _sampler("input", 6, "down_blocks.1.downsamplers.0", "input_blocks.6.0", "op"),
        *_MIDDLE,
        *(block for block in _INPUT_OUTPUT if block.name == "output"),
        _sampler("output", 2, "up_blocks.0.upsamplers.0", "output_blocks.2.2", "conv"),
        _sampler("output", 5, "up_blocks.1.upsamplers.0", "output_blocks.5.2", "conv"),
        outside(
            {
                "conv_in": "input_blocks.0.0",
                "conv_out": "out.2",
                "time_embedding.linear_1": "time_embed.0",
                "time_embedding.linear_2": "time_embed.2",
                "add_embedding.linear_1": "label_emb.0.0",
                "add_embedding.linear_2": "label_emb.0.2",
            }
        ),
    ),
    marks=("input_blocks.", "output_blocks.", "middle_block.", "down_blocks.", "up_blocks.", "mid_block."),
    aliases=(("attn1.to_out", "attn1.to_out.0"), ("attn2.to_out", "attn2.to_out.0")),
    portable="lora_unet_",
    presets=(
        Preset("only input blocks", "input: 1", 0.0),
        Preset("only middle block", "middle: 1", 0.0),
        Preset("only output blocks", "output: 1", 0.0),
        # what B-LoRA (arXiv 2403.14572) and InstantStyle (arXiv 2404.02733) found these attention blocks to hold
        Preset("content layers", "output 0: 1", 0.0),
        Preset("style layers", "output 1: 1", 0.0),
        Preset("layout layers", "input 8: 1", 0.0),
    ),
)
