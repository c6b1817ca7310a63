"""A request that takes too long ends with an error, and its work with it."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from steersman.server.limits.bodies import Bodies
from steersman.server.limits.lifetime import Lifetimes
from tests.server.polling import wait_until
from tests.support.metrics import growth, read_metrics, total
from tests.support.server import Server

ENDLESS = {"method": "blockwise", "reward_model": "first", "n": 8, "block": 1}
ASKED: dict[str, Any] = {
    **{"model": "base", "prompt": "the lamp", "max_tokens": 480, "ignore_eos": True, "guidance": ENDLESS},
    "prompt": [[5, 6, 7]] * 8,
}


def test_guided_requests_and_slow_uploads_end_at_the_time_limit(limited: Server) -> None:
    async def upload() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", limited.port)
        key = limited.headers["Authorization"]
        lines = ["POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: {key}", "Content-Length: 100", "", "{"]
        writer.write("\r\n".join(lines).encode())
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return head

    async def run() -> tuple[httpx.Response, httpx.Response, bytes]:
        async with httpx.AsyncClient(base_url=limited.url, headers=limited.headers, timeout=300) as client:
            return await asyncio.gather(
                client.post("/v1/completions", json=ASKED),
                client.post("/v1/completions", json={**ASKED, "stream": True}),
                upload(),
            )

    before = read_metrics(limited)
    whole, stream, head = asyncio.run(run())
    assert whole.status_code == whole.json()["error"]["code"] == 504
    assert "--request-timeout" in whole.json()["error"]["message"]
    assert stream.status_code == 200
    events = [event for event in stream.text.split("\n\n") if event]
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 504
    assert events[-1] == "data: [DONE]"
    assert head.startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: not any(limited.blocks_in_use().values()), "every block is free")
    wait_until(lambda: _requests_in_engine(limited) == 0, "vLLM has aborted what was cut off")
    grown = growth(before, read_metrics(limited))
    for name, labels, count in (
        ("steersman_requests_total", {"outcome": "failed"}, 2),
        ("steersman_errors_total", {"reason": "timeout"}, 2),
        ("steersman_cut_off_requests_total", {"reason": "timeout"}, 2),
        ("steersman_refusals_total", {"reason": "slow_upload"}, 1),
    ):
        assert total(grown, name, **labels) == total(grown, name) == count, name
    assert limited.complete([5, 6, 7], max_tokens=3, ignore_eos=True)["choices"][0]["finish_reason"] == "length"


def _requests_in_engine(limited: Server) -> float:
    lines = limited.get("/metrics").text.splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))


class Slow:
    """An application whose answers never end, and which knows whether it was told to stop."""

    def __init__(self) -> None:
        self.stopped: list[str] = []

    async def whole(self, _: Request) -> Response:
        return await self._never("whole")

    async def stream(self, _: Request) -> Response:
        async def events() -> Any:
            yield "data: 1\n\n"
            await self._never("stream")

        return StreamingResponse(events(), media_type="text/event-stream")

    async def quick(self, _: Request) -> Response:
        return JSONResponse({"done": True})

    async def _never(self, name: str) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.append(name)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/whole", self.whole, methods=["POST"]),
                Route("/stream", self.stream, methods=["POST"]),
                Route("/quick", self.quick, methods=["POST", "GET"]),
                Route("/health", self.quick),
            ]
        )


def test_what_never_ends_is_ended() -> None:
    async def run() -> None:
        slow = Slow()
        lifetimes = Lifetimes(Bodies(slow.app(), 100), timeout_s=0.05)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(lifetimes), base_url="http://test") as client:
            whole, stream, quick = await asyncio.gather(*(client.post(f"/{n}") for n in ("whole", "stream", "quick")))
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, 504)
        assert stream.text.startswith("data: 1\n\ndata: {")
        assert stream.text.endswith("\n\ndata: [DONE]\n\n")
        assert quick.json() == {"done": True}
        assert sorted(slow.stopped) == ["stream", "whole"]

    asyncio.run(run())


@pytest.mark.parametrize("limit_s", [0, 0.05])
def test_draining_lets_nobody_in_and_ends_what_is_left_at_the_limit(limit_s: float) -> None:
    async def run() -> None:
        slow = Slow()
        lifetimes = Lifetimes(slow.app(), timeout_s=None)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(lifetimes), base_url="http://test") as client:
            assert (await client.get("/health")).status_code == 200
            left = [asyncio.ensure_future(client.post(f"/{name}")) for name in ("whole", "stream")]
            while len(lifetimes._running) < 2:
                await asyncio.sleep(0)
            drained = asyncio.ensure_future(lifetimes.drain(limit_s))
            await asyncio.sleep(0)
            refused, health, shown = [
                await client.post("/quick"),
                await client.get("/health"),
                await client.get("/quick"),
            ]
            whole, stream = await asyncio.gather(*left)
            await drained
        assert refused.status_code == health.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert shown.status_code == 200
        assert whole.status_code == 503
        assert '"code": 503' in stream.text
        assert stream.text.endswith("data: [DONE]\n\n")
        assert sorted(slow.stopped) == ["stream", "whole"]

    asyncio.run(run())


def test_draining_nothing_takes_no_time() -> None:
    asyncio.run(Lifetimes(Slow().app(), timeout_s=None).drain(1e6))
