"""What the workers have loaded, known to the API process, so that every bad request is refused there."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from steersman.guidance import request as limits
from steersman.guidance.head_models import HEAD_KINDS
from steersman.guidance.plan import Plan
from steersman.guidance.request import (
    Guidance,
    GuidanceError,
    ModelNotLoaded,
    RewardGuidance,
    SearchGuidance,
    SteeredGuidance,
    TooLong,
    describe_methods,
    policies,
    reward_models,
)
from steersman.guidance.text_form import Source
from steersman.guidance.tokenizers import POLICY_KINDS, name_model

EVERY_TOKEN = ("head", "vocabulary")
"""Kinds of reward models that compute the reward of every next token without reading it."""

SHORTER = "ask for fewer tokens, shorten the prompt or use a model with a longer window"
"""The way out for a text that has outgrown a model's window while it was decoded."""


@dataclass(frozen=True)
class LoadedModel:
    """One reward model or policy as a worker described it. Sizes are in tokens and cache blocks."""

    name: str
    kind: str
    window: int
    cache_blocks: int = 0
    block_size: int = 1
    objective: str | None = None
    vocabulary: int | None = None
    """Token ids below this number can be read; None where the model reads text."""
    form: str | None = None
    """How a model that reads text is given a prompt and an answer: chat, pair or raw."""
    drift: float | None = None
    """Of a head: how far its outputs on the served base are from those in training, as a share of their spread."""
    chats: str | None = None
    """Which chats such a model takes: "all", "one question" or "none"."""

    def blocks_for(self, tokens: int) -> int:
        """Cache blocks that a sequence of `tokens` needs."""
        return -(-tokens // self.block_size) if self.cache_blocks else 0

    def check_source(self, source: Source | None, field: str) -> None:
        """Raises GuidanceError for a chat that a model without a chat template cannot be given."""
        if source is None or source.messages is None or self.chats in (None, "all"):
            return
        if self.chats == "one question" and source.is_one_question:
            return
        takes = "one user message only" if self.chats == "one question" else "no chat"
        raise GuidanceError(
            field,
            f"cannot be written for reward model {self.name!r}, whose tokenizer has no chat template and which takes "
            f"{takes}; start the server with --reward-template {self.name}=raw, pair or a Jinja file",
        )


@dataclass(frozen=True)
class Registry:
    """The reward models, policies and presets that requests may name. Reward models and policies share no name."""

    reward_models: dict[str, LoadedModel]
    policies: dict[str, LoadedModel] = field(default_factory=dict)
    presets: dict[str, Guidance] = field(default_factory=dict)
    served: tuple[str, ...] = ()
    """Names of the base model."""
    sharded: bool = False
    """Whether each tensor-parallel rank samples, and guides, requests of its own."""
    speculative: bool = False
    """Whether the base decodes speculatively: tokens are drafted, and may be rejected after they were guided."""

    @property
    def models(self) -> dict[str, LoadedModel]:
        """Every auxiliary model by name."""
        return {**self.reward_models, **self.policies}

    def with_model(self, model: LoadedModel) -> "Registry":
        """This registry and one model more."""
        if model.kind in POLICY_KINDS:
            return replace(self, policies={**self.policies, model.name: model})
        return replace(self, reward_models={**self.reward_models, model.name: model})

    def without_model(self, name: str) -> "Registry":
        """This registry and one model less."""
        rest = [{n: m for n, m in known.items() if n != name} for known in (self.reward_models, self.policies)]
        return replace(self, reward_models=rest[0], policies=rest[1])

    def presets_of(self, name: str) -> list[str]:
        """Presets that ask the model."""
        named = {preset: (*reward_models(g), *policies(g)) for preset, g in self.presets.items()}
        return [preset for preset, asked in named.items() if name in {model for _, model in asked}]

    def check(self, guidance: Guidance) -> None:
        """Raises GuidanceError when a request names a model that is not loaded."""
        for what, option, named, loaded in (
            ("reward model", "--reward-model", reward_models(guidance), self.reward_models),
            ("policy", "--policy", policies(guidance), self.policies),
        ):
            for place, name in named:
                if name not in loaded:
                    known = ", ".join(sorted(loaded)) or f"none; start the server with {option} NAME=PATH"
                    raise ModelNotLoaded(place, f"no {what} {name!r:.80} is loaded; loaded are: {known}")
        if self.sharded and getattr(guidance, "kl_budget", None) is not None:
            raise GuidanceError(
                "guidance.kl_budget",
                "cannot be kept by a server that shards sampling, where a preempted answer may go on in a worker that "
                "does not know what it has spent; leave it out or start without --enable-batch-sharded-sampling",
            )
        if self.speculative and not isinstance(guidance, SearchGuidance):
            self._check_drafts(guidance)
        if isinstance(guidance, RewardGuidance) and guidance.top_k is None:
            for _, name in reward_models(guidance):
                if self.reward_models[name].kind not in EVERY_TOKEN:
                    raise GuidanceError(
                        "guidance.top_k",
                        f"null needs reward models of kind head or vocabulary; {name!r} is of kind "
                        f"{self.reward_models[name].kind} and reads every candidate: give at most {limits.MAX_TOP_K}",
                    )
        if isinstance(guidance, RewardGuidance) and guidance.end_token:
            for _, name in reward_models(guidance):
                if self.reward_models[name].kind in EVERY_TOKEN:
                    raise GuidanceError(
                        "guidance.end_token",
                        f"reward model {name!r} says the reward of every next token without reading it, so it has none "
                        "behind an end token; leave end_token out or use a reward model that reads candidates",
                    )

    def _check_drafts(self, guidance: SteeredGuidance) -> None:
        """Raises GuidanceError for what cannot guide drafted tokens."""
        for place, name in (*reward_models(guidance), *policies(guidance)):
            if self.models[name].kind not in HEAD_KINDS:
                raise GuidanceError(
                    place,
                    f"{name!r} is of kind {self.models[name].kind}, which reads each token and cannot take back those "
                    "that speculative decoding rejects; use a head, best_of_n or blockwise, or start without "
                    "--speculative-config",
                )
        if guidance.kl_budget is not None:
            raise GuidanceError(
                "guidance.kl_budget",
                "cannot be kept under speculative decoding, where tokens are guided before it is known what those in "
                "front of them have spent; leave it out or start without --speculative-config",
            )

    @property
    def preset_models(self) -> dict[str, str]:
        """The names, MODEL:PRESET, under which presets are served as models, and the preset of each."""
        return {f"{name}:{preset}": preset for name in self.served for preset in self.presets}

    def preset_of_model(self, model: Any) -> str | None:
        """The preset that a request's model stands for."""
        return self.preset_models.get(model) if isinstance(model, str) else None

    def text_models(self, guidance: Guidance) -> list[LoadedModel]:
        """Reward models of a checked request that read text."""
        named = [self.reward_models[name] for _, name in reward_models(guidance)]
        return [model for model in named if model.kind == "text"]

    def heads_of(self, guidance: Guidance) -> list[str]:
        """Names of the heads that guide the tokens of a checked request. A head that picks among samples is given the
        hidden states of the base itself."""
        if isinstance(guidance, SearchGuidance):
            return []
        named = dict.fromkeys(name for _, name in (*reward_models(guidance), *policies(guidance)))
        return [name for name in named if self.models[name].kind in HEAD_KINDS]

    def find_preset(self, name: str) -> Guidance:
        """The guidance that a preset stands for; raises GuidanceError."""
        preset = self.presets.get(name)
        if preset is None:
            known = ", ".join(sorted(self.presets)) or "none; start the server with --guidance-presets FILE"
            raise ModelNotLoaded("guidance", f"no preset {name!r:.80} is loaded; loaded are: {known}")
        return preset

    def models_of(self, plan: Plan) -> list[LoadedModel]:
        """The auxiliary models that a plan may ask."""
        return [self.models[name] for name in plan.models]

    def describe(self) -> dict[str, Any]:
        """The body of `GET /v1/guidance`."""
        return {
            "methods": describe_methods(),
            "reward_models": [asdict(model) for model in self.reward_models.values()],
            "policies": [asdict(model) for model in self.policies.values()],
            "presets": {
                name: preset.model_dump(mode="json", exclude_unset=True) for name, preset in self.presets.items()
            },
            "limits": {
                "top_k": limits.MAX_TOP_K,
                "beta": limits.MAX_BETA,
                "weight": limits.MAX_WEIGHT,
                "rewards": limits.MAX_REWARDS,
                "policies": limits.MAX_POLICIES,
                "coefficient": limits.MAX_COEFFICIENT,
                "samples": limits.MAX_SAMPLES,
                "n": limits.MAX_ANSWERS,
                "block": limits.MAX_BLOCK,
                "length": limits.MAX_LENGTH,
                "first_tokens": limits.MAX_LENGTH,
                "cache_tokens": {m.name: m.cache_blocks * m.block_size for m in self.models.values() if m.cache_blocks},
            },
        }


def reach(plan: Plan, prompt_tokens: int, max_tokens: int) -> int:
    """The most tokens that the plan's models may come to read: a gate on the position ends their reading."""
    first = plan.gate.first_tokens
    return prompt_tokens + (max_tokens if first is None else min(first, max_tokens))


@dataclass(frozen=True)
class PromptLength:
    """How long a prompt is to each auxiliary model."""

    tokens: int
    """The base model's, which models that share its tokenizer read."""
    measured: Mapping[str, int] = field(default_factory=dict)
    """Tokens of text models, by name; one that is not here is taken to count as the base does."""
    field: str = "prompt"
    """The request's own field for it."""

    def for_model(self, name: str) -> int:
        """In the tokens of one model."""
        return self.measured.get(name, self.tokens)


def check_length(
    models: Sequence[LoadedModel], prompt: PromptLength, max_tokens: int, field: str | None, spare: int, within: int
) -> int:
    """The number of tokens that may be generated; raises TooLong if the prompt or the answer is too long.

    field: the request's own field for max_tokens; where it has none, the answer is cut to what fits. spare: positions
    that are read beyond the answer. within: the most tokens of the answer that are read at all. How many of its own
    tokens a text model will read for a token of the answer is not known yet: one is assumed.
    """
    rooms = {model.name: model.window - prompt.for_model(model.name) - spare for model in models}
    model = min(models, key=lambda m: rooms[m.name])
    room, prompt_tokens = rooms[model.name], prompt.for_model(model.name)
    if room < 1:
        raise TooLong(
            prompt.field,
            f"has {prompt_tokens} tokens as {name_model(model)} reads it, which reads at most {model.window} with the "
            "answer; shorten it or use a model with a longer window",
        )
    if min(max_tokens, within) <= room:
        return max_tokens
    if field is not None:
        raise TooLong(
            field,
            f"{max_tokens} with a prompt of {prompt_tokens} tokens exceeds the {model.window} tokens that "
            f"{name_model(model)} reads; ask for at most {room}",
        )
    return room


def build_registry(
    described: Mapping[str, Any], presets: Mapping[str, Guidance], served: Sequence[str] = ()
) -> Registry:
    """A registry from what a worker's runtime says of its models. served: names of the base model."""
    loaded = [map(read_description, described[kind]) for kind in ("reward_models", "policies")]
    rewards, policies = ({model.name: model for model in models} for models in loaded)
    kept = {name: described[name] for name in ("sharded", "speculative")}
    return Registry(rewards, policies, dict(presets), tuple(served), **kept)


def read_description(described: Mapping[str, Any]) -> LoadedModel:
    """What a worker says of one model."""
    fields = LoadedModel.__dataclass_fields__
    return LoadedModel(**{name: value for name, value in described.items() if name in fields})
