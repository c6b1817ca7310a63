"""Every way in which a guided request can end is counted as what it was, and once: `steersman_requests_total` for one
that was let in, `steersman_refusals_total` for one that was not, `steersman_errors_total` beside each that failed."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from steersman.guidance.request import ModelNotLoaded
from steersman.server.errors import GuidanceFailed, InvalidGuidance, fault_of
from steersman.server.limits.bodies import Bodies
from steersman.server.limits.lifetime import Lifetimes
from steersman.server.metrics.requests import (
    FollowedRequest,
    Refusal,
    begin_counting,
    begin_exchange,
    count_refusal,
    follow,
    followed_request,
)
from steersman.server.vllm import EngineDeadError, VLLMValidationError
from tests.conftest import POISON
from tests.server.polling import wait_until
from tests.support.metrics import Series, growth, read_metrics, total
from tests.support.server import Server

PARGS = {"method": "pargs", "reward_model": "first"}
BROKEN = {**PARGS, "reward_model": "broken"}
BEST = {"method": "best_of_n", "reward_model": "first", "n": 3}
BLOCKS = {"method": "blockwise", "reward_model": "first", "n": 2, "block": 4}
SPOILT = [7, POISON, 9]
LONG = {"max_tokens": 200, "ignore_eos": True}
FAMILIES = {
    "requests": ("steersman_requests_total", "outcome"),
    "errors": ("steersman_errors_total", "reason"),
    "refusals": ("steersman_refusals_total", "reason"),
    "cut_off": ("steersman_cut_off_requests_total", "reason"),
}


@dataclass(frozen=True)
class Ending:
    """What is sent, and under what it is to be counted: a family of counters and a label, once."""

    counted: tuple[str, str]
    fields: dict[str, Any]
    leave: str | None = None
    """When the client goes, if it does: "at once" or "after a token"."""
    spoils: bool = False
    """Whether a model is to blame."""
    body: bytes | None = field(default=None, repr=False)


FINISHED, FAILED, CANCELLED = ("requests", "finished"), ("requests", "failed"), ("requests", "cancelled")
ENDINGS = {
    "one choice": Ending(FINISHED, {"guidance": PARGS}),
    "three choices of each of two prompts": Ending(
        FINISHED, {"guidance": PARGS, "n": 3, "prompt": [[5, 6], [7, 8, 9]]}
    ),
    "the best of three": Ending(FINISHED, {"guidance": BEST}),
    "the best blocks": Ending(FINISHED, {"guidance": BLOCKS}),
    "a preset": Ending(FINISHED, {"model": "base:blended"}),
    "gone at once": Ending(CANCELLED, {"guidance": PARGS, **LONG}, leave="at once"),
    "gone at once, three choices": Ending(CANCELLED, {"guidance": PARGS, "n": 3, **LONG}, leave="at once"),
    "gone at once, two prompts": Ending(
        CANCELLED, {"guidance": PARGS, "prompt": [[5, 6], [7]], **LONG}, leave="at once"
    ),
    "gone from a search": Ending(CANCELLED, {"guidance": {**BEST, "n": 8}, **LONG}, leave="at once"),
    "gone after a token": Ending(CANCELLED, {"guidance": PARGS, **LONG}, leave="after a token"),
    "gone after a block": Ending(CANCELLED, {"guidance": BLOCKS, **LONG}, leave="after a token"),
    "a model spoils it": Ending(FAILED, {"guidance": BROKEN, "prompt": SPOILT}, spoils=True),
    "a model spoils three choices": Ending(FAILED, {"guidance": BROKEN, "prompt": SPOILT, "n": 3}, spoils=True),
    "a model spoils one prompt of two": Ending(
        FAILED, {"guidance": BROKEN, "prompt": [[5, 6], SPOILT], "max_tokens": 40, "ignore_eos": True}, spoils=True
    ),
    "a model spoils the best": Ending(
        FAILED, {"guidance": {**BEST, "reward_model": "broken"}, "prompt": SPOILT}, spoils=True
    ),
    "a model spoils a block": Ending(
        FAILED, {"guidance": {**BLOCKS, "reward_model": "broken"}, "prompt": SPOILT}, spoils=True
    ),
    "bad guidance": Ending(("refusals", "guidance"), {"guidance": {**PARGS, "beta": -1}}),
    "guidance in a wrong place": Ending(("refusals", "unsupported"), {"metadata": {"guidance": PARGS}}),
    "no such reward model": Ending(("refusals", "model_not_loaded"), {"guidance": {**PARGS, "reward_model": "absent"}}),
    "too long": Ending(("refusals", "too_long"), {"guidance": {**PARGS, "reward_model": "narrow"}, "prompt": [7] * 70}),
    "a prompt of two is too long": Ending(
        ("refusals", "too_long"), {"guidance": {**PARGS, "reward_model": "narrow"}, "prompt": [[5], [7] * 70]}
    ),
    "vLLM: no such model": Ending(("refusals", "invalid"), {"guidance": PARGS, "model": "absent"}),
    "vLLM: a wrong type": Ending(("refusals", "invalid"), {"guidance": PARGS, "temperature": "hot"}),
    "vLLM: a wrong value": Ending(("refusals", "invalid"), {"guidance": PARGS, "top_p": 7}),
    "vLLM: a token that is none": Ending(("refusals", "invalid"), {"guidance": PARGS, "stop_token_ids": [10**6]}),
    "vLLM: a token that is none, for a search": Ending(
        ("refusals", "invalid"), {"guidance": BEST, "allowed_token_ids": [10**6]}
    ),
    "vLLM: a bias for a token that is none": Ending(
        ("refusals", "invalid"), {"guidance": BLOCKS, "logit_bias": {str(10**6): 1}}
    ),
    "vLLM: too many logprobs": Ending(("refusals", "invalid"), {"guidance": PARGS, "logprobs": 99}),
    "no JSON": Ending(("refusals", "malformed"), {}, body=b'{"model": "base", "guidance": '),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("ending", [pytest.param(ending, id=name) for name, ending in ENDINGS.items()])
def test_an_ending_is_counted_once_as_what_it_was(server: Server, ending: Ending, stream: bool) -> None:
    before = read_metrics(server)
    _send(server, ending, stream)
    grown = growth(before, after := _settled_since(server, before))
    expected = {ending.counted: 1.0}
    if ending.counted == FAILED:
        expected["errors", "guidance"] = 1.0
    assert _counted(grown) == expected
    assert (total(grown, "steersman_model_failures_total") > 0) == ending.spoils
    for gauge in ("steersman_running_requests", "steersman_waiting_requests", "steersman_cache_blocks_reserved"):
        assert total(after, gauge) == 0


def _send(server: Server, ending: Ending, stream: bool) -> None:
    body = {"model": "base", "prompt": [5, 6, 7], "max_tokens": 9, "stream": stream, **ending.fields}
    url, options = f"{server.url}/v1/completions", {"headers": {"Content-Type": "application/json"}, "timeout": 60}
    asked: dict[str, Any] = {"json": body} if ending.body is None else {"content": ending.body}
    if ending.leave is None:
        httpx.post(url, **asked, **options)
    elif stream:
        with httpx.stream("POST", url, **asked, **options) as response:
            if ending.leave == "after a token":
                next(line for line in response.iter_lines() if line)
    else:
        # A whole answer shows no token: its client goes while it is decoded, or before.
        wait_s = 0.05 if ending.leave == "at once" else 0.3
        with suppress(httpx.ReadTimeout):
            httpx.post(url, **asked, headers=options["headers"], timeout=httpx.Timeout(60, read=wait_s))


def _settled_since(server: Server, before: Series) -> Series:
    """Once nothing runs and something was counted: what ends last is counted a moment after the client has left."""
    found: list[Series] = []

    def settled() -> bool:
        found[:] = [now := read_metrics(server)]
        names = ("steersman_running_requests", "steersman_waiting_requests", "steersman_cache_blocks_in_use")
        return bool(_counted(growth(before, now))) and not any(total(now, name) for name in names)

    wait_until(settled, "the request is counted, and none runs")
    return found[0]


def _counted(grown: Series) -> dict[tuple[str, str], float]:
    """What has grown in the four families, summed over methods."""
    found: dict[tuple[str, str], float] = {}
    for family, (name, key) in FAMILIES.items():
        for (metric, labels), value in grown.items():
            if metric == name and value:
                place = (family, dict(labels)[key])
                found[place] = found.get(place, 0.0) + value
    return found


def _here() -> Series:
    """The same of this process."""
    begin_counting([], [])
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
    }


ERRORS: dict[str, tuple[BaseException, dict[tuple[str, str], float]]] = {
    "guidance failed": (GuidanceFailed("no"), {FAILED: 1, ("errors", "guidance"): 1}),
    "the engine is dead": (EngineDeadError(), {FAILED: 1, ("errors", "engine"): 1}),
    "an error that nobody knows": (RuntimeError("no"), {FAILED: 1, ("errors", "engine"): 1}),
    "a model has just gone": (ModelNotLoaded("guidance", "gone"), {("refusals", "invalid"): 1}),
    "a late refusal": (InvalidGuidance("prompt", "no"), {("refusals", "invalid"): 1}),
    "vLLM's refusal": (VLLMValidationError("no"), {("refusals", "invalid"): 1}),
    "vLLM's older refusal": (ValueError("no"), {("refusals", "invalid"): 1}),
    "the client has gone": (asyncio.CancelledError(), {CANCELLED: 1}),
    "the answer is closed": (GeneratorExit(), {CANCELLED: 1}),
}


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize(("error", "expected"), ERRORS.values(), ids=ERRORS)
def test_an_error_of_any_prompts_counts_once(
    rng: random.Random, error: BaseException, expected: dict[tuple[str, str], float], prompts: int
) -> None:
    before = _here()
    copy_context().run(_end_with, rng, error, prompts)
    assert _counted(growth(before, _here())) == expected


def _end_with(rng: random.Random, error: BaseException, prompts: int) -> None:
    """A request some of whose prompts end with an error."""
    begin_exchange()
    request = FollowedRequest("pargs")
    failing = rng.sample(range(prompts), rng.randint(1, prompts))
    for _ in range(prompts):
        request.add_prompt()
    for number in range(prompts):
        with suppress(type(error)), request.following(fault_of) as prompt:
            prompt.admit()
            if number in failing:
                raise error
            prompt.finished = True
    request.end()
    request.end()


def test_only_the_first_refusal_of_a_request_counts() -> None:
    def refuse(*reasons: Refusal) -> None:
        begin_exchange()
        for reason in reasons:
            count_refusal(reason)

    before = _here()
    copy_context().run(refuse, "too_long", "invalid")
    copy_context().run(refuse, "invalid")
    assert _counted(growth(before, _here())) == {("refusals", "too_long"): 1, ("refusals", "invalid"): 1}


INTERRUPTED: dict[str, dict[tuple[str, str], float]] = {
    "timeout": {FAILED: 1, ("errors", "timeout"): 1, ("cut_off", "timeout"): 1},
    "drain": {FAILED: 1, ("errors", "shutting_down"): 1, ("cut_off", "shutting_down"): 1},
    "not read": {CANCELLED: 1, ("cut_off", "not_reading"): 1},
    "hung up": {CANCELLED: 1},
    "plain timeout": {("cut_off", "timeout"): 1},
    "slow upload": {("refusals", "slow_upload"): 1},
    "hung up while sending": {},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("way", INTERRUPTED)
def test_what_the_server_ends_is_its_own_failure_and_what_the_client_ends_is_not(way: str, stream: bool) -> None:
    before = _here()
    asyncio.run(asyncio.wait_for(_interrupt(way, stream), 20))
    expected = dict(INTERRUPTED[way])
    if way == "not read" and not stream:
        # A whole answer is small enough to be sent whether it is read or not.
        expected = {FAILED: 1, ("errors", "timeout"): 1, ("cut_off", "timeout"): 1}
    assert _counted(growth(before, _here())) == expected


async def _interrupt(way: str, stream: bool) -> None:
    """One request to an application whose answer never ends, under the limits."""
    started, ended = asyncio.Event(), asyncio.Event()
    reading = way != "not read"
    timeout = 0.1 if way in ("timeout", "plain timeout", "not read", "slow upload") else None
    lifetimes = Lifetimes(Bodies(_endless(way != "plain timeout", stream, started, ended), 100), timeout)
    incoming: asyncio.Queue[Message] = asyncio.Queue()
    incoming.put_nowait(
        {"type": "http.request", "body": b"{}", "more_body": way in ("slow upload", "hung up while sending")}
    )
    if way == "hung up while sending":
        incoming.put_nowait({"type": "http.disconnect"})

    async def send(message: Message) -> None:
        if not reading and message["type"] == "http.response.body" and message.get("more_body"):
            await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/", "raw_path": b"/", "query_string": b"", "headers": []}
    work = asyncio.ensure_future(lifetimes(scope, incoming.get, send))
    if way in ("drain", "hung up"):
        await started.wait()
        if way == "drain":
            await lifetimes.drain(0)
        else:
            incoming.put_nowait({"type": "http.disconnect"})
    await work
    if started.is_set():
        await ended.wait()


def _endless(guided: bool, stream: bool, started: asyncio.Event, ended: asyncio.Event) -> Starlette:
    """An application that serves a request as the guided routes do."""

    async def decode() -> Any:
        request = followed_request("pargs")
        with request.following(fault_of) as prompt:
            prompt.admit()
            yield "data: 1\n\n"
            started.set()
            await asyncio.Event().wait()

    async def serve(raw: Request) -> Response:
        request = follow("pargs") if guided else None
        if request is not None:
            request.add_prompt()
        leave: Callable[[], Awaitable[None]] = _leaving(request, ended)
        events = decode()
        if stream:
            return _Stream(events, leave)
        work = asyncio.ensure_future(_consume(events))
        gone = asyncio.ensure_future(_until_gone(raw))
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        await asyncio.wait((work,))
        await leave()
        return JSONResponse(None)

    return Starlette(routes=[Route("/", serve, methods=["POST"])])


def _leaving(request: FollowedRequest | None, ended: asyncio.Event) -> Callable[[], Awaitable[None]]:
    async def leave() -> None:
        if request is not None:
            request.end()
        ended.set()

    return leave


async def _consume(events: Any) -> None:
    async for _ in events:
        pass


async def _until_gone(raw: Request) -> None:
    while (await raw.receive())["type"] != "http.disconnect":
        pass


class _Stream(StreamingResponse):
    def __init__(self, events: Any, leave: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events, self._leave = events, leave

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            await self._events.aclose()
            await self._leave()
