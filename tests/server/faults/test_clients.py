"""Clients that go away in the middle, or do not read: neighbours see nothing of it, and nothing is held for them."""

import asyncio
import random
import socket
from typing import Any

import httpx
import pytest

from tests.server.faults.supervised import SupervisedServer
from tests.server.polling import assert_no_block_stays_in_use, wait_until
from tests.support.metrics import growth, read_metrics, total
from tests.support.random_input import random_prompts
from tests.support.streams import GUIDED, Stream, read_streams, streamed

LEAVING = 100
NEIGHBOURS = 6
KINDS: list[dict[str, Any]] = [{}, {"guidance": GUIDED}, {"guidance": GUIDED, "n": 2, "temperature": 1}]


def test_a_hundred_clients_leave_in_mid_stream(supervised: SupervisedServer, rng: random.Random) -> None:
    leaving = [streamed(p, 400, **KINDS[n % 3]) for n, p in enumerate(random_prompts(rng, LEAVING))]
    staying = [streamed(p, 60, **KINDS[n % 2]) for n, p in enumerate(random_prompts(rng, NEIGHBOURS))]
    alone = [read_streams(supervised, [body])[0].tokens for body in staying]
    before = read_metrics(supervised)
    after_events = [rng.randint(1, 20) for _ in leaving]
    assert asyncio.run(_read_while_others_leave(supervised, staying, leaving, after_events)) == alone

    def idle() -> bool:
        metrics = read_metrics(supervised)
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "steersman_running_requests")
        return not any(total(metrics, name) for name in names)

    wait_until(idle, "nobody's request is decoded any more")
    assert_no_block_stays_in_use(supervised)
    grown = growth(before, read_metrics(supervised))
    assert total(grown, "steersman_requests_total", outcome="cancelled") == sum("guidance" in body for body in leaving)
    # All of them would have been 400 tokens long.
    assert total(grown, "vllm:generation_tokens_total") < LEAVING * 400 / 2


@pytest.mark.parametrize("kind", [KINDS[0], {**KINDS[2], "seed": 5}], ids=["plain", "guided"])
def test_a_client_that_does_not_read_holds_nobody_up_and_gets_everything_later(
    supervised: SupervisedServer, rng: random.Random, kind: dict[str, Any]
) -> None:
    body = streamed(random_prompts(rng, 1)[0], 400, logprobs=5, **kind)
    (expected,) = read_streams(supervised, [body])
    with _open_unread(supervised, body) as connection:
        quick = streamed(random_prompts(rng, 1)[0], 400, guidance=GUIDED)
        assert len(read_streams(supervised, [quick])[0].tokens[0]) == 400
        # Its answer is decoded to the end and its blocks are free, though most of it lies unread.
        assert_no_block_stays_in_use(supervised)
        wait_until(lambda: not total(read_metrics(supervised), "vllm:num_requests_running"), "it is decoded")
        late = Stream()
        for line in connection.makefile(encoding="utf-8"):
            late.take(line.rstrip("\n"))
        assert late.tokens == expected.tokens


def _open_unread(supervised: SupervisedServer, body: dict[str, Any]) -> socket.socket:
    """Sends a request and reads nothing, with so small a window that most of the answer cannot be sent."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", supervised.port))
    request = httpx.Request("POST", f"{supervised.url}/v1/completions", json=body, headers={"Connection": "close"})
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content)
    return connection


async def _read_while_others_leave(
    supervised: SupervisedServer,
    staying: list[dict[str, Any]],
    leaving: list[dict[str, Any]],
    after_events: list[int],
) -> list[list[list[int]]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=supervised.url, timeout=120, limits=limits) as client:

        async def leave(body: dict[str, Any], after: int) -> None:
            seen = 0
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    seen += line.startswith("data: ")
                    if seen == after:
                        return

        gone = [asyncio.ensure_future(leave(body, after)) for body, after in zip(leaving, after_events, strict=True)]
        read = await asyncio.gather(*(Stream().read(client, body) for body in staying))
        await asyncio.gather(*gone)
        return [stream.tokens for stream in read]
