"""Guidance in a wrong place is refused, not passed over, on every route; what only looks like it is left alone."""

import random
import string
from typing import Any

import httpx
import pytest

from steersman.guidance.request import GuidanceError
from steersman.server.config import CONFIG_KEY
from steersman.server.engine import GuidedEngine
from steersman.server.errors import InvalidGuidance
from steersman.server.placement import check_fields, check_outside_body, resembles_guidance
from steersman.server.vllm import ChatCompletionRequest, CompletionRequest, SamplingParams
from tests.support.server import Server

GOOD = {"method": "pargs", "reward_model": "first"}
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
GUIDED = ("/v1/completions", "/v1/chat/completions")
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/chat/completions/batch": {"messages": [MESSAGES], "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 2},
    "/invocations": {"prompt": "hi", "max_tokens": 2},
    "/generative_scoring": {"query": "hi", "items": ["a"], "label_token_ids": [5, 6]},
    "/v1/rewards": {"model": "first", "prompt": "hi", "responses": ["there"]},
}
MISPLACED: dict[str, dict[str, Any]] = {
    "extra_body.guidance": {"extra_body": {"guidance": GOOD}},
    "extra_body.extra_body.guidance": {"extra_body": {"extra_body": {"guidance": GOOD}}},
    "extra_body": {"extra_body": {"seed": 1}},
    "extraBody": {"extraBody": {"seed": 1}},
    "extra_query.guidance": {"extra_query": {"guidance": "steered"}},
    "extra_headers": {"extra_headers": {"X-Team": "red"}},
    "vllm_xargs.guidance": {"vllm_xargs": {"guidance": "steered"}},
    "vllm_xargs.steersman": {"vllm_xargs": {"steersman": "x"}},
    "sampling_params.extra_args.steersman": {"sampling_params": {"extra_args": {"steersman": {"key": "x"}}}},
    "metadata.guidance": {"metadata": {"guidance": "steered"}},
    "metadata.Guidance": {"metadata": {"Guidance": GOOD}},
    "stream_options.guidance": {"stream_options": {"guidance": GOOD}},
    "response_format.guidance": {"response_format": {"type": "text", "guidance": GOOD}},
    "chat_template_kwargs.guidance": {"chat_template_kwargs": {"guidance": GOOD}},
    "model_kwargs.guidance": {"model_kwargs": {"guidance": GOOD}},
    "providerOptions.openai.guidance": {"providerOptions": {"openai": {"guidance": GOOD}}},
    "parameters.guidance": {"parameters": {"guidance": GOOD}},
    "messages.0.guidance": {"messages": [{**MESSAGES[0], "guidance": GOOD}]},
    "Guidance": {"Guidance": GOOD},
    "GUIDANCE": {"GUIDANCE": "steered"},
    "guidence": {"guidence": GOOD},
    "steersman": {"steersman": GOOD},
}
HARMLESS: dict[str, dict[str, Any]] = {
    "nothing in them": {"extra_body": {}, "metadata": {}, "vllm_xargs": {}},
    "null": {"guidence": None, "extra_body": None},
    "other metadata": {"metadata": {"team": "guidance", "audience": "x", "steersman": "who answers"}},
    "other arguments": {"vllm_xargs": {"temperature_floor": 0.5, "names": ["guidance", "steersman"]}},
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("place", MISPLACED)
def test_every_route_refuses_it_and_names_the_place_and_the_right_one(server: Server, path: str, place: str) -> None:
    response = server.post(path, {"model": "base", **ROUTES[path], **MISPLACED[place]})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (place, 400)
    assert error["message"].startswith(f"{place}: ")
    if path in GUIDED:
        assert '{"model": …, "guidance": {"method": …}}' in error["message"]
    else:
        assert all(route in error["message"] for route in (path, *GUIDED))


@pytest.mark.parametrize("path", GUIDED)
@pytest.mark.parametrize("fields", HARMLESS.values(), ids=HARMLESS)
def test_what_only_looks_like_it_is_left_alone(server: Server, path: str, fields: dict[str, Any]) -> None:
    for guided in ({}, {"guidance": GOOD}):
        response = server.post(path, {"model": "base", **ROUTES[path], **fields, **guided})
        assert response.status_code == 200, response.text
        assert ("guidance" in response.json()["choices"][0]) == bool(guided)


@pytest.mark.parametrize("path", GUIDED)
def test_guidance_in_the_address_or_the_headers_is_refused(server: Server, path: str) -> None:
    body = {"model": "base", **ROUTES[path]}
    for query, headers, place in (
        ({"guidance[method]": "pargs"}, {}, "guidance[method]"),
        ({}, {"X-Guidance": "steered"}, "x-guidance"),
    ):
        response = httpx.post(f"{server.url}{path}", json=body, params=query, headers=headers, timeout=60)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == place


@pytest.mark.parametrize("value", ["x", 7, {"key": "k", "guidance": GOOD, "max_tokens_field": None}])
def test_no_client_sets_what_the_server_sends_to_its_workers_whatever_the_route(value: Any) -> None:
    engine = GuidedEngine.__new__(GuidedEngine)
    params = SamplingParams(extra_args={CONFIG_KEY: value})
    with pytest.raises(InvalidGuidance, match=r"vllm_xargs\.steersman: is the server's own"):
        engine.generate({"prompt_token_ids": [5]}, params, "request")


def test_the_clients_own_data_may_hold_any_name() -> None:
    schema = {"type": "object", "properties": {"guidance": {"type": "string", "maxLength": 2**256 - 1}}}
    tool = {"type": "function", "function": {"name": "advise", "parameters": schema}}
    call = {"type": "tool_use", "id": "1", "name": "advise", "input": {"guidance": "left", "amount": 2**256}}
    check_fields(
        {
            "guidance": {"method": "length_control", "policy": "guidance", "length": 2**70},
            "tools": [tool, {"name": "advise", "input_schema": schema}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "guidance", "schema": schema}},
            "structured_outputs": {"json": schema},
            "documents": [{"guidance": "left"}],
            "messages": [{"role": "assistant", "content": [call]}],
            "prompt": [2**70],
        },
        "",
    )


def test_slips_of_the_fingers_are_recognised(rng: random.Random) -> None:
    word = "guidance"
    for _ in range(200):
        place, letter = rng.randrange(len(word)), rng.choice(string.ascii_lowercase)
        dropped, replaced = word[:place] + word[place + 1 :], word[:place] + letter + word[place + 1 :]
        doubled = word[:place] + word[place] + word[place:]
        for slip in (dropped, replaced, doubled, word.upper(), f"{word}_", f"-{word.title()}"):
            assert resembles_guidance(slip), slip


def test_no_field_of_vllm_and_no_word_of_its_kind_is_taken_for_it() -> None:
    fields = {*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields}
    words = {"guided", "guided_json", "guided_decoding_backend", "guide", "guidelines", "audience", "instance", "", "é"}
    assert not [name for name in fields | words if resembles_guidance(name)]


def test_integers_are_bounded_wherever_they_stand(rng: random.Random) -> None:
    for value in (2**64, -(2**63) - 1, rng.randrange(2**64, 2**200)):
        for body, place in (({"seed": value}, "seed"), ({"a": [{"b": [1, value]}]}, "a.0.b.1")):
            with pytest.raises(GuidanceError) as caught:
                check_fields(body, "")
            assert caught.value.field == place
    check_fields({"seed": 2**64 - 1, "a": [-(2**63), True, 1.5]}, "")


def test_names_of_headers_and_queries_that_are_nobody_s_business() -> None:
    check_outside_body(["api-version", "timeout"], ["x-request-id", "authorization", "user-agent"], "")
