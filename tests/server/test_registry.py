"""What only the registry knows: which loaded models may be asked for what."""

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
