"""Request bodies: bounded while they arrive, and looked at before any route reads them."""

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steersman.server.limits.json_body import MalformedBody, check_json
from steersman.server.limits.refusals import refuse


class Bodies:
    """ASGI middleware: HTTP 413 for a body of more than `limit` bytes, by its announced length or as soon as so many
    have come; 400 for one that is no JSON."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        try:
            body = None if announced.isdecimal() and int(announced) > self.limit else await self._read(receive)
        except ClientDisconnect:
            return
        if body is None:
            await self._too_large()(scope, receive, send)
            return
        content_type = headers.get("content-type", "json").lower()
        try:
            if body and "json" in content_type:
                check_json(body)
        except MalformedBody as error:
            await refuse(400, str(error), "malformed", param=error.param)(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None for one that is too large. Raises ClientDisconnect when the client leaves before."""
        pieces: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            more = message.get("more_body", False)
            if size > self.limit:
                return None
        return b"".join(pieces)

    def _too_large(self) -> ASGIApp:
        message = f"the body is larger than {self.limit} bytes, which is all that this server reads (--max-body-bytes)"
        # What has not been read of it cannot be told from the next request.
        return refuse(413, message, "body_too_large", headers={"Connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    return replay
