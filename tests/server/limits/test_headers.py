"""Request headers have bounds in bytes and in time, and hold nobody else up."""

import asyncio
import time
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from steersman.server.limits.headers import BoundedHeaders
from tests.support.server import Server, free_port

LIMIT = 64 * 1024


def test_a_header_without_end_is_refused_and_holds_nobody_up(limited: Server) -> None:
    async def flood() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", limited.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
        head = asyncio.ensure_future(reader.readuntil(b"\r\n"))
        for _ in range(400):
            if head.done():
                break
            writer.write(b"a" * 250_000)
            try:
                await asyncio.wait_for(writer.drain(), 10)
            except ConnectionError:
                break
        answer = await head
        writer.close()
        return answer

    async def run() -> tuple[bytes, float]:
        async with httpx.AsyncClient(base_url=limited.url, headers=limited.headers, timeout=60) as client:
            flooding = asyncio.ensure_future(flood())
            began = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            waited = time.monotonic() - began
            return await flooding, waited

    answer, waited = asyncio.run(run())
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert waited < 5


class Listening:
    """A small application behind the protocol, with limits of its own."""

    def __init__(self, timeout_s: float) -> None:
        async def answer(request: Any) -> PlainTextResponse:
            return PlainTextResponse(str(len(await request.body())))

        def protocol(**options: Any) -> BoundedHeaders:
            return BoundedHeaders(max_bytes=LIMIT, timeout_s=timeout_s, **options)

        app = Starlette(routes=[Route("/", answer, methods=["GET", "POST"])])
        self.port = free_port()
        config = uvicorn.Config(app, port=self.port, log_level="error", http=protocol)  # type: ignore[arg-type]
        self._server = uvicorn.Server(config)

    async def __aenter__(self) -> "Listening":
        self._task = asyncio.ensure_future(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        await self._task

    async def say(self, *parts: bytes) -> bytes:
        """All that comes back for some bytes, until the server closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for part in parts:
            writer.write(part)
            await writer.drain()
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        return answer


def test_a_header_that_does_not_come_to_its_end_in_time_ends_its_connection() -> None:
    async def run() -> list[bytes]:
        async with Listening(timeout_s=0.5) as server:
            whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
            return list(
                await asyncio.gather(server.say(b"GET / HT"), server.say(), server.say(whole, b"GET / HTTP/1.1\r\nHo"))
            )

    half, silent, second = asyncio.run(run())
    assert half.startswith(b"HTTP/1.1 408 ")
    assert b"0.5 s" in half
    assert silent == b""
    assert second.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in second


def test_bodies_and_further_requests_of_a_connection_are_no_headers() -> None:
    async def run() -> tuple[list[str], bytes]:
        async with Listening(timeout_s=5) as server:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
                sizes = [(await client.post("/", content=b"x" * size)).text for size in (10, 3 * LIMIT, 10 * LIMIT, 0)]
            long = b"X-Long: " + b"a" * (LIMIT - 200) + b"\r\n"
            last = b"Connection: close\r\n\r\n"
            return sizes, await server.say(b"GET / HTTP/1.1\r\nHost: x\r\n", long, last)

    sizes, answer = asyncio.run(run())
    assert sizes == [str(size) for size in (10, 3 * LIMIT, 10 * LIMIT, 0)]
    assert answer.startswith(b"HTTP/1.1 200 ")
