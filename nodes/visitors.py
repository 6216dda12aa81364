"""The guard in front of every route of this pack."""

import functools
from collections.abc import Awaitable, Callable

from aiohttp import web

from . import origins
from .host import session

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def own_pages(handler: Handler) -> Handler:
    """Answer 403 to pages of other servers, whatever the host does about them; and 415 to a POST that is no JSON."""

    @functools.wraps(handler)
    async def guarded(request: web.Request) -> web.StreamResponse:
        if origins.is_foreign(request.headers, session.allowed_origin()):
            return web.json_response({"error": "this page belongs to another server"}, status=403)
        if request.method == "POST" and not origins.is_json(request.headers):
            return web.json_response({"error": f"expected a body of {origins.JSON}"}, status=415)
        return await handler(request)

    return guarded
