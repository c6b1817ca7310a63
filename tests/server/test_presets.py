"""Presets: guidance by a model's name or by its own, from unmodified clients."""

import random
from typing import Any

import openai
import pytest

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


def test_presets_are_shown_with_their_guidance(server: Server) -> None:
    import httpx

    shown = httpx.get(f"{server.url}/v1/guidance", timeout=60).json()["presets"]
    assert shown["steered"] == STEERED
    assert shown["blended"] == {"method": "mixed", "policy": "expert", "mix": 0.7}
