"""Guidance is checked where it is written, before anything is sent."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from steersman.clients.client import (
    Gate,
    GuidanceError,
    Reward,
    RewardGuidance,
    Steersman,
    args,
    best_of_n,
    blockwise,
    kl_threshold,
    length_control,
    mixed,
    pargs,
    product,
)
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


def test_every_method_is_written_as_the_contract_has_it() -> None:
    gate = {"first_tokens": 8}
    for guidance, written in (
        (mixed("dpo", 0.7, gate=gate), {"method": "mixed", "policy": "dpo", "mix": 0.7, "gate": gate}),
        (mixed("dpo", 0.7, gate=Gate(first_tokens=8)), {"method": "mixed", "policy": "dpo", "mix": 0.7, "gate": gate}),
        (
            length_control("dpo", 32, trace=True),
            {"method": "length_control", "policy": "dpo", "length": 32, "trace": True},
        ),
        (
            kl_threshold("dpo", 0.5, estimator="monte_carlo", samples=1000),
            {"method": "kl_threshold", "policy": "dpo", "threshold": 0.5, "estimator": "monte_carlo", "samples": 1000},
        ),
        (product({"base": 1, "expert": -1}), {"method": "product", "policies": {"base": 1.0, "expert": -1.0}}),
        (
            pargs("helpful", policies={"base": 0.4, "dpo": 0.6}, kl_budget=20.0),
            {
                **{"method": "pargs", "reward_model": "helpful"},
                **{"policies": {"base": 0.4, "dpo": 0.6}, "kl_budget": 20.0},
            },
        ),
        (
            best_of_n("helpful", 8, trace=True),
            {"method": "best_of_n", "reward_model": "helpful", "n": 8, "trace": True},
        ),
    ):
        assert to_json(guidance) == written
    assert to_json(blockwise("helpful", 4, 16))["block"] == 16


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda: mixed("dpo", math.inf), "guidance.mix"),
        (lambda: mixed("dpo", 0.5, gate={"kl_below": 1}), "guidance.gate.kl_below"),
        (lambda: length_control("dpo", 0), "guidance.length"),
        (lambda: kl_threshold("dpo", -1), "guidance.threshold"),
        (lambda: product({}), "guidance.policies"),
        (lambda: pargs("helpful", kl_budget=0), "guidance.kl_budget"),
        (lambda: best_of_n("helpful", 1), "guidance.n"),
        (lambda: blockwise("helpful", 2, 0), "guidance.block"),
    ],
)
def test_bad_values_of_every_method_name_their_field(ask: Callable[[], Any], field: str) -> None:
    with pytest.raises(GuidanceError) as caught:
        ask()
    assert caught.value.field == field


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
