"""Bodies that are too large or no proper JSON are refused before anything reads them."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.limits.conftest import BODY_BYTES
from tests.support.server import Server

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/rewards", "/v1/responses", "/tokenize", "/invocations")
BAD: dict[str, tuple[bytes, str | None, str]] = {
    "no JSON": (b"{", None, "not JSON"),
    "nested deeply": (b'{"prompt":' + b"[" * 101 + b"]" * 101 + b"}", None, "100 levels"),
    "nested beyond any reader": (b"[" * 40_000, None, "100 levels"),
    "Latin-1": ('{"prompt": "über"}'.encode("latin-1"), None, "not UTF-8"),
    "UTF-16": ('{"prompt": "über"}'.encode("utf-16"), None, "not UTF-8"),
    "NaN": (b'{"temperature": NaN}', "temperature", "finite"),
    "minus Infinity in a list": (b'{"a": [{"b": [1, -Infinity]}]}', "a.0.b.1", "finite"),
    "beyond all floats": (b'{"temperature": 1e999}', "temperature", "finite"),
    "an integer of 5,000 digits": (b'{"seed": 1' + b"0" * 5_000 + b"}", None, "digits"),
    "half of a surrogate pair": (b'{"prompt": "\\ud83d"}', None, "surrogate"),
}


@pytest.mark.parametrize("announced", [True, False], ids=["by its length", "in pieces"])
def test_a_body_over_the_limit_is_413(limited: Server, announced: bool) -> None:
    def send(size: int) -> httpx.Response:
        body = json.dumps({"model": "base", "prompt": ""}).encode()
        body += b" " * (size - len(body))
        headers = {**limited.headers, "Content-Type": "application/json"}
        content = body if announced else _pieces(body)
        return httpx.post(f"{limited.url}/tokenize", content=content, headers=headers, timeout=60)

    assert send(BODY_BYTES).status_code == 200
    refused = send(BODY_BYTES + 1)
    assert refused.status_code == refused.json()["error"]["code"] == 413
    assert f"{BODY_BYTES} bytes" in refused.json()["error"]["message"]
    assert "--max-body-bytes" in refused.json()["error"]["message"]


def test_an_endless_body_is_refused_before_it_ends(limited: Server) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 2**30:
            sent += 10_000
            yield b" " * 10_000

    headers = {**limited.headers, "Content-Type": "application/json"}
    assert httpx.post(f"{limited.url}/tokenize", content=endless(), headers=headers, timeout=60).status_code == 413
    assert sent < 2**30


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BAD)
def test_bad_json_is_400_on_every_path(limited: Server, path: str, name: str) -> None:
    body, param, words = BAD[name]
    headers = {**limited.headers, "Content-Type": "application/json; charset=utf-8"}
    response = httpx.post(f"{limited.url}{path}", content=body, headers=headers, timeout=60)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert (error["code"], error["param"]) == (400, param)
    assert words in error["message"]


def _pieces(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 7_000):
        yield body[start : start + 7_000]
