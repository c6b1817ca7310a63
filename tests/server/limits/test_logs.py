"""Log lines are JSON objects with the request's id, and hold neither what was asked nor a key."""

import asyncio
import json
import logging
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from steersman.server import logs
from tests.server.limits.conftest import ADMIN_KEY, GUIDED, KEY, SECOND_KEY
from tests.support.server import Server

HARMLESS = ("abc", "Root=1-67891233-abcdef012345678912345678", "a" * 128)
HARMFUL = ("", "a b", "a" * 129, 'x"y', "<script>", "a,b", "é".encode())


def _lines(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def test_every_line_is_an_object(limited: Server) -> None:
    limited.complete("the lamp", GUIDED, max_tokens=2)
    lines = _lines(limited)
    assert {line["process"] for line in lines} >= {"MainProcess", "EngineCore"}
    assert {line["logger"].partition(".")[0] for line in lines} >= {"vllm", "uvicorn", "steersman"}
    for line in lines:
        assert line.keys() >= {"time", "level", "logger", "message"}


def test_a_request_is_found_by_its_id(limited: Server, rng: random.Random) -> None:
    body = {"model": "base", "prompt": "the lamp", "max_tokens": 2, "guidance": GUIDED}
    for stream in (False, True):
        request_id = f"test-{rng.randrange(10**12)}"
        headers = {**limited.headers, "X-Request-Id": request_id}
        answer = httpx.post(
            f"{limited.url}/v1/completions", json={**body, "stream": stream}, headers=headers, timeout=60
        )
        assert answer.headers["X-Request-Id"] == request_id
        assert f'"cmpl-{request_id}"' in answer.text
        (access,) = [line for line in _lines(limited) if line.get("request_id") == request_id]
        assert access["logger"] == "uvicorn.access"
        assert "POST /v1/completions" in access["message"]


def test_two_requests_may_have_one_id(limited: Server) -> None:
    def ask(_: int) -> int:
        body = {"model": "base", "prompt": "the lamp", "max_tokens": 20, "guidance": GUIDED}
        headers = {**limited.headers, "X-Request-Id": "twin"}
        return httpx.post(f"{limited.url}/v1/completions", json=body, headers=headers, timeout=60).status_code

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == [200, 200]


@pytest.mark.parametrize("given", [*HARMLESS, *HARMFUL])
def test_an_id_is_the_clients_only_if_it_is_harmless(limited: Server, given: str | bytes) -> None:
    # Refused requests have one too.
    returned = httpx.get(f"{limited.url}/v1/models", headers={"X-Request-Id": given}, timeout=60).headers.get_list(
        "X-Request-Id"
    )
    assert len(returned) == 1
    assert (returned[0] == given) == (given in HARMLESS)
    assert returned[0].isascii()
    assert 3 <= len(returned[0]) <= 128


def test_neither_prompts_nor_keys_are_logged(limited: Server, rng: random.Random) -> None:
    secret = f"kettle{rng.randrange(10**12)}"
    asked = [
        ("/v1/completions", {"model": "base", "prompt": secret, "max_tokens": 4, "guidance": GUIDED}),
        ("/v1/completions", {"model": "base", "prompt": secret, "max_tokens": 4, "stream": True}),
        ("/v1/completions", {"model": "base", "prompt": secret, "stop": secret, "logprobs": "many", "best_of": {}}),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": secret}], "max_tokens": 4}),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": secret, "content": {"text": secret}}]}),
        ("/v1/responses", {"model": "base", "input": secret, "max_output_tokens": 4}),
        ("/v1/messages", {"model": "base", "messages": [{"role": "user", "content": secret}], "max_tokens": 4}),
        ("/v1/rewards", {"model": "first", "prompt": secret, "responses": [secret]}),
        ("/tokenize", {"model": "base", "prompt": secret}),
        ("/v1/completions", {"model": "base", "prompt": [secret, 1.5], "guidance": {"method": secret}}),
    ]
    for path, body in asked:
        limited.post(path, body)
    # Keys where they do not belong.
    httpx.get(f"{limited.url}/v1/models?api_key={KEY}", headers={"X-Request-Id": SECOND_KEY}, timeout=60)
    log = limited.log.read_text()
    assert log.count("/v1/rewards HTTP") > 0
    for word in (secret, KEY, SECOND_KEY, ADMIN_KEY):
        assert word not in log


def test_hidden_words_are_left_out_wherever_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    before = logging.getLogRecordFactory()
    monkeypatch.setattr(logs, "_hidden", [])
    try:
        logs.hide(["hush", ""])
        make = logging.getLogRecordFactory()
        for message, args in (("of hush", ()), ("of %s", ("my hush",)), ("of %s", ({"key": ["hush"]},)), ("%d", (7,))):
            record = make("any", logging.INFO, "file", 1, message, args, None)
            assert "hush" not in record.getMessage()
            assert ("***" in record.getMessage()) == (args != (7,))
    finally:
        logging.setLogRecordFactory(before)


def test_a_line_with_an_exception_is_one_line() -> None:
    async def run() -> dict[str, Any]:
        logs.REQUEST_ID.set("one")
        try:
            raise ValueError("wrong\nin two lines")
        except ValueError as error:
            record = logging.getLogger("any").makeRecord(
                "any", logging.ERROR, "file", 1, "it\nfailed: %s", (error,), (ValueError, error, error.__traceback__)
            )
        line = logs.JsonFormatter().format(record)
        assert "\n" not in line
        return dict(json.loads(line))

    entry = asyncio.run(run())
    assert entry["request_id"] == "one"
    assert entry["message"].startswith("it\nfailed")
    assert "ValueError: wrong" in entry["exception"]
