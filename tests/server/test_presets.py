"""Presets: guidance by a model's name or by its own, from unmodified clients."""

import random
from typing import Any

import openai
import pytest

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.request import parse_guidance
from steersman.server.presets import check_names
from steersman.server.registry import Registry
from tests.support.server import Server

STEERED = {"method": "pargs", "reward_model": "first", "beta": 1.5}
HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture
def prompt() -> list[int]:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    return [rng.randrange(2, 300) for _ in range(12)]


def test_every_preset_is_listed_as_a_model(server: Server) -> None:
    listed = [model.id for model in server.client.models.list()]
    assert listed == ["base", "base:steered", "base:blended", "base:picked"]


def test_a_model_name_chooses_the_preset(server: Server, prompt: list[int]) -> None:
    fields: dict[str, Any] = {"prompt": prompt, "max_tokens": 10, "temperature": 0}
    by_name = server.client.completions.create(model="base:steered", **fields)
    written = server.client.completions.create(model="base", **fields, extra_body={"guidance": STEERED})
    named = server.client.completions.create(model="base", **fields, extra_body={"guidance": "steered"})
    plain = server.client.completions.create(model="base", **fields)
    assert by_name.choices[0].text == written.choices[0].text == named.choices[0].text
    assert by_name.choices[0].guidance["method"] == "pargs"  # type: ignore[attr-defined]
    assert (by_name.model, written.model, plain.model) == ("base:steered", "base", "base")
    assert "guidance" not in plain.choices[0].model_extra  # type: ignore[operator]


@pytest.mark.parametrize("name", ["base:steered", "base:blended", "base:picked"])
def test_chats_stream_under_the_presets_name(server: Server, name: str) -> None:
    fields: dict[str, Any] = {"model": name, "messages": HELLO, "max_tokens": 8, "seed": 5}
    whole = server.client.chat.completions.create(**fields)
    options = {"include_usage": True}
    chunks = list(server.client.chat.completions.create(**fields, stream=True, stream_options=options))
    assert {chunk.model for chunk in chunks} == {whole.model} == {name}
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    reports = [c.guidance for chunk in chunks for c in chunk.choices if c.finish_reason]  # type: ignore[attr-defined]
    assert [report["tokens"] for report in reports] == [whole.choices[0].guidance["tokens"]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["base:absent", "absent:steered", "absent"])
def test_an_unknown_one_is_a_404_as_openais(server: Server, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.completions.create(model=name, prompt="hi", max_tokens=2)
    assert name in caught.value.message


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens"])
def test_tokens_are_counted_for_a_preset_as_for_the_base(server: Server, path: str) -> None:
    asked: dict[str, Any] = {
        "/tokenize": {"prompt": "hello there"},
        "/detokenize": {"tokens": [5, 6, 7]},
        "/v1/messages/count_tokens": {"messages": HELLO},
    }[path]
    answers = [server.post(path, {"model": name, **asked}) for name in ("base", "base:steered")]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()


@pytest.mark.parametrize("name", ["base", "base:steered", "base%3Asteered"])
def test_every_listed_model_can_be_looked_up(server: Server, name: str) -> None:
    card = server.get(f"/v1/models/{name}").json()
    listed = {model["id"]: model for model in server.get("/v1/models").json()["data"]}[name.replace("%3A", ":")]
    volatile = ("created", "permission")
    assert {k: v for k, v in card.items() if k not in volatile} == {
        k: v for k, v in listed.items() if k not in volatile
    }
    assert server.client.models.retrieve("base:steered").id == "base:steered"


@pytest.mark.parametrize("name", ["absent", "base:absent", "an/organisation%2Fmodel"])
def test_a_model_that_is_not_listed_is_not_found(server: Server, name: str) -> None:
    answer = server.get(f"/v1/models/{name}")
    assert answer.status_code == answer.json()["error"]["code"] == 404
    assert name.replace("%2F", "/") in answer.json()["error"]["message"]
    assert "base:steered" in answer.json()["error"]["message"]


def test_presets_belong_to_every_name_of_the_base_and_to_no_other_model() -> None:
    guidance = parse_guidance(STEERED)
    registry = Registry({}, presets={"8b": guidance, "steered": guidance}, served=("org/llama:8b", "alias"))
    assert registry.preset_models.keys() == {
        f"{name}:{preset}" for name in ("org/llama:8b", "alias") for preset in ("8b", "steered")
    }
    assert registry.preset_of_model("org/llama:8b") is None
    assert registry.preset_of_model("org/llama:8b:8b") == "8b"
    assert registry.preset_of_model("absent:steered") is None
    assert registry.preset_of_model(["alias:steered"]) is None
    check_names(registry.presets, registry.served, ["adapter"])
    for served, adapters in ((("alias", "alias:steered"), []), (("alias",), ["alias:8b"])):
        with pytest.raises(ModelRefused, match=r"served as alias:(steered|8b) already; rename"):
            check_names(registry.presets, served, adapters)


def test_presets_are_shown_with_their_guidance(server: Server) -> None:
    import httpx

    shown = httpx.get(f"{server.url}/v1/guidance", timeout=60).json()["presets"]
    assert shown["steered"] == STEERED
    assert shown["blended"] == {"method": "mixed", "policy": "expert", "mix": 0.7}
