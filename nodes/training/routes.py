"""What a page may ask about trainings: their state, a sample's picture, and to stop one.

The routes belong to the server object and ask it for the jobs, so that a pack that is loaded again neither registers
them twice nor leaves them with the jobs of its former self.
"""

import asyncio
import io
import json
import logging
from pathlib import Path

from aiohttp import web
from server import PromptServer

from ...qrlora_core import FileFormatError, PathError, QRLoRAError, TensorFile, contained_path
from ..host import encoders, folders
from ..host.base_format import BaseFormat, base_format
from ..visitors import own_pages
from .jobs import JOBS, Jobs
from .runs import RunFolder

log = logging.getLogger(__name__)

_MARK = "qrlora_train_jobs"


def register() -> None:
    """Add the routes to the running server, once; without a server nothing happens."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    registered = hasattr(server, _MARK)
    setattr(server, _MARK, JOBS)
    if registered:
        return

    def jobs() -> Jobs:
        current: Jobs = getattr(server, _MARK)
        return current

    @server.routes.get("/qrlora/train/state")
    @own_pages
    async def state(request: web.Request) -> web.Response:
        return web.json_response({"jobs": [job.summary() for job in jobs().all()]})

    @server.routes.get("/qrlora/train/sample")
    @own_pages
    async def sample(request: web.Request) -> web.Response:
        step = request.query.get("step", "")
        if not (step.isascii() and step.isdigit() and len(step) < 10):
            return web.json_response({"error": "step is a number"}, status=400)
        try:
            png = await asyncio.to_thread(sample_png, request.query.get("run", ""), int(step))
        except QRLoRAError as error:
            return web.json_response({"error": str(error)}, status=404)
        return web.Response(body=png, content_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    @server.routes.get("/qrlora/train/strengths")
    @own_pages
    async def strengths(request: web.Request) -> web.Response:
        step = request.query.get("step", "")
        if not (step.isascii() and step.isdigit() and len(step) < 10):
            return web.json_response({"error": "step is a number"}, status=400)
        try:
            png = await asyncio.to_thread(strengths_png, request.query.get("run", ""), int(step))
        except QRLoRAError as error:
            return web.json_response({"error": str(error)}, status=404)
        return web.Response(body=png, content_type="image/png", headers={"Cache-Control": "no-cache"})

    @server.routes.post("/qrlora/train/stop")
    @own_pages
    async def stop(request: web.Request) -> web.Response:
        try:
            node = (await request.json())["node"]
            if not isinstance(node, str | int):
                raise TypeError(f"node is a {type(node).__name__}")
        except (ValueError, KeyError, TypeError, LookupError, RecursionError):  # LookupError: an unknown charset
            return web.json_response({"error": 'expected {"node": id}'}, status=400)
        if not jobs().request_stop(str(node)):
            return web.json_response({"error": "this node is not training"}, status=404)
        return web.json_response({"stopping": str(node)})


def sample_png(run: str, step: int) -> bytes:
    """A sample's latents as a small PNG.

    Raises:
        PathError: the name leaves the folder of runs.
        FileFormatError: no such sample, or one that is still being written.
    """
    folder: Path = contained_path(folders.runs_folder(), run)
    path = RunFolder(folder).folder / "samples" / f"step-{step:08}.safetensors"
    latent = TensorFile(path).tensor("latent")
    base = _format_of(RunFolder(folder))
    channels = None if base is None else base.channels
    if latent.dim() != 4 or 0 in latent.shape or latent.shape[1] != (channels or latent.shape[1]):
        raise FileFormatError(f"{path.name} holds {tuple(latent.shape)}, which are no latents of its model")
    picture = encoders.preview(latent, base)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def strengths_png(run: str, step: int) -> bytes:
    """The picture of an adapter at several strengths, as the node left it in the run folder.

    Raises:
        PathError: the name leaves the folder of runs, or there is no such picture (yet).
    """
    path = RunFolder(contained_path(folders.runs_folder(), run)).strengths(step, ".png")
    try:
        return path.read_bytes()
    except OSError as error:
        raise PathError(f"{path.name} is not there: {error.strerror or error}") from error


def _format_of(run: RunFolder) -> BaseFormat | None:
    """That of the model that a run trains on; None when its file is no longer there."""
    try:
        return base_format(Path(json.loads(run.settings.read_text(encoding="utf-8"))["model"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError, QRLoRAError) as error:
        log.debug("%s: no colours for its samples: %s", run.name, error)
        return None
