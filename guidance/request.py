"""What a caller may ask for: the `guidance` object of a request, its limits and its JSON schema. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

MAX_TOP_K = 64
MAX_BETA = 100.0
MAX_WEIGHT = 100.0
MAX_REWARDS = 8

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class GuidanceError(ValueError):
    """A guidance request that cannot be served. `field` names the offending field as a path from `guidance`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


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
    scale: _Finite = Field(1.0, description="Slope of the affine transform.")
    shift: _Finite = Field(0.0, description="Offset of the affine transform.")
    reference: _Finite = Field(0.0, description="Reward at which log_sigmoid is log ½, for example a quantile.")

    @model_validator(mode="after")
    def _parameters_belong_to_the_transform(self) -> "Reward":
        given = self.model_fields_set
        if self.transform != "affine" and given & {"scale", "shift"}:
            raise ValueError('scale and shift need "transform": "affine"')
        if self.transform != "log_sigmoid" and "reference" in given:
            raise ValueError('reference needs "transform": "log_sigmoid"')
        return self


class RewardGuidance(_Strict):
    """Token-level reward guidance over the base model's top k: log π(v) = log π₀(v) + β Σ w·T(r(s·v)) + const."""

    method: Literal["pargs", "args"] = Field(
        description="pargs: reward models trained on partial sequences (Rashid et al., Algorithm 1); "
        "args: the same rule with a full-sequence reward model (Khanov et al. 2024)."
    )
    reward_model: str | None = Field(None, min_length=1, description="Short for rewards with a single plain term.")
    rewards: tuple[Reward, ...] | None = Field(
        None, strict=False, min_length=1, max_length=MAX_REWARDS, description="Reward terms, added up."
    )
    beta: _Finite = Field(1.0, ge=0.0, le=MAX_BETA, description="Strength β; 0 leaves top-k sampling of the base.")
    top_k: int = Field(10, ge=1, le=MAX_TOP_K, description="Candidates a step: the k most likely base tokens.")
    end_token: bool = Field(
        False, description="Score every candidate as if the answer ended there: the end token is appended to it."
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


Guidance = RewardGuidance
METHODS: dict[str, type[BaseModel]] = {"pargs": RewardGuidance, "args": RewardGuidance}

_adapter: TypeAdapter[Guidance] = TypeAdapter(Guidance)


def parse_guidance(value: Any) -> Guidance:
    """Checks a decoded JSON value; raises GuidanceError naming the first field that is wrong and what it may be."""
    if not isinstance(value, dict):
        raise GuidanceError("guidance", f'must be an object such as {{"method": "pargs", …}}, got {value!r:.80}')
    method = value.get("method")
    if not isinstance(method, str) or method not in METHODS:
        given = "is missing" if "method" not in value else f"got {method!r:.80}"
        raise GuidanceError("guidance.method", f"{given}; choose one of {', '.join(METHODS)}")
    try:
        return _adapter.validate_python(value)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> GuidanceError:
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(["guidance", *map(str, first["loc"])])
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(Reward.model_fields if "rewards" in first["loc"] else RewardGuidance.model_fields))
        return GuidanceError(field, f"is not a known field; known fields are {known}")
    message = first["msg"].removeprefix("Value error, ")
    message = (message[0].lower() + message[1:]).replace("tuple", "list")
    shown = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r:.80}"
    return GuidanceError(field, message + shown)


def describe_methods() -> dict[str, dict[str, Any]]:
    """Method name → JSON schema of its guidance object."""
    return {name: model.model_json_schema() for name, model in METHODS.items()}
