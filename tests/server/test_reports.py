"""Reports of finished choices: asked for together, given to the right caller, and choices released come what may."""

import asyncio
import random
from typing import Any

import pytest

from steersman.server.reports import Finished, ReportCollector


class Workers:
    """Ranks that know some choices; every call is recorded."""

    def __init__(self, *known: set[str], failing: bool = False) -> None:
        self.known = known
        self.failing = failing
        self.calls: list[list[Finished]] = []

    async def finish(self, finished: list[Finished]) -> list[list[dict[str, Any] | None] | None]:
        self.calls.append(finished)
        await asyncio.sleep(0)
        if self.failing:
            raise RuntimeError("the engine is dead")
        return [None, *([_report(key) if key in known else None for key, *_ in finished] for known in self.known)]


def _report(key: str) -> dict[str, Any]:
    numbers = dict.fromkeys(("interventions", "switches", "reward_model_tokens", "policy_tokens"), 0)
    saved = {"saved_reward_model_tokens": 0, "saved_policy_tokens": 0}
    return {
        "method": key,
        "guided_tokens": 3,
        "kl": 0.5,
        "kl_truncation": 0.2,
        "kl_steering": 0.3,
        "error": None,
        "fault": None,
        "rewards": {},
        "tokens": 5,
        "sources": {"guided": 3, "base": 2},
        "trace": None,
        **numbers,
        **saved,
    }


def _collect(workers: Workers, keys: list[str], sharded: bool = False) -> list[Any]:
    async def run() -> list[Any]:
        collector = ReportCollector(workers.finish, sharded=sharded)
        return await asyncio.gather(*(collector.collect((key, None, [1])) for key in keys), return_exceptions=True)

    return asyncio.run(run())


def test_choices_that_finish_together_are_one_call_and_each_gets_its_own_report(rng: random.Random) -> None:
    keys = [str(n) for n in rng.sample(range(10_000), 100)]
    unknown = set(rng.sample(keys, 10))
    workers = Workers(set(keys) - unknown)
    reports = _collect(workers, keys)
    assert len(workers.calls) == 1
    assert [report and report["method"] for report in reports] == [None if key in unknown else key for key in keys]


def test_choices_that_finish_later_do_not_wait_for_a_call_that_is_under_way() -> None:
    workers, under_way, held = Workers({"first", "second"}), asyncio.Event(), asyncio.Event()

    async def finish(finished: list[Finished]) -> list[list[dict[str, Any] | None] | None]:
        if finished[0][0] == "first":
            under_way.set()
            await held.wait()
        return await workers.finish(finished)

    async def run() -> list[str]:
        collector, order = ReportCollector(finish, sharded=False), []

        async def collect(key: str) -> None:
            assert await collector.collect((key, None, [])) is not None
            order.append(key)

        first = asyncio.create_task(collect("first"))
        await under_way.wait()
        await collect("second")
        held.set()
        await first
        return order

    assert asyncio.run(run()) == ["second", "first"]


@pytest.mark.parametrize(("sharded", "guided"), [(True, 6), (False, 3)])
def test_ranks_that_share_requests_are_summed_and_ranks_that_repeat_them_are_not(sharded: bool, guided: int) -> None:
    (report,) = _collect(Workers({"a"}, {"a"}), ["a"], sharded)
    assert report["guided_tokens"] == guided


def test_a_caller_that_has_gone_has_its_choice_released_and_harms_no_other() -> None:
    workers = Workers({"gone", "here"})

    async def run() -> Any:
        collector = ReportCollector(workers.finish, sharded=False)
        collector.collect(("gone", None, [])).cancel()
        return await collector.collect(("here", None, []))

    assert asyncio.run(run())["method"] == "here"
    assert [key for key, *_ in workers.calls[0]] == ["gone", "here"]


def test_every_caller_learns_of_a_failed_call() -> None:
    errors = _collect(Workers({"a", "b"}, failing=True), ["a", "b"])
    assert [str(error) for error in errors] == ["the engine is dead"] * 2
