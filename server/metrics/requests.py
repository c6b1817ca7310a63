"""What the API process counts: requests, answers, refusals, and the queue in front of the caches.

Labels are bounded: methods, reasons and outcomes are fixed sets, models are those that the operator loaded.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from prometheus_client import Counter, Gauge, Histogram

from steersman.guidance.report import BASE_SOURCE, GUIDED_SOURCE, MIXTURE_SOURCE
from steersman.guidance.request import METHODS, GuidanceError, ModelNotLoaded, UnreadableToken

Outcome = Literal["finished", "failed", "cancelled"]
Refusal = Literal[
    "guidance",
    "model_not_loaded",
    "too_long",
    "unsupported",
    "unauthorized",
    "body_too_large",
    "malformed",
    "too_many_requests",
    "shutting_down",
]
Fault = Literal["guidance", "timeout", "engine"]

_KL_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 200)
_REWARDS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 50)
_REWARD_BUCKETS = (*(-bound for bound in reversed(_REWARDS)), 0, *_REWARDS)
_SECONDS = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120)

REQUESTS = Counter("steersman_requests_total", "Guided requests that have ended.", ("method", "outcome"))
ANSWERS = Counter("steersman_answers_total", "Guided choices that have ended.", ("method",))
GENERATED = Counter("steersman_generated_tokens_total", "Tokens of guided answers.", ("method",))
GUIDED = Counter("steersman_guided_tokens_total", "Tokens at which guidance applied.", ("method",))
INTERVENTIONS = Counter(
    "steersman_interventions_total", "Tokens at which guidance changed the most likely one.", ("method",)
)
SOURCES = Counter(
    "steersman_source_tokens_total", "Tokens by the distribution that they were sampled from.", ("method", "source")
)
SWITCHES = Counter(
    "steersman_switches_total", "Tokens sampled from another distribution than the one before.", ("method",)
)
SAVED = Counter("steersman_saved_tokens_total", "Tokens that closed gates spared auxiliary models.", ("method", "kind"))
KL = Histogram(
    "steersman_request_kl_nats",
    "Sum over an answer of log pi - log pi0 of its tokens; below 0 counted as 0, for a histogram's sum must not fall.",
    ("method",),
    buckets=_KL_BUCKETS,
)
REWARD = Histogram("steersman_final_reward", "Reward of answers at their end.", ("model",), buckets=_REWARD_BUCKETS)
REWARD_MAGNITUDE = Counter(
    "steersman_final_reward_magnitude_total",
    "Rewards at the end of answers added up, those below 0 apart and as their absolute value.",
    ("model", "sign"),
)
REFUSALS = Counter("steersman_refusals_total", "Requests that were refused.", ("reason",))
ERRORS = Counter("steersman_errors_total", "Guided requests that failed after they were admitted.", ("reason",))
RUNNING = Gauge("steersman_running_requests", "Guided requests in the engine.", multiprocess_mode="livesum")
WAITING = Gauge(
    "steersman_waiting_requests", "Guided requests that wait for their turn or for room.", multiprocess_mode="livesum"
)
ADMISSION = Histogram(
    "steersman_admission_seconds",
    "Time for which guided requests that had their turn waited for room in the caches.",
    buckets=_SECONDS,
)
TURN = Histogram("steersman_turn_seconds", "Time for which guided requests waited for their turn.", buckets=_SECONDS)
RESERVED = Gauge(
    "steersman_cache_blocks_reserved",
    "Cache blocks that admitted requests may come to hold.",
    ("model",),
    multiprocess_mode="livesum",
)


def count_refusal(reason: Refusal) -> None:
    """A request that was answered with 4xx, or 503 while the server drains."""
    REFUSALS.labels(reason).inc()


def count_error(reason: Fault) -> None:
    """A guided request that failed after it was admitted."""
    ERRORS.labels(reason).inc()


def reason_of(error: GuidanceError) -> Refusal:
    """Which of the bounded reasons an error is counted under."""
    if isinstance(error, ModelNotLoaded):
        return "model_not_loaded"
    if isinstance(error, UnreadableToken):
        return "unsupported"
    field = error.field.partition(".")[0]
    if field == "guidance":
        return "guidance"
    return "too_long" if field in ("prompt", "max_tokens", "max_completion_tokens", "responses") else "unsupported"


class FollowedRequest:
    """A guided request that waits for room, runs, and ends."""

    def __init__(self) -> None:
        self.finished = False
        """Whether all of its choices have ended."""
        self._running = False
        self._began = time.perf_counter()
        WAITING.inc()

    def admit(self) -> None:
        """It has room."""
        ADMISSION.observe(time.perf_counter() - self._began)
        WAITING.dec()
        RUNNING.inc()
        self._running = True

    def leave(self) -> None:
        """It is gone, one way or another."""
        (RUNNING if self._running else WAITING).dec()


@contextmanager
def following(method: str) -> Iterator[FollowedRequest]:
    """Counts a request while it is in the context, and then by how it ended."""
    request = FollowedRequest()
    outcome: Outcome = "cancelled"
    try:
        yield request
    except Exception:
        outcome = "failed"
        raise
    finally:
        request.leave()
        REQUESTS.labels(method, "finished" if request.finished else outcome).inc()


def count_answer(report: Mapping[str, Any]) -> None:
    """One choice, by the report that its client gets."""
    method = report["method"]
    ANSWERS.labels(method).inc()
    GENERATED.labels(method).inc(report["tokens"])
    GUIDED.labels(method).inc(report["guided_tokens"])
    INTERVENTIONS.labels(method).inc(report["interventions"])
    SWITCHES.labels(method).inc(report["switches"])
    for source, tokens in report["sources"].items():
        SOURCES.labels(method, source).inc(tokens)
    for kind in ("reward_model", "policy"):
        SAVED.labels(method, kind).inc(report[f"saved_{kind}_tokens"])
    KL.labels(method).observe(max(0.0, report["kl"]))
    for model, reward in report["rewards"].items():
        if reward is not None:
            REWARD.labels(model).observe(reward)
            REWARD_MAGNITUDE.labels(model, "positive" if reward >= 0 else "negative").inc(abs(reward))


def begin_counting(reward_models: Iterable[str], policies: Iterable[str]) -> None:
    """Shows every series from the start, as 0: a rate over one that appears with its first event misses that event."""
    for reason in get_args(Refusal):
        REFUSALS.labels(reason)
    for reason in get_args(Fault):
        ERRORS.labels(reason)
    for model in reward_models:
        REWARD.labels(model)
        for sign in ("positive", "negative"):
            REWARD_MAGNITUDE.labels(model, sign)
    sources = (BASE_SOURCE, GUIDED_SOURCE, MIXTURE_SOURCE, *policies)
    for method in METHODS:
        for outcome in get_args(Outcome):
            REQUESTS.labels(method, outcome)
        for metric in (ANSWERS, GENERATED, GUIDED, INTERVENTIONS, SWITCHES, KL):
            metric.labels(method)
        for kind in ("reward_model", "policy"):
            SAVED.labels(method, kind)
        for source in sources:
            SOURCES.labels(method, source)
