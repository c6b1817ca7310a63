"""API keys: one of the users' on every path but `/health`, the administrators' own on `/v1/admin/`."""

import hashlib
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from steersman.server.limits.refusals import refuse

ADMIN = "/v1/admin"
_OPEN = "/health"


class Keys:
    """ASGI middleware. Keys are compared by their hashes, all of them, in constant time.

    Without users' keys every path but the admin ones is open; without an admin key the admin paths do not exist. An
    admin key opens the admin paths and nothing else.
    """

    def __init__(self, app: ASGIApp, user_keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        self.app = app
        self._user = [_digest(key) for key in user_keys]
        self._admin = [_digest(key) for key in admin_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._check(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            # Before it was accepted, which servers turn into HTTP 403.
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refusal(scope, receive, send)

    def _check(self, scope: Scope) -> ASGIApp | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = Headers(scope=scope)
        if path == _OPEN or _is_preflight(scope, headers):
            return None
        digest = _digest(_bearer_token(headers))
        is_user, is_admin = _is_among(digest, self._user), _is_among(digest, self._admin)
        if path == ADMIN or path.startswith(f"{ADMIN}/"):
            if not self._admin:
                return refuse(404, "Not Found", None)
            if is_user and not is_admin:
                return refuse(403, "this path needs an admin key, not a user's API key", "unauthorized")
            return None if is_admin else _unauthorized()
        return None if is_user or not self._user else _unauthorized()


def _unauthorized() -> ASGIApp:
    message = "a valid API key is needed: send the header 'Authorization: Bearer KEY'"
    return refuse(401, message, "unauthorized", headers={"WWW-Authenticate": "Bearer"})


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    """Browsers send these without a key; the CORS middleware answers them itself, whatever the path."""
    return scope.get("method") == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


def _bearer_token(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_among(digest: bytes, keys: Sequence[bytes]) -> bool:
    found = False
    for key in keys:
        found |= secrets.compare_digest(digest, key)
    return found
