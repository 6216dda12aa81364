"""What a page may ask about an adapter's file before anything runs: what is in it, and the picture beside it."""

import asyncio
from pathlib import Path

from aiohttp import web
from server import PromptServer

from ..qrlora_core import PathError, QRLoRAError, open_adapter
from . import report
from .host import folders
from .visitors import own_pages

_MARK = "qrlora_adapter_routes"
# As managers of LoRAs name the picture of `ink.safetensors`, the first that is there.
_PICTURES = (".preview.png", ".png", ".preview.jpg", ".jpg", ".preview.jpeg", ".jpeg", ".preview.webp", ".webp")


def register() -> None:
    """Add the routes to the running server, once; without a server nothing happens."""
    server = getattr(PromptServer, "instance", None)
    if server is None or hasattr(server, _MARK):
        return
    setattr(server, _MARK, True)

    @server.routes.get("/qrlora/adapter")
    @own_pages
    async def facts(request: web.Request) -> web.Response:
        name = request.query.get("name", "")
        try:
            text = await asyncio.to_thread(_facts, name)
        except QRLoRAError as error:
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=404)
        return web.json_response({"text": text, "picture": picture_of(name) is not None})

    @server.routes.get("/qrlora/adapter/picture")
    @own_pages
    async def picture(request: web.Request) -> web.StreamResponse:
        path = picture_of(request.query.get("name", ""))
        if path is None:
            return web.json_response({"error": "there is no picture of this adapter"}, status=404)
        return web.FileResponse(path, headers={"Cache-Control": "no-cache"})


def _facts(name: str) -> str:
    return report.adapter_text(open_adapter(folders.find_file(name)))


def picture_of(name: str) -> Path | None:
    """The picture beside an adapter, in the adapter's own folder."""
    stem = name.removesuffix(".safetensors")
    for ending in _PICTURES:
        try:
            return folders.find_file(stem + ending)
        except PathError:
            continue
    return None
