"""How long requests may take, and how the server stops: requests in flight end, or are ended with an error."""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steersman.server.limits.refusals import error_body, refuse
from steersman.server.metrics.requests import begin_exchange, count_cut_off, count_refusal

RETRY_AFTER_S = 5
"""A balancer has taken a server that drains out of its turn by then."""
_GRACE_S = 1.0
"""From being told that its client has gone to being cancelled."""
_LAST_WORD_S = 5.0
"""A client that reads nothing is not waited for."""


@dataclass(frozen=True)
class _Verdict:
    """Why a request is ended."""

    status: int
    message: str
    fault: Literal["timeout", "shutting_down"]
    """Under which it is counted."""


class Lifetimes:
    """ASGI middleware: ends requests at their time limit and refuses them while the server drains.

    To the application an ended request is one whose client has hung up: what it does then (abort the engine's work,
    give the caches' blocks back) is done here too, and what it still says is not passed on.
    """

    def __init__(self, app: ASGIApp, timeout_s: float | None) -> None:
        self.app = app
        self.timeout_s = timeout_s
        self.draining = False
        self._running: set[_Exchange] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif self.draining and (scope.get("method") not in ("GET", "HEAD") or scope["path"].endswith("/health")):
            await self._refuse(scope, receive, send)
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self._run(_Exchange(scope, receive, send), scope)

    async def drain(self, limit_s: float) -> None:
        """Lets no request in any more, waits until those in flight have ended, and ends them after `limit_s`."""
        self.draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), limit_s)
        for exchange in tuple(self._running):
            exchange.end(_Verdict(503, "the server is stopping and could not finish this request", "shutting_down"))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _GRACE_S + _LAST_WORD_S)

    async def _run(self, exchange: "_Exchange", scope: Scope) -> None:
        loop = asyncio.get_running_loop()
        timer = None if self.timeout_s is None else loop.call_later(self.timeout_s, self._time_out, exchange)
        self._running.add(exchange)
        self._idle.clear()
        try:
            await exchange.run(self.app, scope)
        finally:
            if timer is not None:
                timer.cancel()
            self._running.discard(exchange)
            if not self._running:
                self._idle.set()

    def _time_out(self, exchange: "_Exchange") -> None:
        status = 504 if exchange.received else 408
        exchange.end(
            _Verdict(status, f"the request took more than {self.timeout_s:g} s (--request-timeout)", "timeout")
        )

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1012})
            return
        headers = {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"}
        message = "the server is stopping; try again in a moment"
        await refuse(503, message, "shutting_down", headers=headers)(scope, receive, send)


class _Exchange:
    """One request and its response, which can be ended from outside."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._method = scope.get("method")
        self._record = begin_exchange()
        self._sending = False
        self.received = False
        self._verdict: _Verdict | None = None
        self._ended = asyncio.Event()
        self._started = self._complete = self._is_stream = False
        self._work: asyncio.Task[None] | None = None

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Runs the application on this request to its end."""
        self._work = asyncio.ensure_future(app(scope, self._receive_until_ended, self._send_until_ended))
        try:
            await self._work
        except (asyncio.CancelledError, Exception):
            if self._verdict is None:
                raise
        if self._verdict is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._say(self._verdict), _LAST_WORD_S)

    def end(self, verdict: _Verdict) -> None:
        """Ends the request with an error response, or an error event in a stream that has begun."""
        if self._complete or self._verdict is not None:
            return
        self._verdict = verdict
        self._ended.set()
        self._count(verdict)
        if self._work is not None:
            asyncio.get_running_loop().call_later(_GRACE_S, self._work.cancel)

    def _count(self, verdict: _Verdict) -> None:
        if not self.received:
            count_refusal("slow_upload" if verdict.fault == "timeout" else "shutting_down", self._record)
        elif self._sending:
            # Its client does not read what it is sent, so that nothing more can be.
            count_cut_off("not_reading")
        else:
            count_cut_off(verdict.fault)
            self._record.interruption = verdict.fault

    async def _receive_until_ended(self) -> Message:
        coming, ended = asyncio.ensure_future(self._receive()), asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait((coming, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            coming.cancel()
            ended.cancel()
        if self._verdict is not None:
            return {"type": "http.disconnect"}
        message = coming.result()
        self.received = not message.get("more_body", False)
        return message

    async def _send_until_ended(self, message: Message) -> None:
        if self._verdict is not None:
            return
        if message["type"] == "http.response.start":
            self._started = True
            if self._method == "POST" and 400 <= message["status"] < 500:
                count_refusal("invalid", self._record)
            self._is_stream = any(b"event-stream" in value for _, value in message["headers"])
        self._sending = True
        try:
            await self._send(message)
        finally:
            self._sending = False
        self._complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def _say(self, verdict: _Verdict) -> None:
        content = error_body(verdict.status, verdict.message)
        if not self._started:
            body = json.dumps(content).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await self._send({"type": "http.response.start", "status": verdict.status, "headers": headers})
            await self._send({"type": "http.response.body", "body": body})
        elif self._is_stream and not self._complete:
            event = f"data: {json.dumps(content)}\n\ndata: [DONE]\n\n"
            await self._send({"type": "http.response.body", "body": event.encode()})


def wait_for_drain(lifetimes: Lifetimes, loop: asyncio.AbstractEventLoop, limit_s: float) -> Any:
    """`Lifetimes.drain` from another thread; returns when it has ended."""
    return asyncio.run_coroutine_threadsafe(lifetimes.drain(limit_s), loop).result()
