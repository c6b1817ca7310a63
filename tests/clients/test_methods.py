"""Guidance is checked where it is written, before anything is sent."""

import math
from typing import Any

import pytest

from steersman.clients.client import GuidanceError, Reward, RewardGuidance, Steersman, args, pargs
from steersman.clients.methods import to_json


def test_one_model_is_named_shortly() -> None:
    assert to_json(pargs("helpful", beta=1.5)) == {"method": "pargs", "reward_model": "helpful", "beta": 1.5}


def test_several_models_become_reward_terms() -> None:
    guidance = args("helpful", Reward(model="harmless", weight=0.5), top_k=3)
    rewards = [{"model": "helpful"}, {"model": "harmless", "weight": 0.5}]
    assert to_json(guidance) == {"method": "args", "rewards": rewards, "top_k": 3}


def test_objects_dictionaries_and_preset_names_are_equally_good() -> None:
    written = {"method": "pargs", "reward_model": "helpful", "beta": 2}
    assert to_json(RewardGuidance(method="pargs", reward_model="helpful", beta=2)) == to_json(written) == written
    assert to_json("gentle") == "gentle"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"beta": -1}, "guidance.beta"),
        ({"beta": math.nan}, "guidance.beta"),
        ({"beta": "1"}, "guidance.beta"),
        ({"top_k": 0}, "guidance.top_k"),
        ({"top_k": 2.5}, "guidance.top_k"),
        ({"bta": 1}, "guidance.bta"),
    ],
)
def test_bad_values_name_their_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(GuidanceError) as caught:
        pargs("helpful", **options)
    assert caught.value.field == field


def test_no_model_and_a_model_twice_are_refused() -> None:
    with pytest.raises(GuidanceError, match="at least 1 item"):
        pargs()
    with pytest.raises(GuidanceError, match="twice"):
        pargs("helpful", Reward(model="helpful"))


def test_a_bad_dictionary_never_leaves_the_machine() -> None:
    client = Steersman(base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(GuidanceError, match=r"guidance\.method"):
        client.completions.create(model="base", prompt="x", guidance={"method": "nothing"})


def test_an_openai_key_in_the_environment_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://elsewhere.example/v1")
    client = Steersman()
    assert client.api_key == "none"
    assert str(client.base_url) == "http://127.0.0.1:8000/v1/"
