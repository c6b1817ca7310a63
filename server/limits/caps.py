"""How much one request may ask for: limits within those that the request types have anyway."""

from dataclasses import asdict, dataclass
from typing import Any

from steersman.guidance.request import MAX_ANSWERS, MAX_SAMPLES, MAX_TOP_K, Guidance, GuidanceError

MAX_RESPONSES = 256
"""Responses of one `/v1/rewards`."""
MAX_CHOICES = 16_384
"""vLLM's own limit on n."""


@dataclass(frozen=True)
class Caps:
    """The most that one request may ask for."""

    top_k: int = MAX_TOP_K
    samples: int = MAX_SAMPLES
    n: int = 128
    responses: int = MAX_RESPONSES

    def describe(self) -> dict[str, int]:
        """For `GET /v1/guidance`: `n` is that of a search, `choices` the request's own."""
        return {**asdict(self), "n": min(self.n, MAX_ANSWERS), "choices": self.n}

    def check_guidance(self, guidance: Guidance) -> None:
        """Raises GuidanceError."""
        for field, value, flag, most in (
            ("guidance.top_k", getattr(guidance, "top_k", 0) or 0, "--max-top-k", self.top_k),
            ("guidance.samples", _samples(guidance), "--max-samples", self.samples),
            ("guidance.gate.samples", _samples(getattr(guidance, "gate", None)), "--max-samples", self.samples),
            ("guidance.n", getattr(guidance, "n", 0), "--max-n", self.n),
        ):
            _check(field, value, flag, most)

    def check_choices(self, n: Any) -> None:
        """A request's own n; raises GuidanceError."""
        _check("n", n if isinstance(n, int) else 1, "--max-n", self.n)

    def check_responses(self, responses: int) -> None:
        """How many `/v1/rewards` is given; raises GuidanceError."""
        _check("responses", responses, "--max-responses", self.responses)


def _samples(estimated: Any) -> int:
    """Samples of a Monte Carlo estimate; an exact one takes none."""
    return int(estimated.samples) if getattr(estimated, "estimator", "exact") != "exact" else 0


def _check(field: str, value: int, flag: str, most: int) -> None:
    if value > most:
        raise GuidanceError(field, f"{value} is more than this server allows; ask for at most {most} ({flag})")
