"""Every request has an id, its client's or a fresh one, by which it is found again in logs."""

import re
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steersman.server.logs import REQUEST_ID

_HARMLESS = re.compile(rb"[A-Za-z0-9._:+/=@-]{1,128}")
_HEADER = b"x-request-id"


class RequestIds:
    """ASGI middleware: the client's `X-Request-Id` if it is of at most 128 harmless characters, else a fresh one.

    It is on the response, on log lines, and part of the id that vLLM gives the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == _HEADER), b"")
        request_id = given if _HARMLESS.fullmatch(given) else uuid4().hex.encode()
        header = (_HEADER, request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], header]
            await send(message)

        headers = [entry for entry in scope["headers"] if entry[0] != _HEADER]
        token = REQUEST_ID.set(request_id.decode())
        try:
            await self.app({**scope, "headers": [*headers, header]}, receive, send_with_id)
        finally:
            REQUEST_ID.reset(token)
