"""The API by curl: what the README shows must work without any client library."""

import json
import subprocess
from typing import Any

import pytest

from tests.support.server import Server

ASKED = {
    "/v1/completions": {"prompt": "a kettle"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}
GUIDANCE = {"method": "pargs", "reward_model": "first", "beta": 1.5, "top_k": 5}


@pytest.mark.parametrize("path", ASKED)
def test_an_answer(server: Server, path: str) -> None:
    body = json.loads(_curl(server, path, {**ASKED[path], "max_tokens": 5, "guidance": GUIDANCE}))
    report = body["choices"][0]["guidance"]
    assert report["tokens"] == body["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("path", ASKED)
def test_a_stream(server: Server, path: str) -> None:
    body = {**ASKED[path], "max_tokens": 5, "n": 2, "seed": 3, "ignore_eos": True, "guidance": GUIDANCE}
    whole = json.loads(_curl(server, path, body))["choices"]
    events = [line for line in _curl(server, path, {**body, "stream": True}).splitlines() if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    choices = [c for event in events[:-1] for c in json.loads(event.removeprefix("data: "))["choices"]]
    assert all(("guidance" in c) == (c["finish_reason"] is not None) for c in choices)
    for index in range(2):
        mine = [c for c in choices if c["index"] == index]
        assert "".join(_text(c) for c in mine) == _text(whole[index])
        assert mine[-1]["guidance"]["tokens"] == 5


def test_a_refusal(server: Server) -> None:
    body = {**ASKED["/v1/completions"], "guidance": {**GUIDANCE, "beta": -1}}
    error = json.loads(_curl(server, "/v1/completions", body))["error"]
    assert (error["code"], error["param"]) == (400, "guidance.beta")


def _curl(server: Server, path: str, body: dict[str, Any]) -> str:
    command = ["curl", "--silent", "--show-error", "--no-buffer", f"{server.url}{path}"]
    sent = ["--header", "Content-Type: application/json", "--data", json.dumps({"model": "base", **body})]
    return subprocess.run([*command, *sent], capture_output=True, text=True, check=True, timeout=120).stdout


def _text(choice: dict[str, Any]) -> str:
    return choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
