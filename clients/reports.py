"""What the server says about guidance, typed: the report of an answer and the contents of `GET /v1/guidance`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    # A newer server may say more; what it says stays readable as an attribute.
    model_config = ConfigDict(frozen=True, extra="allow")


class Candidate(_Answer):
    """One candidate of a traced token."""

    token_id: int
    token: str
    logprob: float
    """log π₀."""
    reward: float | None
    """Σ w T(r) of the reward terms; None where there are none."""
    score: float
    """log π."""


class TracedToken(_Answer):
    """One token of a traced answer."""

    token_id: int
    token: str
    candidates: tuple[Candidate, ...]
    """Best first; empty where the base model decoded alone."""
    kl: float
    """log π − log π₀ of the token, nats."""
    source: str
    """What was sampled from: base, a policy's name, mixture, or guided."""


class GuidanceReport(_Answer):
    """What guidance did to one choice."""

    method: str
    tokens: int
    guided_tokens: int
    interventions: int
    """Positions at which guidance changed the most likely token."""
    kl: float
    """Σ log π − log π₀ of the chosen tokens, nats, before temperature and top-p."""
    kl_truncation: float = 0.0
    """Of it what keeping only the best k tokens costs: there also at strength 0."""
    kl_steering: float = 0.0
    """The rest: what rewards and policies have done, and what a budget bounds."""
    rewards: dict[str, float | None]
    """Each reward model's value at the end of the answer; None where the last token was not scored."""
    reward_model_tokens: int
    """Tokens that reward models read for this choice."""
    policy_tokens: int
    """Tokens that policies read for this choice."""
    saved_reward_model_tokens: int = 0
    """Tokens that closed gates spared the reward models."""
    saved_policy_tokens: int = 0
    """Tokens that closed gates spared the policies."""
    sources: dict[str, int] = Field(default_factory=dict)
    """Tokens by the distribution that they were sampled from: base, guided, mixture, or a policy's name."""
    switches: int = 0
    """Tokens that were sampled from another distribution than the one before."""
    kl_spent: float | None = None
    """Σ KL(π‖π₀) over positions, nats, where there is a budget."""
    unreadable_samples: int = 0
    """Of a choice among samples: those left out because the reward model lacks one of their tokens."""
    trace: tuple[TracedToken, ...] | tuple[dict[str, Any], ...] | None = None
    """One object a token; of a choice among samples, one a block."""


class LoadedModel(_Answer):
    """A reward model or policy that requests may name."""

    name: str
    kind: str | None = None
    window: int | None = None
    """The longest prompt and answer together, in tokens."""


class ServerGuidance(_Answer):
    """What a server offers."""

    methods: dict[str, dict[str, Any]]
    """Method name → JSON schema of its guidance object."""
    reward_models: tuple[LoadedModel, ...]
    policies: tuple[LoadedModel, ...]
    presets: dict[str, Any]
    limits: dict[str, Any]


def guidance_of(choice: BaseModel) -> GuidanceReport | None:
    """The report on a choice of a completion or chat completion; None if it was not guided.

    In a stream only the chunk with the choice's finish_reason carries one.
    """
    report = (choice.model_extra or {}).get("guidance")
    return None if report is None else GuidanceReport.model_validate(report)
