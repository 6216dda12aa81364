"""A helper pack for the toy FLUX in ComfyUI: its text encoder and its VAE. Only the demo and the tests link it."""


async def comfy_entrypoint():
    from .nodes import ToyExtension

    return ToyExtension()
