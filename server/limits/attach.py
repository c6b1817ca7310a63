"""The limits around the application, outermost first: request id, keys, time and drain, body."""

from fastapi import FastAPI

from steersman.server.limits.bodies import Bodies
from steersman.server.limits.keys import Keys
from steersman.server.limits.lifetime import Lifetimes
from steersman.server.limits.request_ids import RequestIds
from steersman.server.limits.settings import Limits


def attach_limits(app: FastAPI, limits: Limits) -> Lifetimes:
    """Puts the limits around the finished application, vLLM's own middleware included. Returns what drains it."""
    lifetimes = Lifetimes(Bodies(app.build_middleware_stack(), limits.body_bytes), limits.request_timeout)
    app.middleware_stack = RequestIds(Keys(lifetimes, limits.api_keys, limits.admin_keys))
    return lifetimes
