"""Blocks of the auxiliary caches: never more than there are, first come, first served, and given back come what may."""

import asyncio
import random
from collections.abc import Mapping

import pytest

from steersman.server.budget import CacheBudget
from steersman.server.metrics.requests import RESERVED


async def turn() -> None:
    """Lets every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


class Holder:
    """A request that holds blocks until it is told to let go."""

    def __init__(self, budget: CacheBudget, wanted: Mapping[str, int]) -> None:
        self.holds = False
        self._done = asyncio.Event()
        self.task = asyncio.create_task(self._run(budget, wanted))

    async def _run(self, budget: CacheBudget, wanted: Mapping[str, int]) -> None:
        async with budget.reserve(wanted):
            self.holds = True
            await self._done.wait()

    async def leave(self) -> None:
        self._done.set()
        await self.task


def test_a_small_request_does_not_overtake_a_large_one_that_waits() -> None:
    async def run() -> None:
        budget = CacheBudget({"a": 10})
        first, large, small = Holder(budget, {"a": 6}), Holder(budget, {"a": 8}), Holder(budget, {"a": 1})
        await turn()
        assert (first.holds, large.holds, small.holds, budget.waiting) == (True, False, False, 2)
        await first.leave()
        await turn()
        assert (large.holds, small.holds, budget.waiting, budget.free) == (True, True, 0, {"a": 1})
        await asyncio.gather(large.leave(), small.leave())
        assert budget.free == budget.capacity == {"a": 10}

    asyncio.run(run())


def test_a_request_takes_from_all_its_models_or_from_none() -> None:
    async def run() -> None:
        budget = CacheBudget({"a": 5, "b": 2})
        holder, both = Holder(budget, {"b": 2}), Holder(budget, {"a": 3, "b": 1})
        await turn()
        assert not both.holds
        assert budget.free == {"a": 5, "b": 0}
        await holder.leave()
        await turn()
        assert both.holds
        assert budget.free == {"a": 2, "b": 1}
        assert RESERVED.labels("a")._value.get() == 3
        await both.leave()
        assert RESERVED.labels("a")._value.get() == 0

    asyncio.run(run())


def test_exactly_what_is_free_can_be_had_at_once() -> None:
    async def run() -> None:
        budget = CacheBudget({"a": 4})
        whole = Holder(budget, {"a": 4})
        await turn()
        assert whole.holds
        await whole.leave()

    asyncio.run(run())


def test_a_request_whose_models_keep_nothing_waits_for_nobody() -> None:
    async def run() -> None:
        budget = CacheBudget({"a": 10})
        first, large, none = Holder(budget, {"a": 6}), Holder(budget, {"a": 8}), Holder(budget, {})
        await turn()
        assert (first.holds, large.holds, none.holds, budget.waiting) == (True, False, True, 1)
        await asyncio.gather(first.leave(), large.leave(), none.leave())
        assert budget.free == {"a": 10}

    asyncio.run(run())


def test_a_request_that_leaves_the_queue_lets_those_behind_it_through() -> None:
    async def run() -> None:
        budget = CacheBudget({"a": 10})
        first, large, small = Holder(budget, {"a": 6}), Holder(budget, {"a": 8}), Holder(budget, {"a": 4})
        await turn()
        large.task.cancel()
        await turn()
        assert large.task.cancelled()
        assert (small.holds, budget.waiting, budget.free) == (True, 0, {"a": 0})
        await asyncio.gather(first.leave(), small.leave())
        assert budget.free == {"a": 10}

    asyncio.run(run())


def test_a_request_that_is_cancelled_as_it_is_admitted_gives_everything_back() -> None:
    async def run() -> None:
        budget = CacheBudget({"a": 10})
        async with budget.reserve({"a": 10}):
            second, third = Holder(budget, {"a": 10}), Holder(budget, {"a": 2})
            await turn()
        assert budget.free == {"a": 0}, "its turn has come, and it has not run since"
        second.task.cancel()
        await turn()
        assert second.task.cancelled()
        assert not second.holds
        assert third.holds
        await third.leave()
        assert budget.free == {"a": 10}

    asyncio.run(run())


def test_requests_cancelled_together_hold_nothing_and_block_nobody() -> None:
    async def run() -> None:
        budget = CacheBudget({"a": 10})
        first, *rest = (Holder(budget, {"a": 10}) for _ in range(4))
        await turn()
        for holder in rest[:2]:
            holder.task.cancel()
        first._done.set()
        await turn()
        assert [holder.holds for holder in rest] == [False, False, True]
        await rest[2].leave()
        assert (budget.free, budget.waiting) == ({"a": 10}, 0)

    asyncio.run(run())


def test_a_request_that_fails_gives_its_blocks_back() -> None:
    async def run() -> None:
        budget = CacheBudget({"a": 10})
        with pytest.raises(RuntimeError, match="the engine"):
            async with budget.reserve({"a": 7}):
                raise RuntimeError("the engine is dead")
        assert budget.free == {"a": 10}

    asyncio.run(run())


def test_any_crowd_is_served_in_order_within_the_capacity(rng: random.Random) -> None:
    async def run() -> None:
        capacity = {"a": 12, "b": 7}
        budget, order = CacheBudget(capacity), []
        held = dict.fromkeys(capacity, 0)

        async def request(number: int, wanted: dict[str, int]) -> None:
            async with budget.reserve(wanted):
                order.append(number)
                for name, blocks in wanted.items():
                    held[name] += blocks
                    assert held[name] <= capacity[name]
                for _ in range(rng.randrange(5)):
                    await asyncio.sleep(0)
                for name, blocks in wanted.items():
                    held[name] -= blocks

        wanted = [{name: rng.randint(1, most) for name, most in capacity.items()} for _ in range(60)]
        await asyncio.gather(*(request(number, blocks) for number, blocks in enumerate(wanted)))
        assert order == list(range(60))
        assert budget.free == capacity

    asyncio.run(run())


def test_what_no_cache_could_ever_hold_is_found_before_it_waits() -> None:
    budget = CacheBudget({"a": 5, "b": 2})
    assert budget.too_large({"a": 5, "b": 2}) is None
    assert budget.too_large({"a": 5, "b": 3}) == "b"
    assert budget.too_large({"a": 6}) == "a"
    assert budget.too_large({}) is None


def test_models_come_and_go() -> None:
    RESERVED.clear()
    budget = CacheBudget({"a": 5})
    budget.add("late", 3)
    shown = {sample.labels["model"] for metric in RESERVED.collect() for sample in metric.samples}
    assert {"a", "late"} <= shown, "a cache is measured before it is used"
    assert budget.too_large({"late": 4}) == "late"
    assert budget.capacity == budget.free == {"a": 5, "late": 3}
    assert RESERVED.labels("late")._value.get() == 0
    budget.remove("a")
    budget.remove("a")
    assert budget.capacity == budget.free == {"late": 3}
