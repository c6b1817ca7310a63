"""Bad requests are refused with HTTP 400 that names the field and the way out, and disturb nobody."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from steersman.guidance.request import METHODS
from tests.server.polling import assert_no_block_stays_in_use
from tests.support.server import Server

NAN, INFINITY = float("nan"), float("inf")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = {"method": "pargs", "reward_model": "first"}
REPETITION = {"max_pattern_size": 4, "min_count": 3}


@dataclass(frozen=True)
class Bad:
    """What is wrong with a request, the field that is to be named, and words that are to be found in the message."""

    change: dict[str, Any]
    param: str
    words: tuple[str, ...]
    paths: tuple[str, ...] = (COMPLETIONS, CHAT)


def _field(param: str, *words: str, **fields: Any) -> Bad:
    return Bad({"guidance": {**GOOD, **fields}}, param, words)


def _terms(param: str, *words: str, terms: Any) -> Bad:
    return Bad({"guidance": {"method": "pargs", "rewards": terms}}, param, words)


def _policy(param: str, *words: str, **fields: Any) -> Bad:
    return Bad({"guidance": {"method": "mixed", "policy": "expert", "mix": 0.5, **fields}}, param, words)


def _threshold(param: str, *words: str, **fields: Any) -> Bad:
    guidance = {"method": "kl_threshold", "policy": "expert", "threshold": 0.5, **fields}
    return Bad({"guidance": guidance}, param, words)


def _gate(param: str, *words: str, **gate: Any) -> Bad:
    return _policy(f"guidance.gate{param}", *words, gate=gate)


def _search(param: str, *words: str, method: str = "best_of_n", change: dict[str, Any] | None = None) -> Bad:
    guidance = {"method": method, "reward_model": "first", "n": 2}
    return Bad({"guidance": guidance, **(change or {})}, param, words)


def _blocks(param: str, **change: Any) -> Bad:
    return _search(param, "over the blocks", "use best_of_n", method="blockwise", change=change)


POLICIES = {
    "unknown policy": _policy("guidance.policy", "'absent'", "expert", "other", policy="absent"),
    "a reward model as policy": _policy("guidance.policy", "no policy 'first'", "expert", policy="first"),
    "a policy as reward model": _field("guidance.reward_model", "no reward model 'expert'", reward_model="expert"),
    "no policy": Bad({"guidance": {"method": "mixed", "mix": 0.5}}, "guidance.policy", ("required",)),
    "no mix": Bad({"guidance": {"method": "mixed", "policy": "expert"}}, "guidance.mix", ("required",)),
    "mix is NaN": _policy("guidance.mix", "finite", mix=NAN),
    "mix is huge": _policy("guidance.mix", "less than or equal to 100", mix=1e9),
    "mix with length_control": Bad(
        {"guidance": {"method": "length_control", "policy": "expert", "length": 3, "mix": 1}},
        "guidance.mix",
        ("not a known field", "length"),
    ),
    "length is zero": Bad(
        {"guidance": {"method": "length_control", "policy": "expert", "length": 0}},
        "guidance.length",
        ("greater than or equal to 1", "got 0"),
    ),
    "a gate and length_control": Bad(
        {"guidance": {"method": "length_control", "policy": "expert", "length": 3, "gate": {"first_tokens": 2}}},
        "guidance.gate",
        ("a gate itself", '"mixed"'),
    ),
    "a gate and kl_threshold": _threshold("guidance.gate", "a gate itself", '"mixed"', gate={"first_tokens": 2}),
    "threshold is negative": _threshold("guidance.threshold", "greater than or equal to 0", "-0.5", threshold=-0.5),
    "unknown estimator": _threshold("guidance.estimator", "'exact'", "'monte_carlo'", estimator="guess"),
    "length beyond 64 bits": Bad(
        {"guidance": {"method": "length_control", "policy": "expert", "length": 2**70}},
        "guidance.length",
        ("less than or equal to 2147483647", str(2**70)),
    ),
    "a gate beyond 64 bits": _gate(".first_tokens", "less than or equal to 2147483647", first_tokens=2**70),
    "a gate beyond 32 bits": _gate(".first_tokens", "less than or equal to 2147483647", first_tokens=2**31),
    "samples beyond 64 bits": _threshold(
        "guidance.samples", "less than or equal to 10000", estimator="monte_carlo", samples=2**70
    ),
    "samples of an exact KL": _threshold("guidance", "samples", "monte_carlo", samples=10),
    "no samples": _threshold("guidance.samples", "greater than or equal to 1", estimator="monte_carlo", samples=0),
    "too many samples": _threshold(
        "guidance.samples", "less than or equal to 10000", estimator="monte_carlo", samples=10**6
    ),
    "a gate without a condition": _gate("", "first_tokens", "entropy_above", "kl_above"),
    "a gate with an unknown condition": _gate(".last_tokens", "first_tokens", "entropy_above", last_tokens=3),
    "a gate of no tokens": _gate(".first_tokens", "greater than or equal to 1", first_tokens=0),
    "a negative entropy": _gate(".entropy_above", "greater than or equal to 0", entropy_above=-1.0),
    "samples without kl_above": _gate("", "need kl_above", first_tokens=3, samples=10),
    "a gate with an unknown policy": _gate(".policy", "'absent'", "expert", kl_above=0.1, policy="absent"),
    "whose KL?": _field("guidance.gate.policy", "whose KL", "none", gate={"kl_above": 0.1}),
    "a budget of zero": _policy("guidance.kl_budget", "greater than 0", "got 0", kl_budget=0),
    "a budget without end": _policy("guidance.kl_budget", "finite", kl_budget=INFINITY),
    "a product of nothing": Bad(
        {"guidance": {"method": "product", "policies": {}}}, "guidance.policies", ("at least 1",)
    ),
    "a product with an unknown policy": Bad(
        {"guidance": {"method": "product", "policies": {"base": 1, "absent": 1.0}}},
        "guidance.policies.absent",
        ("'absent'", "expert"),
    ),
    "a coefficient that is a string": Bad(
        {"guidance": {"method": "product", "policies": {"base": "1"}}}, "guidance.policies.base", ("valid number",)
    ),
    "too many policies": Bad(
        {"guidance": {"method": "product", "policies": {f"p{n}": 1.0 for n in range(9)}}},
        "guidance.policies",
        ("at most 8",),
    ),
    "answer exceeds the policy's window": Bad(
        {"prompt": [7] * 60, "max_tokens": 5, "guidance": {"method": "mixed", "policy": "slim", "mix": 1.0}},
        "max_tokens",
        ("policy 'slim'", "64", "at most 4"),
        (COMPLETIONS,),
    ),
    "best of one": Bad(
        {"guidance": {"method": "best_of_n", "reward_model": "first", "n": 1}},
        "guidance.n",
        ("greater than or equal to 2",),
    ),
    "best of too many": Bad(
        {"guidance": {"method": "best_of_n", "reward_model": "first", "n": 1000}},
        "guidance.n",
        ("less than or equal to 64",),
    ),
    "best of an unknown model": Bad(
        {"guidance": {"method": "best_of_n", "reward_model": "absent", "n": 2}},
        "guidance.reward_model",
        ("'absent'", "first"),
    ),
    "greedy samples": _search("temperature", "alike", "above 0", change={"temperature": 0}),
    "several best answers": _search("n", "best_of_n", "leave it at 1", change={"n": 2}),
    "a penalty over blocks": _blocks("presence_penalty", presence_penalty=0.5),
    "a penalty of repetitions over blocks": _blocks("frequency_penalty", frequency_penalty=-0.5),
    "repetitions over blocks": _blocks("repetition_detection", repetition_detection=REPETITION),
    "a thinking budget over blocks": _blocks("thinking_token_budget", thinking_token_budget=5),
    "a bad phrase over blocks": _blocks("bad_words", bad_words=["x", "the lazy kettle"]),
    "a grammar over blocks": _blocks("structured_outputs", structured_outputs={"choice": ["a", "b"]}),
    "a format over blocks": _blocks("response_format", response_format={"type": "json_object"}),
    "an empty block": Bad(
        {"guidance": {"method": "blockwise", "reward_model": "first", "n": 2, "block": 0}},
        "guidance.block",
        ("greater than or equal to 1",),
    ),
    "an unknown preset": Bad({"guidance": "gentle"}, "guidance", ("no preset 'gentle'", "steered", "blended")),
    "a preset twice": Bad(
        {"model": "base:steered", "guidance": GOOD}, "guidance", ("base:steered", "stands for a preset", "leave one")
    ),
    "beam search by a preset": Bad(
        {"model": "base:blended", "guidance": None, "use_beam_search": True, "n": 2}, "use_beam_search", ("leave one",)
    ),
}

BAD = {
    **POLICIES,
    "guidance is a list": Bad({"guidance": [GOOD]}, "guidance", ("must be an object", "method")),
    "guidance is a number": Bad({"guidance": 7}, "guidance", ("7",)),
    "guidance is true": Bad({"guidance": True}, "guidance", ("True",)),
    "guidance is empty": Bad({"guidance": {}}, "guidance.method", ("is missing", *METHODS)),
    "no method": Bad({"guidance": {"reward_model": "first"}}, "guidance.method", ("is missing", *METHODS)),
    "unknown method": _field("guidance.method", "'steer'", *METHODS, method="steer"),
    "method is null": _field("guidance.method", *METHODS, method=None),
    "method is a list": _field("guidance.method", *METHODS, method=["pargs"]),
    "unknown field": _field("guidance.bta", "beta", "top_k", "reward_model", bta=1),
    "unknown model": _field("guidance.reward_model", "'absent'", "first", "second", "narrow", reward_model="absent"),
    "model without a name": _field("guidance.reward_model", "at least 1", reward_model=""),
    "model is a number": _field("guidance.reward_model", "string", "got 3", reward_model=3),
    "beta is negative": _field("guidance.beta", "greater than or equal to 0", "-0.5", beta=-0.5),
    "beta is NaN": _field("guidance.beta", "finite", beta=NAN),
    "beta is infinite": _field("guidance.beta", "finite", beta=INFINITY),
    "beta is minus infinity": _field("guidance.beta", "finite", beta=-INFINITY),
    "beta is a string": _field("guidance.beta", "valid number", "'1'", beta="1"),
    "beta is true": _field("guidance.beta", "valid number", "True", beta=True),
    "beta is null": _field("guidance.beta", "valid number", beta=None),
    "beta is huge": _field("guidance.beta", "less than or equal to 100", beta=1e9),
    "top_k is zero": _field("guidance.top_k", "greater than or equal to 1", top_k=0),
    "top_k is huge": _field("guidance.top_k", "less than or equal to", "10000", top_k=10000),
    "top_k is a fraction": _field("guidance.top_k", "valid integer", "2.5", top_k=2.5),
    "top_k is true": _field("guidance.top_k", "valid integer", "True", top_k=True),
    "top_k is beyond 64 bits": _field("guidance.top_k", "less than or equal to", str(2**70), top_k=2**70),
    "another field is beyond 64 bits": Bad({"top_k": 2**70}, "top_k", ("2**64 - 1", str(2**70))),
    "an argument is beyond 64 bits": Bad({"vllm_xargs": {"a": [1, -(2**64)]}}, "vllm_xargs.a.1", ("-2**63",)),
    "top_k is a string": _field("guidance.top_k", "valid integer", "'10'", top_k="10"),
    "end_token without reading candidates": _field(
        "guidance.end_token", "every", "leave end_token out", reward_model="every", end_token=True
    ),
    "end_token is a number": _field("guidance.end_token", "valid boolean", end_token=1),
    "model and terms": _field("guidance", "either reward_model or rewards", rewards=[{"model": "first"}]),
    "neither model nor terms": Bad({"guidance": {"method": "args"}}, "guidance", ("either reward_model or rewards",)),
    "no terms": _terms("guidance.rewards", "at least 1", terms=[]),
    "terms are an object": _terms("guidance.rewards", "valid list", terms={"model": "first"}),
    "too many terms": _terms("guidance.rewards", "at most 8", terms=[{"model": f"m{n}"} for n in range(9)]),
    "a model twice": _terms("guidance", "twice", "weights", terms=[{"model": "first"}, {"model": "first"}]),
    "term without a model": _terms("guidance.rewards.1.model", "required", terms=[{"model": "first"}, {"weight": 1}]),
    "term with an unknown model": _terms(
        "guidance.rewards.1.model", "'absent'", "first", terms=[{"model": "first"}, {"model": "absent"}]
    ),
    "term with an unknown field": _terms(
        "guidance.rewards.0.tau", "weight", "transform", terms=[{"model": "first", "tau": 1}]
    ),
    "weight is NaN": _terms("guidance.rewards.0.weight", "finite", terms=[{"model": "first", "weight": NAN}]),
    "weight is huge": _terms(
        "guidance.rewards.0.weight", "less than or equal to 100", terms=[{"model": "first", "weight": 1e9}]
    ),
    "unknown transform": _terms(
        "guidance.rewards.0.transform",
        *("identity", "affine", "log_sigmoid"),
        terms=[{"model": "first", "transform": "cube"}],
    ),
    "reference without log_sigmoid": _terms(
        "guidance.rewards.0", "reference", "log_sigmoid", terms=[{"model": "first", "reference": 1.0}]
    ),
    "scale without affine": _terms("guidance.rewards.0", "scale", "affine", terms=[{"model": "first", "scale": 2.0}]),
    "beam search": Bad({"use_beam_search": True, "n": 2}, "use_beam_search", ("guidance", "leave one")),
    "more choices than the cache holds": Bad(
        {"n": 128, "max_tokens": 150}, "max_tokens", ("n=128", "'first'", "--guidance-cache")
    ),
    "embeddings": Bad({"prompt_embeds": "AAAA"}, "prompt_embeds", ("tokens", "send a prompt"), (COMPLETIONS,)),
    "empty prompt": Bad({"prompt": ""}, "prompt", ("empty",), (COMPLETIONS,)),
    "one empty prompt of two": Bad({"prompt": [[5, 6], []]}, "prompt", ("empty",), (COMPLETIONS,)),
    "prompt fills the window": Bad(
        {"prompt": [7] * 64, "guidance": {**GOOD, "reward_model": "narrow"}},
        "prompt",
        ("64 tokens", "'narrow'", "shorten"),
        (COMPLETIONS,),
    ),
    "answer exceeds the window": Bad(
        {"prompt": [7] * 60, "max_tokens": 5, "guidance": {**GOOD, "reward_model": "narrow"}},
        "max_tokens",
        ("'narrow'", "64", "at most 4"),
        (COMPLETIONS,),
    ),
    "answer to a chat exceeds the window": Bad(
        {"max_completion_tokens": 60, "guidance": {**GOOD, "reward_model": "narrow"}},
        "max_completion_tokens",
        ("'narrow'", "64", "at most"),
        (CHAT,),
    ),
    "chat exceeds the window": Bad(
        {"messages": [{"role": "user", "content": "zq" * 60}], "guidance": {**GOOD, "reward_model": "narrow"}},
        "messages",
        ("'narrow'", "64", "shorten"),
        (CHAT,),
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("path", "bad"),
    [
        pytest.param(path, bad, id=f"{'chat' if path == CHAT else 'completions'}: {name}")
        for name, bad in BAD.items()
        for path in bad.paths
    ],
)
def test_the_refusal_names_the_field_and_the_way_out(server: Server, path: str, bad: Bad, stream: bool) -> None:
    response = _send(server, path, {**_body(path), **bad.change, "stream": stream})
    error = _error(response)
    assert error["param"] == bad.param
    assert bad.param.split(".")[-1] in error["message"]
    missing = [word for word in bad.words if word not in error["message"]]
    assert not missing, f"{missing} not in {error['message']!r}"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_null_guidance_is_no_guidance(server: Server, path: str) -> None:
    response = _send(server, path, {**_body(path), "guidance": None})
    assert response.status_code == 200
    assert "guidance" not in response.json()["choices"][0]


def test_a_chat_whose_length_was_not_given_is_cut_to_the_window(server: Server) -> None:
    body = {**_body(CHAT), "max_tokens": None, "ignore_eos": True, "guidance": {**GOOD, "reward_model": "narrow"}}
    response = _send(server, CHAT, body)
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    assert usage["total_tokens"] == 64
    assert response.json()["choices"][0]["guidance"]["tokens"] == usage["completion_tokens"]


OTHER_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "hi", "max_output_tokens": 4},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/v1/chat/completions/batch": {"messages": [[{"role": "user", "content": "hi"}]], "max_tokens": 4},
    "/invocations": {"prompt": "hi", "max_tokens": 4},
    "/tokenize": {"prompt": "hi"},
}


@pytest.mark.parametrize("path", OTHER_ROUTES)
def test_routes_without_guidance_refuse_it(server: Server, path: str) -> None:
    body = {"model": "base", **OTHER_ROUTES[path]}
    assert _send(server, path, body).status_code == 200
    error = _error(_send(server, path, {**body, "guidance": GOOD}))
    assert error["param"] == "guidance"
    assert path in error["message"]
    assert COMPLETIONS in error["message"]


@pytest.mark.parametrize("path", sorted(OTHER_ROUTES.keys() - {"/tokenize"}))
def test_routes_without_guidance_refuse_models_that_stand_for_it(server: Server, path: str) -> None:
    error = _error(_send(server, path, {"model": "base:steered", **OTHER_ROUTES[path]}))
    assert error["param"] == "model"
    assert COMPLETIONS in error["message"]
    assert "the model 'base'" in error["message"]


@pytest.mark.parametrize("prompts", [[2**70], [5, -(2**70)]])
@pytest.mark.parametrize("field", ["prompt", "responses"])
def test_rewards_of_tokens_beyond_any_vocabulary_are_refused(server: Server, field: str, prompts: list[int]) -> None:
    body = {"model": "first", "prompt": "hi", "responses": ["there"]}
    change: dict[str, Any] = {"prompt": prompts} if field == "prompt" else {"responses": [prompts]}
    assert field in _error(_send(server, "/v1/rewards", {**body, **change}))["message"]


@pytest.mark.parametrize("token", [True, "5", 5.5])
def test_rewards_take_numbers_for_tokens_and_nothing_else(server: Server, token: Any) -> None:
    body = {"model": "first", "responses": [[5, 6]]}
    assert "prompt" in _error(_send(server, "/v1/rewards", {**body, "prompt": [7, token]}))["message"]
    whole, integral = (_send(server, "/v1/rewards", {**body, "prompt": [7, five]}) for five in (5, 5.0))
    assert whole.json() == integral.json()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), 2**32])
@pytest.mark.parametrize("method", ["sampled", "monte_carlo", "best_of_n"])
def test_every_seed_of_64_bits_works_with_guidance(server: Server, method: str, seed: int, n: int) -> None:
    guidance = {
        "sampled": GOOD,
        "monte_carlo": {"method": "kl_threshold", "policy": "expert", "threshold": 0.1, "estimator": "monte_carlo"},
        "best_of_n": {"method": "best_of_n", "reward_model": "first", "n": 2},
    }[method]
    body = {"model": "base", "prompt": [5, 6], "max_tokens": 3, "seed": seed, "guidance": guidance}
    if method != "best_of_n":
        body["n"] = n
    answers = [_send(server, COMPLETIONS, body) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    first, second = ([choice["text"] for choice in answer.json()["choices"]] for answer in answers)
    assert first == second


def test_bad_requests_neither_disturb_a_neighbour_nor_leave_anything_behind(server: Server) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    prompt = [rng.randrange(2, 300) for _ in range(20)]
    fields = {"max_tokens": 150, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    alone = server.complete(prompt, GOOD, **fields)["choices"][0]
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(server.complete, prompt, GOOD, **fields)
        refused = 0
        while not neighbour.done():
            path, bad = rng.choice([(path, bad) for bad in BAD.values() for path in bad.paths])
            assert _send(server, path, {**_body(path), **bad.change}).status_code == 400
            refused += 1
    assert refused >= 10, "the neighbour was too short for this test"
    assert neighbour.result()["choices"][0]["token_ids"] == alone["token_ids"]
    assert_no_block_stays_in_use(server)
    assert server.complete(prompt, GOOD, **fields)["choices"][0]["token_ids"] == alone["token_ids"]


def _body(path: str) -> dict[str, Any]:
    asked = {"prompt": [5, 6, 7]} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
    return {"model": "base", "max_tokens": 4, "guidance": GOOD, **asked}


def _send(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    # json.dumps writes NaN and Infinity, which httpx's own `json=` refuses.
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{server.url}{path}", content=json.dumps(body), headers=headers, timeout=120)


def _error(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert error["code"] == 400
    assert error["type"].replace(" ", "").startswith("BadRequest")
    return error
