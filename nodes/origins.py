"""Which pages may ask this pack's routes: those of this server, and of an origin that its owner allows.

ComfyUI refuses other sites itself, but not when it is started with `--enable-cors-header`, not even those that the
header does not name; and a page can send a POST of plain text anywhere without asking first.
"""

import urllib.parse
from collections.abc import Mapping

# What the host sets when `--enable-cors-header` comes without an origin
ANYONE = "*"
JSON = "application/json"


def is_foreign(headers: Mapping[str, str], allowed: str | None) -> bool:
    """Whether a browser sends this from a page of another server.

    Args:
        headers: of the request, by their usual names.
        allowed: the origin that the server's owner allows besides, ANYONE, or None.
    """
    origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
    if allowed == ANYONE or (allowed and origin == allowed) or site == "same-origin":
        return False
    if site == "cross-site":
        return True
    if origin is None:  # no browser's page; a program may ask what it likes
        return False
    # a proxy may tell the name that the browser knows; a page cannot, without asking the server first
    own = {headers.get("Host", ""), headers.get("X-Forwarded-Host", "")}
    return _place(origin) not in {_place(f"//{name}") for name in own if name}


def is_json(headers: Mapping[str, str]) -> bool:
    """Whether the body says that it is JSON: for that a browser asks the server first when a page is foreign."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower() == JSON


def _place(url: str) -> tuple[str, int | None]:
    """Name and port of an origin or a Host header; the usual ports count as none."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        return "", None
    return (parts.hostname or "").lower(), None if port in (80, 443) else port
