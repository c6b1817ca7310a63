"""SIGTERM under load: nobody new comes in, no stream is cut, and the server stops with exit code 0.

The last file of its folder: the server is gone afterwards.
"""

import asyncio
import json
import signal

import httpx

from tests.server.limits.conftest import ADMIN_KEY, AT_ONCE, GUIDED, KEY, SECOND_KEY
from tests.support.server import Server

TOKENS = 300


def test_streams_run_to_their_end_and_then_the_server_stops(limited: Server) -> None:
    started, before = 0, len(limited.log.read_text())
    everybody_streams = asyncio.Event()
    asked = {"model": "base", "prompt": "the lamp", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    bodies = [{**asked, "guidance": GUIDED}] * AT_ONCE + [asked] * 4

    async def stream(client: httpx.AsyncClient, body: dict[str, object]) -> list[str]:
        nonlocal started
        events: list[str] = []
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
                if len(events) == 3:
                    started += 1
                    if started == len(bodies):
                        everybody_streams.set()
        return events

    async def run() -> list[list[str]]:
        async with httpx.AsyncClient(base_url=limited.url, headers=limited.headers, timeout=300) as client:
            streams = [asyncio.ensure_future(stream(client, body)) for body in bodies]
            await everybody_streams.wait()
            limited.process.send_signal(signal.SIGTERM)
            while (await client.get("/health")).status_code == 200:
                await asyncio.sleep(0.01)
            assert not all(task.done() for task in streams), "the streams were too short for this test"
            refused = await client.post("/v1/completions", json={**asked, "stream": False})
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
            assert (await client.get("/metrics")).status_code == 200
            return list(await asyncio.gather(*streams))

    for body, events in zip(bodies, asyncio.run(run()), strict=True):
        assert events[-1] == "[DONE]"
        last = json.loads(events[-2])["choices"][0]
        assert last["finish_reason"] == "length"
        if "guidance" in body:
            assert last["guidance"]["tokens"] == TOKENS
    assert limited.process.wait(timeout=60) == 0
    log = limited.log.read_text()
    for fault in ("Traceback", "force killing", "resource_tracker", "leaked"):
        assert fault not in log[before:], log[before:]
    for key in (KEY, SECOND_KEY, ADMIN_KEY):
        assert key not in log
