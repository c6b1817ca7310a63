"""What the workers have loaded, known to the API process, so that every bad request is refused there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steersman.guidance import request as limits
from steersman.guidance.plan import Plan
from steersman.guidance.request import Guidance, GuidanceError, describe_methods


@dataclass(frozen=True)
class LoadedRewardModel:
    """One reward model as a worker described it. Sizes are in tokens and cache blocks."""

    name: str
    kind: str
    window: int
    cache_blocks: int = 0
    block_size: int = 1
    objective: str | None = None

    def blocks_for(self, tokens: int) -> int:
        """Cache blocks that a sequence of `tokens` needs."""
        return -(-tokens // self.block_size) if self.cache_blocks else 0


class Registry:
    """The reward models that requests may name."""

    def __init__(self, models: Sequence[LoadedRewardModel]) -> None:
        self.reward_models = {model.name: model for model in models}

    def check(self, guidance: Guidance) -> None:
        """Raises GuidanceError when a request names a model that is not loaded."""
        for number, term in enumerate(guidance.terms):
            if term.model not in self.reward_models:
                field = "guidance.reward_model" if guidance.rewards is None else f"guidance.rewards.{number}.model"
                known = ", ".join(sorted(self.reward_models)) or "none; start the server with --reward-model NAME=PATH"
                raise GuidanceError(field, f"no reward model {term.model!r:.80} is loaded; loaded are: {known}")

    def longest(self, plan: Plan) -> tuple[int, str]:
        """The longest text in tokens that every causal reward model of the plan reads, and which model bounds it."""
        return min((self.reward_models[t.model].window, t.model) for t in plan.rewards)

    def check_length(self, plan: Plan, prompt_tokens: int, max_tokens: int, given: str | None) -> int:
        """The number of tokens that may be generated; raises GuidanceError if the prompt or the answer is too long.

        `given` is the request's own field for max_tokens; where it has none, the answer is cut to what fits.
        """
        window, name = self.longest(plan)
        # One position is the candidate's, one more its end token's.
        room = window - prompt_tokens - (1 if plan.end_token else 0)
        if room < 1:
            raise GuidanceError(
                "prompt",
                f"has {prompt_tokens} tokens, reward model {name!r} reads at most {window} with the answer; "
                "shorten the prompt or use a reward model with a longer window",
            )
        if max_tokens > room and given is not None:
            raise GuidanceError(
                given,
                f"{max_tokens} with a prompt of {prompt_tokens} tokens exceeds the {window} tokens that reward model "
                f"{name!r} reads; ask for at most {room}",
            )
        return min(max_tokens, room)

    def blocks(self, plan: Plan, tokens: int, copies: int) -> dict[str, int]:
        """Cache blocks by reward model that `copies` sequences of `tokens` may come to need."""
        models = [self.reward_models[term.model] for term in plan.rewards]
        return {model.name: copies * model.blocks_for(tokens) for model in models if model.cache_blocks}

    def describe(self) -> dict[str, Any]:
        """The body of `GET /v1/guidance`."""
        return {
            "methods": describe_methods(),
            "reward_models": [
                {
                    "name": m.name,
                    "kind": m.kind,
                    "window": m.window,
                    "objective": m.objective,
                    "cache_blocks": m.cache_blocks,
                    "block_size": m.block_size,
                }
                for m in self.reward_models.values()
            ],
            "policies": [],
            "presets": {},
            "limits": {
                "top_k": limits.MAX_TOP_K,
                "beta": limits.MAX_BETA,
                "weight": limits.MAX_WEIGHT,
                "rewards": limits.MAX_REWARDS,
                "cache_tokens": {
                    m.name: m.cache_blocks * m.block_size for m in self.reward_models.values() if m.cache_blocks
                },
            },
        }


def build_registry(descriptions: Sequence[dict[str, Any]]) -> Registry:
    """A registry from what a worker's runtime says of its models."""
    fields = LoadedRewardModel.__dataclass_fields__
    return Registry([LoadedRewardModel(**{k: v for k, v in d.items() if k in fields}) for d in descriptions])
