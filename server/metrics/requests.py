"""What the API process counts: requests, answers, refusals, and the queue in front of the caches.

Labels are bounded: methods, reasons and outcomes are fixed sets, models are those that the operator loaded.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

from prometheus_client import Counter, Gauge, Histogram

from steersman.guidance.report import BASE_SOURCE, GUIDED_SOURCE, MIXTURE_SOURCE
from steersman.guidance.request import METHODS, GuidanceError, ModelNotLoaded, TooLong, UnreadableToken

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
    "slow_upload",
    "invalid",
]
Fault = Literal["guidance", "timeout", "engine", "shutting_down"]
CutOff = Literal["timeout", "shutting_down", "not_reading"]

_KL_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 200)
_REWARDS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 50)
_REWARD_BUCKETS = (*(-bound for bound in reversed(_REWARDS)), 0, *_REWARDS)
_SECONDS = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120)

REQUESTS = Counter(
    "steersman_requests_total", "Guided requests that were let in and have ended.", ("method", "outcome")
)
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
KL_STEERING = Histogram(
    "steersman_request_kl_steering_nats",
    "The part of it that rewards and policies have caused, without what keeping only the top k costs.",
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
ERRORS = Counter("steersman_errors_total", "Guided requests that failed, each once.", ("reason",))
CUT_OFF = Counter(
    "steersman_cut_off_requests_total", "Requests, guided or not, that the server ended early.", ("reason",)
)
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


@dataclass
class Exchange:
    """What is known of one HTTP request beyond the route that serves it."""

    refused: bool = False
    """Whether its refusal has been counted."""
    interruption: Fault | None = None
    """Why the server ended it, where that is not its client's doing."""


_EXCHANGE: ContextVar[Exchange] = ContextVar("exchange")
_FOLLOWED: ContextVar["FollowedRequest"] = ContextVar("followed_request")


def begin_exchange() -> Exchange:
    """An HTTP request begins: tasks that are created from now on belong to it."""
    exchange = Exchange()
    _EXCHANGE.set(exchange)
    return exchange


def count_refusal(reason: Refusal, exchange: Exchange | None = None) -> None:
    """A request that was answered with 4xx, or 503 while the server drains; only the first reason counts.

    exchange: the request, by default the one that this task serves.
    """
    exchange = exchange or _EXCHANGE.get(None)
    if exchange is not None:
        if exchange.refused:
            return
        exchange.refused = True
    REFUSALS.labels(reason).inc()


def count_cut_off(reason: CutOff) -> None:
    """A request that the server ended before its answer was complete."""
    CUT_OFF.labels(reason).inc()


def reason_of(error: GuidanceError) -> Refusal:
    """Which of the bounded reasons an error is counted under."""
    if isinstance(error, ModelNotLoaded):
        return "model_not_loaded"
    if isinstance(error, UnreadableToken):
        return "unsupported"
    if isinstance(error, TooLong):
        return "too_long"
    field = error.field.partition(".")[0]
    if field == "guidance":
        return "guidance"
    return "too_long" if field in ("prompt", "max_tokens", "max_completion_tokens", "responses") else "unsupported"


class FollowedRequest:
    """A guided request of a client, which ends in one of four ways and is counted once.

    It has failed if anything failed that is not its client's doing; was refused if its client was told 4xx; has
    finished if every choice of all of its prompts has; and was cancelled otherwise.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        exchange = _EXCHANGE.get(None)
        self._exchange = exchange or Exchange()
        self._prompts = self._finished = 0
        self._fault: Fault | None = None
        self._refused = self._ended = False

    def fail(self, fault: Fault) -> None:
        """Something of the server's failed; the first thing counts."""
        self._fault = self._fault or fault

    def refuse(self) -> None:
        """Its client was told that the request is wrong."""
        self._refused = True

    def answer_error(self, status: int) -> None:
        """vLLM answers with an error of its own; it answers a client that has gone with 400 too."""
        if status >= 500:
            self.fail("engine")
        elif not self._prompts:
            self.refuse()

    def end(self) -> None:
        """Counts the request; harmless when done twice."""
        if self._ended:
            return
        self._ended = True
        finished = 0 < self._prompts == self._finished
        fault = self._fault or (None if finished or self._refused else self._exchange.interruption)
        if fault is not None:
            ERRORS.labels(fault).inc()
            REQUESTS.labels(self._method, "failed").inc()
        elif self._refused:
            count_refusal("invalid", self._exchange)
        else:
            REQUESTS.labels(self._method, "finished" if finished else "cancelled").inc()

    @contextmanager
    def following(self, fault_of: Callable[[Exception], Fault | None]) -> Iterator["FollowedPrompt"]:
        """Follows one of its prompts through the engine.

        fault_of: what an error is counted as; None for one that is the client's doing.
        """
        prompt = FollowedPrompt()
        try:
            yield prompt
        except Exception as error:
            fault = fault_of(error)
            self.refuse() if fault is None else self.fail(fault)
            raise
        finally:
            prompt.leave()
            self._finished += prompt.finished

    def add_prompt(self) -> None:
        """One prompt more goes to the engine."""
        self._prompts += 1


class FollowedPrompt:
    """One prompt of a guided request, which waits for room, runs, and ends."""

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


def follow(method: str) -> FollowedRequest:
    """A guided request has a place in the queue: what this task does from now on belongs to it."""
    request = FollowedRequest(method)
    _FOLLOWED.set(request)
    return request


def followed_request(method: str) -> FollowedRequest:
    """The guided request that this task serves; outside of one, a request that nobody counts."""
    return _FOLLOWED.get(None) or FollowedRequest(method)


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
    KL_STEERING.labels(method).observe(max(0.0, report["kl_steering"]))
    for model, reward in report["rewards"].items():
        if reward is not None:
            REWARD.labels(model).observe(reward)
            REWARD_MAGNITUDE.labels(model, "positive" if reward >= 0 else "negative").inc(abs(reward))


def begin_counting(reward_models: Iterable[str], policies: Iterable[str]) -> None:
    """Shows every series from the start, as 0: a rate over one that appears with its first event misses that event."""
    for reason in get_args(Refusal):
        REFUSALS.labels(reason)
    for fault in get_args(Fault):
        ERRORS.labels(fault)
    for cut_off in get_args(CutOff):
        CUT_OFF.labels(cut_off)
    for model in reward_models:
        REWARD.labels(model)
        for sign in ("positive", "negative"):
            REWARD_MAGNITUDE.labels(model, sign)
    sources = (BASE_SOURCE, GUIDED_SOURCE, MIXTURE_SOURCE, *policies)
    for method in METHODS:
        for outcome in get_args(Outcome):
            REQUESTS.labels(method, outcome)
        for metric in (ANSWERS, GENERATED, GUIDED, INTERVENTIONS, SWITCHES, KL, KL_STEERING):
            metric.labels(method)
        for kind in ("reward_model", "policy"):
            SAVED.labels(method, kind)
        for source in sources:
            SOURCES.labels(method, source)
