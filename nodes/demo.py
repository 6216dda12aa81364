"""A toy FLUX that ships with the pack: a first run that downloads nothing and takes seconds on any machine."""

from comfy_api.latest import io

from ..qrlora_core import MergeRecipe
from . import report, sockets
from .arrivals import Node
from .host import toy

CATEGORY = f"{sockets.CATEGORY}/demo"


class ToyModel(Node):
    """Nothing -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAToyModel",
            "Load Toy FLUX",
            "A FLUX of 2.3 million parameters in fp8 that ships with this pack. It draws six shapes in six colours and "
            "four textures, 128 x 128 pixels. Stands where Load Diffusion Model stands in a real workflow.",
            category=CATEGORY,
            inputs=[],
            outputs=[io.Model.Output(display_name="model", tooltip="A FLUX model, for Apply QR-LoRA or a sampler.")],
            search_aliases=["toy flux", "demo"],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(toy.load_model())


class ToyAdapter(Node):
    """A name -> DELTA_R."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAToyAdapter",
            "Load Toy \u0394R Adapter",
            "One of two adapters for the toy FLUX that ship with this pack, each trained on one picture. Stands where "
            "Load \u0394R Adapter stands in a real workflow.",
            category=CATEGORY,
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=list(toy.ADAPTERS),
                    default=next(iter(toy.ADAPTERS)),
                    tooltip="style: <s>, upright bars in orange and violet. content: <c>, a heart.",
                )
            ],
            outputs=[sockets.DeltaR.Output(display_name="delta_r", tooltip="The adapter, for Merge, Apply and Save.")],
            search_aliases=["toy delta r", "demo"],
        )

    @classmethod
    def execute(cls, adapter: str) -> io.NodeOutput:
        opened = toy.load_adapter(adapter)
        return io.NodeOutput(MergeRecipe.of(opened), ui={"text": [report.adapter_text(opened)]})


class ToyTextEncoder(Node):
    """Nothing -> CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAToyTextEncoder",
            "Toy FLUX Text Encoder",
            "Knows every word as a fixed random vector. Say: a circle in red striped style.",
            category=CATEGORY,
            inputs=[],
            outputs=[io.Clip.Output(display_name="clip", tooltip="For CLIP Text Encode and Train \u0394R.")],
            search_aliases=["toy clip", "demo"],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(toy.ToyCLIP())


class ToyVAE(Node):
    """Nothing -> VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRAToyVAE",
            "Toy FLUX VAE",
            "Turns latents of the toy FLUX into pictures of 128 x 128 pixels and back, without a network.",
            category=CATEGORY,
            inputs=[],
            outputs=[io.Vae.Output(display_name="vae", tooltip="For VAE Decode, VAE Encode and Train \u0394R.")],
            search_aliases=["toy vae", "demo"],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(toy.ToyVAE())
