"""Pages of other servers at this pack's routes, with the host's own guard on and off."""

import json
import urllib.error
import urllib.request

import pytest

from tests.host import conftest

EVIL = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
FRIEND = {"Origin": conftest.FRIEND, "Sec-Fetch-Site": "cross-site"}
READING = (
    "/qrlora/train/state",
    "/qrlora/train/sample?run=a&step=1",
    "/qrlora/adapter?name=official_style.safetensors",
    "/qrlora/adapter/picture?name=official_style.safetensors",
)
STOP = "/qrlora/train/stop"


@pytest.fixture(params=["guarded", "a friend", "everybody"])
def started(request):
    """A server as it starts by default, one that allows a friend's pages, and one that allows all."""
    fixtures = {"guarded": "server", "a friend": "other", "everybody": "bare_server"}
    return request.param, request.getfixturevalue(fixtures[request.param])


def status(server, path, headers, body=None):
    request = urllib.request.Request(server.url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.read()
        return error.code


def asked_to_stop(server, headers, content_type="application/json"):
    return status(server, STOP, {**headers, "Content-Type": content_type}, json.dumps({"node": "1"}).encode())


def test_pages_of_other_servers(started):
    kind, server = started
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    for headers, welcome in ((own, True), ({}, True), (FRIEND, kind != "guarded"), (EVIL, kind == "everybody")):
        for path in READING:
            assert (status(server, path, headers) == 403) is not welcome, (kind, headers, path)
        assert asked_to_stop(server, headers) == (404 if welcome else 403), (kind, headers)  # 404: nothing is trained
        assert asked_to_stop(server, headers, "text/plain") == (415 if welcome else 403), (kind, headers)
