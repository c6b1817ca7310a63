"""What a worker counts: its steps, and what auxiliary models read and hold."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, get_args

from prometheus_client import Counter, Gauge, Histogram

from steersman.guidance.runtime import GuidanceRuntime
from steersman.guidance.work import FAULTS, PHASES, Work

Stage = Literal["candidates", "rewards", "policies", "writing"]

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5)
_STEPS_AT_ONCE = 32
"""Steps that are shown together: one by one their histograms would cost as much as a small model's head."""
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

STEP = Histogram(
    "steersman_step_seconds", "The host's time in the guidance of one decoding step.", ("stage",), buckets=_SECONDS
)
ROWS = Histogram("steersman_step_rows", "Guided rows of a decoding step.", buckets=_ROWS)
TOKENS = Counter("steersman_auxiliary_tokens_total", "Tokens that auxiliary models have read.", ("model", "phase"))
FAILURES = Counter(
    "steersman_model_failures_total", "Guided choices and texts that a model has spoiled.", ("model", "reason")
)
BLOCKS = Gauge(
    "steersman_cache_blocks", "Blocks of a model's key-value cache.", ("model",), multiprocess_mode="livesum"
)
BLOCKS_IN_USE = Gauge(
    "steersman_cache_blocks_in_use", "Of these, held by requests.", ("model",), multiprocess_mode="livesum"
)


class _Observed(NamedTuple):
    """A step: its seconds, guided rows, and seconds by stage."""

    seconds: float
    rows: int
    stages: list[float]


class WorkerMetrics(AbstractContextManager[None]):
    """Turns a runtime's own record into metrics."""

    def __init__(self, runtime: GuidanceRuntime) -> None:
        self._runtime = runtime
        self._shown: dict[tuple[str, str], int] = {}
        self._held: dict[str, tuple[int, int]] = {}
        self._known: set[str] = set()
        self._stages = {stage: STEP.labels(stage) for stage in get_args(Stage)}
        self._total = STEP.labels("total")
        self._pending: list[_Observed] = []
        self._began = _Observed(0.0, 0, [])
        self.show()

    def step(self) -> AbstractContextManager[None]:
        """Observes one decoding step, and what has been read in it; shown with others, a few steps late at most."""
        return self

    def __enter__(self) -> None:
        work = self._runtime.work
        self._began = _Observed(time.perf_counter(), work.rows, _seconds(work))

    def __exit__(self, *_: object) -> None:
        work, began = self._runtime.work, self._began
        stages = [after - before for before, after in zip(began.stages, _seconds(work), strict=True)]
        self._pending.append(_Observed(time.perf_counter() - began.seconds, work.rows - began.rows, stages))
        if len(self._pending) >= _STEPS_AT_ONCE:
            self.show()

    def show(self) -> None:
        """Brings counters, histograms and gauges up to date."""
        for observed in self._pending:
            self._total.observe(observed.seconds)
            ROWS.observe(observed.rows)
            for stage, seconds in zip(self._stages.values(), observed.stages, strict=True):
                if seconds > 0:
                    stage.observe(seconds)
        self._pending.clear()
        models = {**self._runtime.reward_models, **self._runtime.policies}
        self._follow(models)
        work = self._runtime.work
        for metric, counted in ((TOKENS, work.tokens), (FAILURES, work.failures)):
            for label, by_model in counted.items():
                for name, total in by_model.items():
                    self._raise_to(metric, name, label, total)
        for name, model in models.items():
            cache = getattr(model, "cache", None)
            if cache is not None and self._held.get(name) != (held := (cache.num_blocks, cache.blocks_in_use)):
                BLOCKS.labels(name).set(held[0])
                BLOCKS_IN_USE.labels(name).set(held[1])
                self._held[name] = held

    def _follow(self, models: Mapping[str, Any]) -> None:
        """Series begin with their model; a model that is unloaded has no blocks any more."""
        if models.keys() == self._known:
            return
        for name in models.keys() - self._known:
            for phase in PHASES:
                TOKENS.labels(name, phase)
            for fault in FAULTS:
                FAILURES.labels(name, fault)
        for name in self._known - models.keys():
            BLOCKS.labels(name).set(0)
            BLOCKS_IN_USE.labels(name).set(0)
            self._held.pop(name, None)
        self._known = set(models)

    def _raise_to(self, metric: Counter, name: str, label: str, total: int) -> None:
        shown = self._shown.get((name, label), 0)
        if total != shown:
            metric.labels(name, label).inc(total - shown)
            self._shown[name, label] = total


def _seconds(work: Work) -> list[float]:
    """In the order of Stage."""
    return [work.candidates_seconds, work.rewards_seconds, work.policies_seconds, work.writing_seconds]
