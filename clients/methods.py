"""Ways to say how an answer shall be steered, checked before anything is sent."""

from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

from pydantic import BaseModel

from steersman.guidance.request import Guidance, Reward, RewardGuidance, parse_guidance

GuidanceLike = Guidance | Mapping[str, Any] | str
"""A checked object, the JSON object it stands for, or the name of one of the server's presets."""


class RewardOptions(TypedDict, total=False):
    """What `pargs` and `args` take besides reward models; what is left out is up to the server's defaults."""

    beta: float
    top_k: int
    end_token: bool


def pargs(*rewards: str | Reward, **options: Unpack[RewardOptions]) -> RewardGuidance:
    """Token-level guidance by reward models trained on partial sequences: `pargs("helpful", beta=1.5)`.

    Several models are added up, each with its weight: `pargs("helpful", Reward(model="harmless", weight=0.5))`.
    Raises GuidanceError, as all of this module does, for what no server would accept.
    """
    return _reward_guidance("pargs", rewards, options)


def args(*rewards: str | Reward, **options: Unpack[RewardOptions]) -> RewardGuidance:
    """The same rule as `pargs` with reward models trained on whole answers."""
    return _reward_guidance("args", rewards, options)


def to_json(guidance: GuidanceLike) -> Any:
    """What a request carries in its `guidance` field: only what the caller has set."""
    if isinstance(guidance, str):
        return guidance
    checked = guidance if isinstance(guidance, BaseModel) else parse_guidance(dict(guidance))
    return checked.model_dump(mode="json", exclude_unset=True)


def _reward_guidance(method: str, rewards: tuple[str | Reward, ...], options: RewardOptions) -> RewardGuidance:
    if len(rewards) == 1 and isinstance(rewards[0], str):
        named: dict[str, Any] = {"reward_model": rewards[0]}
    else:
        named = {"rewards": [{"model": term} if isinstance(term, str) else term for term in rewards]}
    return parse_guidance({"method": method, **named, **options})
