"""What one request may ask for is capped by flags, which errors name and `GET /v1/guidance` shows."""

from typing import Any

import pytest

from tests.server.limits.conftest import AT_ONCE, BODY_BYTES, GUIDED, TIMEOUT_S, WAITING
from tests.support.server import Server

COMPLETIONS = "/v1/completions"
ASKED = {"model": "base", "prompt": "the lamp", "max_tokens": 2}
SEARCH = {"method": "best_of_n", "reward_model": "first"}
REWARDS = {"model": "first", "prompt": "the lamp"}

BEYOND: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "candidates": (COMPLETIONS, {**ASKED, "guidance": {**GUIDED, "top_k": 21}}, "guidance.top_k", "--max-top-k"),
    "choices": (COMPLETIONS, {**ASKED, "guidance": GUIDED, "n": 9}, "n", "--max-n"),
    "plain choices": (COMPLETIONS, {**ASKED, "n": 9}, "n", "--max-n"),
    "samples of a search": (COMPLETIONS, {**ASKED, "guidance": {**SEARCH, "n": 9}}, "guidance.n", "--max-n"),
    "responses": ("/v1/rewards", {**REWARDS, "responses": ["a"] * 5}, "responses", "--max-responses"),
}
WITHIN: dict[str, tuple[str, dict[str, Any]]] = {
    "candidates": (COMPLETIONS, {**ASKED, "guidance": {**GUIDED, "top_k": 20}}),
    "choices": (COMPLETIONS, {**ASKED, "guidance": GUIDED, "n": 8}),
    "samples of a search": (COMPLETIONS, {**ASKED, "guidance": {**SEARCH, "n": 8}}),
    "responses": ("/v1/rewards", {**REWARDS, "responses": ["a"] * 4}),
}


@pytest.mark.parametrize("name", BEYOND)
def test_beyond_a_cap_is_400_that_names_field_and_flag(limited: Server, name: str) -> None:
    path, body, param, flag = BEYOND[name]
    response = limited.post(path, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert flag in response.json()["error"]["message"]


@pytest.mark.parametrize("name", WITHIN)
def test_up_to_a_cap_is_served(limited: Server, name: str) -> None:
    path, body = WITHIN[name]
    response = limited.post(path, body)
    assert response.status_code == 200, response.text


def test_the_limits_are_shown(limited: Server) -> None:
    limits = limited.get("/v1/guidance").json()["limits"]
    assert (
        limits.items()
        >= {
            **{"top_k": 20, "samples": 500, "n": 8, "choices": 8, "responses": 4, "body_bytes": BODY_BYTES},
            **{"guided_requests": AT_ONCE, "waiting_requests": WAITING, "request_timeout": TIMEOUT_S},
        }.items()
    )
