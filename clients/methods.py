"""Ways to say how an answer shall be steered, checked before anything is sent."""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, Unpack, cast

from pydantic import BaseModel

from steersman.guidance.request import (
    BestOfN,
    Blockwise,
    Gate,
    Guidance,
    KLThresholdGuidance,
    LengthControlGuidance,
    MixedGuidance,
    ProductGuidance,
    Reward,
    RewardGuidance,
    parse_guidance,
)

GuidanceLike = Guidance | Mapping[str, Any] | str
"""A checked object, the JSON object it stands for, or the name of one of the server's presets."""


class SteeringOptions(TypedDict, total=False):
    """What every method that works token by token takes; what is left out is up to the server's defaults."""

    kl_budget: float
    trace: bool


class GateOptions(SteeringOptions, total=False):
    """The same for methods that a gate can confine."""

    gate: Gate | Mapping[str, Any]


class RewardOptions(GateOptions, total=False):
    """What `pargs` and `args` take besides reward models."""

    beta: float
    top_k: int | None
    end_token: bool
    policies: Mapping[str, float]


class ThresholdOptions(SteeringOptions, total=False):
    """What `kl_threshold` takes besides policy and threshold."""

    estimator: Literal["exact", "monte_carlo"]
    samples: int
    mix: float


def pargs(*rewards: str | Reward, **options: Unpack[RewardOptions]) -> RewardGuidance:
    """Token-level guidance by reward models trained on partial sequences: `pargs("helpful", beta=1.5)`.

    Several models are added up, each with its weight: `pargs("helpful", Reward(model="harmless", weight=0.5))`.
    Raises GuidanceError, as all of this module does, for what no server would accept.
    """
    return cast(RewardGuidance, _check("pargs", {**_named(rewards), **options}))


def args(*rewards: str | Reward, **options: Unpack[RewardOptions]) -> RewardGuidance:
    """The same rule as `pargs` with reward models trained on whole answers."""
    return cast(RewardGuidance, _check("args", {**_named(rewards), **options}))


def mixed(policy: str, mix: float, **options: Unpack[GateOptions]) -> MixedGuidance:
    """The policy mixed with the base model: `mixed("dpo", 0.7)`."""
    return cast(MixedGuidance, _check("mixed", {"policy": policy, "mix": mix, **options}))


def length_control(policy: str, length: int, **options: Unpack[SteeringOptions]) -> LengthControlGuidance:
    """The policy for the first `length` tokens."""
    return cast(LengthControlGuidance, _check("length_control", {"policy": policy, "length": length, **options}))


def kl_threshold(policy: str, threshold: float, **options: Unpack[ThresholdOptions]) -> KLThresholdGuidance:
    """The policy wherever it disagrees with the base model by more than `threshold` nats."""
    return cast(KLThresholdGuidance, _check("kl_threshold", {"policy": policy, "threshold": threshold, **options}))


def product(policies: Mapping[str, float], **options: Unpack[GateOptions]) -> ProductGuidance:
    """A product of distributions: `product({"base": 1, "expert": 1, "antiexpert": -1})`."""
    return cast(ProductGuidance, _check("product", {"policies": dict(policies), **options}))


def best_of_n(reward_model: str, n: int, *, trace: bool = False) -> BestOfN:
    """`n` whole answers, of which the reward model picks one."""
    return cast(BestOfN, _check("best_of_n", {"reward_model": reward_model, "n": n, "trace": trace}))


def blockwise(reward_model: str, n: int, block: int, *, trace: bool = False) -> Blockwise:
    """`n` samples of every `block` tokens, of which the reward model picks one."""
    fields = {"reward_model": reward_model, "n": n, "block": block, "trace": trace}
    return cast(Blockwise, _check("blockwise", fields))


def to_json(guidance: GuidanceLike) -> Any:
    """What a request carries in its `guidance` field: only what the caller has set."""
    if isinstance(guidance, str):
        return guidance
    checked = guidance if isinstance(guidance, BaseModel) else parse_guidance(dict(guidance))
    return checked.model_dump(mode="json", exclude_unset=True)


def _check(method: str, fields: Mapping[str, Any]) -> Guidance:
    plain = {k: dict(v) if isinstance(v, Mapping) else v for k, v in fields.items()}
    return parse_guidance({"method": method, **plain})


def _named(rewards: tuple[str | Reward, ...]) -> dict[str, Any]:
    if len(rewards) == 1 and isinstance(rewards[0], str):
        return {"reward_model": rewards[0]}
    return {"rewards": [{"model": term} if isinstance(term, str) else term for term in rewards]}
