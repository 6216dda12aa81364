"""Whose pages the pack's routes answer, by the headers that a browser sends."""

import pytest

from tests.nodes.pack import load

origins = load("origins")
LOCAL = {"Host": "127.0.0.1:8188"}
FRIEND = "https://friend.example"


@pytest.mark.parametrize(
    "headers,allowed,foreign",
    [
        ({}, None, False),  # a program
        ({"Origin": "http://127.0.0.1:8188", "Sec-Fetch-Site": "same-origin"}, None, False),
        ({"Origin": "http://127.0.0.1:8188"}, None, False),  # a browser of old
        ({"Sec-Fetch-Site": "none"}, None, False),  # typed into the address bar
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, None, True),
        ({"Origin": "https://evil.example"}, None, True),  # plain HTTP in a local network: no Sec-Fetch-Site
        ({"Sec-Fetch-Site": "cross-site"}, None, True),  # a picture in a foreign page
        ({"Origin": "http://127.0.0.1:3000", "Sec-Fetch-Site": "same-site"}, None, True),  # another server here
        ({"Origin": "null"}, None, True),  # a frame in a sandbox, a file
        ({"Origin": "http://["}, None, True),
        ({"Origin": "http://127.0.0.1:99999999"}, None, True),
        ({"Origin": FRIEND, "Sec-Fetch-Site": "cross-site"}, FRIEND, False),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, FRIEND, True),
        ({"Origin": "https://evil.example"}, FRIEND, True),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, "*", False),
        # behind a proxy, which tells the name or not
        ({"Origin": "https://art.example", "X-Forwarded-Host": "art.example"}, None, False),
        ({"Origin": "https://art.example", "Sec-Fetch-Site": "same-origin"}, None, False),
        ({"Origin": "https://art.example", "Host": "ART.example:443"}, None, False),
    ],
)
def test_whose_pages_are_answered(headers, allowed, foreign):
    assert origins.is_foreign({**LOCAL, **headers}, allowed) is foreign


@pytest.mark.parametrize(
    "content_type,taken",
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("text/plain", False),  # what a foreign page may send without asking
        ("text/plain; application/json", False),
        ("application/x-www-form-urlencoded", False),
        ("", False),
    ],
)
def test_a_body_says_that_it_is_json(content_type, taken):
    assert origins.is_json({"Content-Type": content_type}) is taken
