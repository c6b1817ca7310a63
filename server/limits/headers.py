"""Request headers: bounded in bytes and in time, before there is a request that any other limit could see."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from steersman.server.limits.refusals import error_body
from steersman.server.metrics.requests import Refusal, count_refusal

TIMEOUT_S = 30.0
"""From a connection's first moment, or a further request's first byte, to the end of its header."""


class BoundedHeaders(HttpToolsProtocol):
    """uvicorn's HTTP protocol. It answers 431 to a header of more than `max_bytes`, and closes a connection, with 408,
    whose header does not come to its end within `timeout_s`."""

    def __init__(self, *, max_bytes: int, timeout_s: float, **options: Any) -> None:
        super().__init__(**options)
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._unfinished = 0
        self._is_reading = True
        """Whether the header of the next request is awaited, or has not come to its end."""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client that has connected has so long for its first header."""
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the wait for a header of a client that has gone."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counts what belongs to an unfinished header; what stands behind its end is a body's."""
        super().data_received(data)
        if self._is_reading:
            self._unfinished += len(data)
            if self._unfinished > self._max_bytes:
                self._refuse(
                    431,
                    "malformed",
                    f"the request's header has more than {self._max_bytes} bytes (--h11-max-incomplete-event-size)",
                )

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        if not self._is_reading:
            self._begin()

    def on_headers_complete(self) -> None:
        """The end of a request's header."""
        self._is_reading, self._unfinished = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def handle_websocket_upgrade(self) -> None:
        """Another protocol goes on with the connection."""
        self._stop_timer()
        super().handle_websocket_upgrade()

    def _begin(self) -> None:
        self._is_reading, self._unfinished = True, 0
        self._stop_timer()
        self._timer = self.loop.call_later(self._timeout_s, self._time_out)

    def _time_out(self) -> None:
        self._refuse(408, "slow_upload", f"the request's header did not come to its end within {self._timeout_s:g} s")

    def _refuse(self, status: int, reason: Refusal, message: str) -> None:
        self._stop_timer()
        self._is_reading = False
        if self.transport.is_closing():
            return
        if self._unfinished:
            count_refusal(reason)
            body = json.dumps(error_body(status, message)).encode()
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
