"""What only the registry knows: which loaded models may be asked for what."""

from typing import Any

import pytest

from steersman.guidance.request import GuidanceError, parse_guidance
from steersman.guidance.tokenizers import check_ids
from steersman.server.metrics.requests import reason_of
from steersman.server.registry import LoadedModel, Registry

REWARDS = {name: LoadedModel(name, kind, 512) for name, kind in (("reads", "causal"), ("says", "vocabulary"))}


def test_no_end_token_behind_a_reward_that_is_said_before_its_token_is_read() -> None:
    registry = Registry(REWARDS)
    guidance = {"method": "pargs", "rewards": [{"model": "reads"}, {"model": "says"}]}
    registry.check(parse_guidance(guidance))
    with pytest.raises(GuidanceError, match=r"'says'.*leave end_token out") as caught:
        registry.check(parse_guidance({**guidance, "end_token": True}))
    assert caught.value.field == "guidance.end_token"


def test_no_budget_where_sampling_is_sharded() -> None:
    guidance = parse_guidance({"method": "pargs", "reward_model": "reads", "kl_budget": 5.0})
    Registry(REWARDS).check(guidance)
    with pytest.raises(GuidanceError, match="start without --enable-batch-sharded-sampling") as caught:
        Registry(REWARDS, sharded=True).check(guidance)
    assert caught.value.field == "guidance.kl_budget"


HEADS = {"tops": LoadedModel("tops", "head", 512)}
TILTS = {"tilts": LoadedModel("tilts", "policy_head", 512), "reads too": LoadedModel("reads too", "policy", 512)}


@pytest.mark.parametrize(
    ("guidance", "field", "says"),
    [
        ({"method": "pargs", "reward_model": "reads"}, "guidance.reward_model", "'reads' is of kind causal"),
        (
            {"method": "pargs", "rewards": [{"model": "tops"}, {"model": "says"}]},
            "guidance.rewards.1.model",
            "'says' is of kind vocabulary",
        ),
        ({"method": "mixed", "policy": "reads too", "mix": 1}, "guidance.policy", "'reads too' is of kind policy"),
        (
            {"method": "product", "policies": {"tilts": 1, "reads too": 1}},
            "guidance.policies.reads too",
            "use a head, best_of_n or blockwise",
        ),
        (
            {"method": "pargs", "reward_model": "tops", "gate": {"kl_above": 1, "policy": "reads too"}},
            "guidance.gate.policy",
            "start without --speculative-config",
        ),
        ({"method": "pargs", "reward_model": "tops", "kl_budget": 9}, "guidance.kl_budget", "leave it out"),
        (
            {"method": "length_control", "policy": "tilts", "length": 4, "kl_budget": 9},
            "guidance.kl_budget",
            "or start",
        ),
    ],
)
def test_what_cannot_take_tokens_back_guides_no_drafts(guidance: dict[str, Any], field: str, says: str) -> None:
    models = (REWARDS | HEADS, TILTS)
    Registry(*models).check(parse_guidance(guidance))
    with pytest.raises(GuidanceError, match=says) as caught:
        Registry(*models, speculative=True).check(parse_guidance(guidance))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "guidance",
    [
        {"method": "pargs", "reward_model": "tops", "top_k": None, "gate": {"first_tokens": 3}, "trace": True},
        {"method": "pargs", "reward_model": "tops", "policies": {"base": 1, "tilts": 1}},
        {"method": "kl_threshold", "policy": "tilts", "threshold": 1, "estimator": "monte_carlo"},
        {"method": "best_of_n", "reward_model": "reads", "n": 2},
        {"method": "blockwise", "reward_model": "says", "n": 2, "block": 4},
    ],
)
def test_heads_guide_drafts_and_samples_are_picked_by_any_model(guidance: dict[str, Any]) -> None:
    Registry(REWARDS | HEADS, TILTS, speculative=True).check(parse_guidance(guidance))


def test_the_heads_that_guide_tokens_are_found_and_those_that_pick_samples_are_not() -> None:
    registry = Registry(REWARDS | HEADS, TILTS)
    both = {"method": "pargs", "rewards": [{"model": "reads"}, {"model": "tops"}], "policies": {"tilts": 1, "base": 1}}
    assert registry.heads_of(parse_guidance(both)) == ["tops", "tilts"]
    assert registry.heads_of(parse_guidance({"method": "best_of_n", "reward_model": "tops", "n": 2})) == []
    assert registry.heads_of(parse_guidance({"method": "mixed", "policy": "reads too", "mix": 1})) == []


@pytest.mark.parametrize("token", [320, 10**9, -1])
def test_a_prompt_is_refused_for_the_model_that_cannot_read_it(token: int) -> None:
    models = [
        LoadedModel("text", "text", 512),
        LoadedModel("wide", "causal", 512, vocabulary=2**30),
        LoadedModel("narrow", "policy", 512, vocabulary=320),
    ]
    check_ids(models, [0, 319, 5], "prompt")
    check_ids(models, [], "prompt")
    with pytest.raises(GuidanceError, match=rf"holds token {token}, policy 'narrow' reads the ids 0 to 319") as caught:
        check_ids(models if token > 0 else models[2:], [5, token, 7], "prompt")
    assert (caught.value.field, reason_of(caught.value)) == ("prompt", "unsupported")
