"""What a caller may ask for: the `guidance` object of a request, its limits and its JSON schema. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

MAX_TOP_K = 64
MAX_BETA = 100.0
MAX_WEIGHT = 100.0
MAX_REWARDS = 8
MAX_POLICIES = 8
MAX_COEFFICIENT = 100.0
MAX_TRANSFORM = 10_000.0
"""Of a transform's parameters: beyond it float32 no longer tells the rewards of two candidates apart."""
MAX_NATS = 1_000_000.0
"""Of thresholds and budgets: beyond any divergence of two distributions over a vocabulary."""
MAX_SAMPLES = 10_000
MAX_ANSWERS = 64
MAX_BLOCK = 4096
MAX_LENGTH = 2**31 - 1
"""Tokens of an answer that a gate or a policy may be asked for: more than any model reads."""

BASE = "base"
"""The frozen base model's name among policies."""

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Transform = Annotated[_Finite, Field(ge=-MAX_TRANSFORM, le=MAX_TRANSFORM)]
_Nats = Annotated[_Finite, Field(ge=0.0, le=MAX_NATS)]
_Name = Annotated[str, Field(min_length=1)]


def whole_number(value: Any) -> Any:
    """An integral float as an integer, since JSON has one type of number; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(whole_number)
"""Lets a strict integer field take 10.0; 10.5, true and "10" stay refused."""
_Length = Annotated[int, Field(ge=1, le=MAX_LENGTH), WHOLE]
_TopK = Annotated[int, Field(ge=1, le=MAX_TOP_K), WHOLE]
_Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES), WHOLE]
_Answers = Annotated[int, Field(ge=2, le=MAX_ANSWERS), WHOLE]
_Block = Annotated[int, Field(ge=1, le=MAX_BLOCK), WHOLE]
_Coefficient = Annotated[_Finite, Field(ge=-MAX_COEFFICIENT, le=MAX_COEFFICIENT)]
Estimator = Literal["exact", "monte_carlo"]


class GuidanceError(ValueError):
    """A guidance request that cannot be served. `field` names the offending field as a path from `guidance`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ModelNotLoaded(GuidanceError):
    """A request names a reward model, policy or preset that the server does not have."""


class TooLong(GuidanceError):
    """A prompt, or a prompt with its answer, is longer than an auxiliary model's window."""


class UnscorableText(GuidanceError):
    """A prompt with a response that a reward model cannot score, and the reason."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, f"cannot be scored: {reason}")
        self.reason = reason


class UnreadableToken(GuidanceError):
    """A prompt or a response holds a token id that an auxiliary model cannot read."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Reward(_Strict):
    """One reward term w · T(r(prefix·candidate)) of the decoding formula."""

    model: str = Field(min_length=1, description="Name under which the server loaded the reward model.")
    weight: _Finite = Field(1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT, description="Factor of the transformed reward.")
    transform: Literal["identity", "affine", "log_sigmoid"] = Field(
        "identity",
        description="identity: r; affine: scale·r + shift; log_sigmoid: log σ(r − reference), which damps what is "
        "already good enough (Transforming and Combining Rewards).",
    )
    scale: _Transform = Field(1.0, description="Slope of the affine transform.")
    shift: _Transform = Field(
        0.0,
        description="Offset of the affine transform: the same for every candidate, it changes what is reported only.",
    )
    reference: _Transform = Field(0.0, description="Reward at which log_sigmoid is log ½, for example a quantile.")

    @model_validator(mode="after")
    def _parameters_belong_to_the_transform(self) -> "Reward":
        given = self.model_fields_set
        if self.transform != "affine" and given & {"scale", "shift"}:
            raise ValueError('scale and shift need "transform": "affine"')
        if self.transform != "log_sigmoid" and "reference" in given:
            raise ValueError('reference needs "transform": "log_sigmoid"')
        return self


class Gate(_Strict):
    """At which positions the method applies; elsewhere the base model decodes. All given conditions must hold."""

    first_tokens: _Length | None = Field(None, description="Only the first so many tokens of the answer.")
    entropy_above: _Nats | None = Field(
        None, description="Only where the base model's entropy exceeds this, in nats: where it is uncertain."
    )
    kl_above: _Nats | None = Field(
        None, description="Only where KL(policy‖base) exceeds this, in nats: where the two disagree."
    )
    policy: _Name | None = Field(None, description="Whose KL kl_above looks at; by default the method's only policy.")
    estimator: Estimator = Field("exact", description="How that KL is found: exactly or from samples of the policy.")
    samples: _Samples = Field(1000, description="Samples of the monte_carlo estimator.")

    @model_validator(mode="after")
    def _conditions(self) -> "Gate":
        given = self.model_fields_set
        if self.first_tokens is None and self.entropy_above is None and self.kl_above is None:
            raise ValueError("give at least one of first_tokens, entropy_above and kl_above")
        if self.kl_above is None and given & {"policy", "estimator", "samples"}:
            raise ValueError("policy, estimator and samples need kl_above")
        _check_samples(self.estimator, given)
        return self


class _Steered(_Strict):
    """What every method that works token by token can be asked for."""

    kl_budget: _Nats | None = Field(
        None,
        gt=0.0,
        description="Bound on Σ KL(π‖π₀) over the answer's positions, in nats, π₀ being the base on the same "
        "candidates: a position that would take more than an eighth of what is left is weakened until it does not.",
    )
    trace: bool = Field(False, description="Report every token: candidates, scores, KL, and what was sampled from.")


class _Gated(_Steered):
    gate: Gate | None = Field(None, description="At which positions the method applies.")


class RewardGuidance(_Gated):
    """Token-level reward guidance over the base model's top k: log π(v) = log π₀(v) + β Σ w·T(r(s·v)) + const."""

    method: Literal["pargs", "args"] = Field(
        description="pargs: reward models trained on partial sequences (Rashid et al., Algorithm 1); "
        "args: the same rule with a full-sequence reward model (Khanov et al. 2024)."
    )
    reward_model: _Name | None = Field(None, description="Short for rewards with a single plain term.")
    rewards: tuple[Reward, ...] | None = Field(
        None, strict=False, min_length=1, max_length=MAX_REWARDS, description="Reward terms, added up."
    )
    beta: _Finite = Field(1.0, ge=0.0, le=MAX_BETA, description="Strength β; 0 leaves top-k sampling of the base.")
    top_k: _TopK | None = Field(
        10,
        description="Candidates a step: the k most likely base tokens. null keeps the whole vocabulary, where every "
        "reward model returns the rewards of all next tokens at once (kind vocabulary).",
    )
    end_token: bool = Field(
        False, description="Score every candidate as if the answer ended there: the end token is appended to it."
    )
    policies: dict[_Name, _Coefficient] | None = Field(
        None,
        min_length=1,
        max_length=MAX_POLICIES,
        description='What the rewards are added to: Σ c log π over policies, "base" among them; by default the base.',
    )

    @model_validator(mode="after")
    def _one_way_to_name_rewards(self) -> "RewardGuidance":
        if (self.reward_model is None) == (self.rewards is None):
            raise ValueError("give either reward_model or rewards, not both and not neither")
        names = [term.model for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards names a model twice: {names}; add the weights up instead")
        return self

    @property
    def terms(self) -> tuple[Reward, ...]:
        """The reward terms, whichever way they were given."""
        return self.rewards if self.rewards is not None else (Reward(model=self.reward_model or ""),)


class MixedGuidance(_Gated):
    """π ∝ ref^(1−a) · policy^a over the whole vocabulary (Shallow Preference Signals, §3.3.1)."""

    method: Literal["mixed"]
    policy: _Name = Field(description="Name under which the server loaded the policy.")
    mix: _Coefficient = Field(description="a: 0 is the base model, 1 the policy, above 1 beyond it.")


class LengthControlGuidance(_Steered):
    """The policy for the first t tokens, then the base model (Shallow Preference Signals, §3.3.2)."""

    method: Literal["length_control"]
    policy: _Name = Field(description="Name under which the server loaded the policy.")
    length: _Length = Field(description="t: tokens of the answer that the policy decodes.")


class KLThresholdGuidance(_Steered):
    """The policy where KL(policy‖base) exceeds a threshold, else the base (Shallow Preference Signals, §3.3.2)."""

    method: Literal["kl_threshold"]
    policy: _Name = Field(description="Name under which the server loaded the policy.")
    threshold: _Nats = Field(description="b, in nats.")
    estimator: Estimator = Field("exact", description="How the KL is found: exactly or from samples of the policy.")
    samples: _Samples = Field(1000, description="Samples of the monte_carlo estimator.")
    mix: _Coefficient = Field(
        0.0, description="Below the threshold: 0 for the base, else the mixture with this a, as the authors' script."
    )

    @model_validator(mode="after")
    def _samples_belong_to_the_estimator(self) -> "KLThresholdGuidance":
        _check_samples(self.estimator, self.model_fields_set)
        return self


class ProductGuidance(_Gated):
    """π ∝ Π π_p^c over the whole vocabulary: autoregressive reward models, proxy tuning, contrastive decoding."""

    method: Literal["product"]
    policies: dict[_Name, _Coefficient] = Field(
        min_length=1, max_length=MAX_POLICIES, description='Policy → coefficient c; "base" is the base model.'
    )


class BestOfN(_Strict):
    """n whole answers of the base model, of which the reward model picks one: the papers' baseline."""

    method: Literal["best_of_n"]
    reward_model: _Name = Field(description="Name under which the server loaded the reward model.")
    n: _Answers = Field(description="Answers that are sampled.")
    trace: bool = Field(False, description="Report every sample and its reward.")


class Blockwise(_Strict):
    """n samples of every block, of which the reward model picks one (Controlled Decoding, Mudgal et al. 2024)."""

    method: Literal["blockwise"]
    reward_model: _Name = Field(description="Name under which the server loaded the reward model.")
    n: _Answers = Field(description="Samples of each block.")
    block: _Block = Field(16, description="Tokens of a block.")
    trace: bool = Field(False, description="Report every sample and its reward.")


PolicyGuidance = MixedGuidance | LengthControlGuidance | KLThresholdGuidance | ProductGuidance
SteeredGuidance = RewardGuidance | PolicyGuidance
"""Guidance of every token."""
SearchGuidance = BestOfN | Blockwise
"""A choice among samples of the base model."""
Guidance = SteeredGuidance | SearchGuidance

METHODS: dict[str, type[Guidance]] = {
    "pargs": RewardGuidance,
    "args": RewardGuidance,
    "mixed": MixedGuidance,
    "length_control": LengthControlGuidance,
    "kl_threshold": KLThresholdGuidance,
    "product": ProductGuidance,
    "best_of_n": BestOfN,
    "blockwise": Blockwise,
}


def parse_guidance(value: Any) -> Guidance:
    """Checks a decoded JSON value; raises GuidanceError naming the first field that is wrong and what it may be."""
    if not isinstance(value, dict):
        raise GuidanceError("guidance", f'must be an object such as {{"method": "pargs", …}}, got {value!r:.80}')
    method = value.get("method")
    if not isinstance(method, str) or method not in METHODS:
        given = "is missing" if "method" not in value else f"got {method!r:.80}"
        raise GuidanceError("guidance.method", f"{given}; choose one of {', '.join(METHODS)}")
    try:
        guidance = METHODS[method].model_validate(value)
    except ValidationError as error:
        raise _explain(error, METHODS[method]) from None
    _check_kl_gate(guidance)
    return guidance


def reward_models(guidance: Guidance) -> Iterator[tuple[str, str]]:
    """(field, name) of every reward model that a request names."""
    if isinstance(guidance, RewardGuidance) and guidance.rewards is not None:
        for number, term in enumerate(guidance.rewards):
            yield f"guidance.rewards.{number}.model", term.model
    elif isinstance(guidance, RewardGuidance | BestOfN | Blockwise):
        yield "guidance.reward_model", guidance.reward_model or ""


def policies(guidance: Guidance) -> Iterator[tuple[str, str]]:
    """(field, name) of every policy beside the base that a request names."""
    if isinstance(guidance, MixedGuidance | LengthControlGuidance | KLThresholdGuidance):
        yield "guidance.policy", guidance.policy
    if isinstance(guidance, RewardGuidance | ProductGuidance):
        for name in guidance.policies or ():
            if name != BASE:
                yield f"guidance.policies.{name}", name
    gate = getattr(guidance, "gate", None)
    if gate is not None and gate.policy is not None:
        yield "guidance.gate.policy", gate.policy


def describe_methods() -> dict[str, dict[str, Any]]:
    """Method name → JSON schema of its guidance object."""
    return {name: model.model_json_schema() for name, model in METHODS.items()}


def _check_samples(estimator: Estimator, given: set[str]) -> None:
    if estimator == "exact" and "samples" in given:
        raise ValueError('samples needs "estimator": "monte_carlo"')


def _check_kl_gate(guidance: Guidance) -> None:
    gate = getattr(guidance, "gate", None)
    if gate is None or gate.kl_above is None or gate.policy is not None:
        return
    named = sorted({name for _, name in policies(guidance)})
    if len(named) != 1:
        found = ", ".join(named) or "none"
        raise GuidanceError(
            "guidance.gate.policy", f"is missing: kl_above needs to know whose KL; the method's policies are: {found}"
        )


def _explain(error: ValidationError, model: type[BaseModel]) -> GuidanceError:
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(["guidance", *(str(part) for part in first["loc"] if part != "[key]")])
    if first["type"] == "extra_forbidden":
        if field == "guidance.gate" and issubclass(model, LengthControlGuidance | KLThresholdGuidance):
            return GuidanceError(
                field, 'this method is a gate itself; for more conditions use {"method": "mixed", "mix": 1, "gate": …}'
            )
        parts: dict[str, type[BaseModel]] = {"rewards": Reward, "gate": Gate}
        owner = parts.get(str(first["loc"][0]), model)
        return GuidanceError(field, f"is not a known field; known fields are {', '.join(sorted(owner.model_fields))}")
    message = first["msg"].removeprefix("Value error, ")
    message = (message[0].lower() + message[1:]).replace("tuple", "list").replace("dictionary", "object")
    shown = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r:.80}"
    return GuidanceError(field, message + shown)
