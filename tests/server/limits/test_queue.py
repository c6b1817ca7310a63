"""Guided requests beyond those that may run and wait are told to come back; plain ones never notice."""

import asyncio
import random

import httpx
import pytest

from steersman.server.limits.queue import GuidedQueue, TooManyRequests
from tests.server.limits.conftest import AT_ONCE, GUIDED, WAITING
from tests.server.polling import wait_until
from tests.support.metrics import growth, read_metrics, total
from tests.support.server import Server


def test_as_many_run_and_wait_as_may_and_the_rest_is_429(limited: Server) -> None:
    guided, plain = 12, 6

    async def run() -> tuple[list[httpx.Response], list[httpx.Response]]:
        async with httpx.AsyncClient(base_url=limited.url, headers=limited.headers, timeout=300) as client:
            asked = {"model": "base", "prompt": "the lamp", "max_tokens": 100, "ignore_eos": True}
            steered = [
                client.post("/v1/completions", json={**asked, "guidance": GUIDED, "stream": number % 2 == 0})
                for number in range(guided)
            ]
            unguided = [client.post("/v1/completions", json=asked) for _ in range(plain)]
            answers = await asyncio.gather(*steered, *unguided)
            return list(answers[:guided]), list(answers[guided:])

    before = read_metrics(limited)
    steered, unguided = asyncio.run(run())
    wait_until(lambda: total(read_metrics(limited), "steersman_running_requests") == 0, "no request runs")
    grown = growth(before, read_metrics(limited))
    assert [answer.status_code for answer in unguided] == [200] * plain
    served = [answer for answer in steered if answer.status_code == 200]
    refused = [answer for answer in steered if answer.status_code == 429]
    assert len(served) + len(refused) == guided
    assert len(served) >= AT_ONCE + WAITING
    assert refused, "none was one too many"
    assert total(grown, "steersman_turn_seconds_count") == len(served)
    assert total(grown, "steersman_requests_total", outcome="finished") == len(served)
    assert total(grown, "steersman_requests_total") == len(served)
    assert total(grown, "steersman_refusals_total", reason="too_many_requests") == len(refused)
    assert total(grown, "steersman_refusals_total") == len(refused)
    # Who had to wait did so while another answer of a hundred tokens was decoded.
    assert total(grown, "steersman_turn_seconds_bucket", le="0.01") < len(served)
    for answer in served:
        assert '"guided_tokens":100' in answer.text
    for answer in refused:
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert answer.json()["error"]["code"] == 429
        assert "--max-guided-requests" in answer.json()["error"]["message"]


def test_places_are_given_back_by_clients_that_hang_up(limited: Server, rng: random.Random) -> None:
    asked = {"model": "base", "prompt": "the lamp", "max_tokens": 400, "ignore_eos": True, "guidance": GUIDED}

    async def leave(client: httpx.AsyncClient) -> None:
        body = {**asked, "stream": rng.random() < 0.5}
        try:
            await asyncio.wait_for(client.post("/v1/completions", json=body), rng.choice([0.01, 0.1, 0.3]))
        except TimeoutError:
            return

    async def run() -> None:
        async with httpx.AsyncClient(base_url=limited.url, headers=limited.headers, timeout=300) as client:
            await asyncio.gather(*(leave(client) for _ in range(24)))

    asyncio.run(run())
    wait_until(lambda: not any(limited.blocks_in_use().values()), "every block is free")

    async def fill() -> list[int]:
        async with httpx.AsyncClient(base_url=limited.url, headers=limited.headers, timeout=300) as client:
            bodies = [{**asked, "max_tokens": 20} for _ in range(AT_ONCE + WAITING)]
            return [
                answer.status_code
                for answer in await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            ]

    assert asyncio.run(fill()) == [200] * (AT_ONCE + WAITING)


def test_clients_that_go_while_they_wait_for_their_turn_are_counted_as_cancelled(limited: Server) -> None:
    asked = {"model": "base", "prompt": "the lamp", "max_tokens": 400, "ignore_eos": True, "guidance": GUIDED}

    def shown(name: str) -> float:
        return total(read_metrics(limited), name)

    async def until(name: str, value: float) -> None:
        await asyncio.to_thread(wait_until, lambda: shown(name) == value, f"{name} is {value}")

    async def leave(requests: list[asyncio.Task[httpx.Response]]) -> None:
        for request in requests:
            request.cancel()
        await asyncio.wait(requests)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=limited.url, headers=limited.headers, timeout=300) as client:

            def ask(stream: bool) -> asyncio.Task[httpx.Response]:
                return asyncio.ensure_future(client.post("/v1/completions", json={**asked, "stream": stream}))

            running = [ask(False) for _ in range(AT_ONCE)]
            await until("steersman_running_requests", AT_ONCE)
            waiting = [ask(False), ask(True)]
            await until("steersman_waiting_requests", 2)
            await leave(waiting)
            await until("steersman_waiting_requests", 0)
            await leave(running)
            await until("steersman_running_requests", 0)

    before = read_metrics(limited)
    asyncio.run(run())
    grown = growth(before, read_metrics(limited))
    assert total(grown, "steersman_requests_total", outcome="cancelled") == AT_ONCE + 2
    assert total(grown, "steersman_requests_total") == AT_ONCE + 2
    assert total(grown, "steersman_turn_seconds_count") == AT_ONCE
    assert total(grown, "steersman_refusals_total") == total(grown, "steersman_errors_total") == 0


@pytest.mark.parametrize("room", [0, 3])
def test_any_order_of_coming_and_going_keeps_the_limits(rng: random.Random, room: int) -> None:
    """Against a plain count: who runs, who waits, in the order in which they came. room: that many wait for it."""
    at_once, waiting = rng.randint(1, 4), rng.randint(min(room, 1), 4)

    async def run() -> None:
        queue = GuidedQueue(at_once, waiting + room, lambda: room)
        order: list[int] = []
        places: dict[int, tuple[object, asyncio.Task[None]]] = {}
        for number in range(200):
            if places and rng.random() < 0.5:
                gone = rng.choice(list(places))
                place, turn = places.pop(gone)
                if gone not in order[:at_once]:
                    turn.cancel()
                place.leave()  # type: ignore[attr-defined]
                order.remove(gone)
            elif len(order) < at_once + waiting:
                places[number] = (place := queue.enter(), asyncio.ensure_future(place.turn()))
                order.append(number)
            else:
                with pytest.raises(TooManyRequests):
                    queue.enter()
            for _ in range(5):
                await asyncio.sleep(0)
            running = {number for number, (_, turn) in places.items() if turn.done()}
            assert running == set(order[:at_once])
            assert queue.waiting == max(0, len(order) - at_once) + room

    asyncio.run(run())
