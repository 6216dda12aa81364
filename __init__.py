"""QR-LoRA for ComfyUI: the door that the host knocks at. Everything behind it is imported when the host asks."""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

if __package__:  # a test runner that collects this folder imports the file without a package

    async def comfy_entrypoint():
        from .nodes import QRLoRAExtension

        return QRLoRAExtension()
