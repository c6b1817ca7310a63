"""Every query of every panel and rule, asked of a real Prometheus that watches a real server under mixed traffic."""

import asyncio
import json
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from steersman.benchmarks.prometheus import Prometheus, run_prometheus
from steersman.server.dashboards.build import DASHBOARDS, DEPLOY, RULES
from steersman.server.dashboards.rules import ALERTS
from tests.conftest import POISON
from tests.server.polling import wait_until
from tests.server.test_metrics import EVERY_METHOD, PARGS
from tests.support.random_input import random_prompts
from tests.support.server import Server

_VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$method": ".*", "$model": ".*"}
_LIMIT_S = 60


@pytest.fixture(scope="module")
def prometheus(server: Server) -> Iterator[Prometheus]:
    """After two rounds of traffic with a scrape between them, so that every rate has something to show."""
    with run_prometheus(f"127.0.0.1:{server.port}", DEPLOY / RULES) as running:
        for _ in range(2):
            before = _answers(running)
            asyncio.run(_send_mixed(server))
            wait_until(lambda seen=before: _answers(running) > seen, "Prometheus has seen the traffic")  # type: ignore[misc]
        yield running


def _queries() -> list[Any]:
    pages = [
        (DEPLOY / "grafana" / "dashboards" / f"{page.uid}.json").read_text(encoding="utf-8") for page in DASHBOARDS
    ]
    shown = [
        pytest.param(target["expr"], id=f"{panel['title']}: {target['legendFormat']}")
        for page in pages
        for panel in json.loads(page)["panels"]
        for target in panel.get("targets", ())
    ]
    return shown + [pytest.param(alert.value, id=alert.name) for alert in ALERTS]


@pytest.mark.parametrize("expr", _queries())
def test_a_query_has_a_result_that_is_a_number(prometheus: Prometheus, expr: str) -> None:
    for variable, value in _VARIABLES.items():
        expr = expr.replace(variable, value)
    wait_until(lambda: _has_number(prometheus, expr), f"a number from {expr}", _LIMIT_S)


def test_every_metric_that_is_asked_for_exists(prometheus: Prometheus) -> None:
    asked = {
        name
        for parameter in _queries()
        for name in re.findall(r"\b(?:steersman_|vllm:|process_)[a-z0-9_:]+", parameter.values[0])
    }
    missing = {name for name in asked if not prometheus.query(f"count({name})")}
    assert not missing


def test_variables_offer_the_methods_and_the_loaded_models(prometheus: Prometheus) -> None:
    methods = {series["metric"]["method"] for series in prometheus.query("steersman_requests_total")}
    assert methods == EVERY_METHOD.keys()
    models = {series["metric"]["model"] for series in prometheus.query("steersman_auxiliary_tokens_total")}
    assert {"first", "second", "every", "expert", "text"} <= models


def test_no_alert_is_broken(prometheus: Prometheus) -> None:
    groups = httpx.get(f"{prometheus.url}/api/v1/rules", timeout=60).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {alert.name for alert in ALERTS}
    assert not [rule for rule in rules if rule["health"] == "err"]


def _has_number(prometheus: Prometheus, expr: str) -> bool:
    return any(math.isfinite(float(series["value"][1])) for series in prometheus.query(expr))


def _answers(prometheus: Prometheus) -> float:
    (found,) = prometheus.query("sum(steersman_answers_total) or vector(-1)")
    return float(found["value"][1])


async def _send_mixed(server: Server) -> None:
    """Every method, a plain request, one that fails and one that is refused."""
    rng = random.Random()
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:

        async def ask(guidance: dict[str, Any] | None, prompt: list[int]) -> int:
            body = {"model": "base", "prompt": prompt, "max_tokens": 12, "ignore_eos": True, "guidance": guidance}
            return (await client.post("/v1/completions", json=body)).status_code

        prompts = random_prompts(rng, len(EVERY_METHOD) + 1, 5, 40)
        asked = zip((None, *EVERY_METHOD.values()), prompts, strict=True)
        assert set(await asyncio.gather(*(ask(guidance, prompt) for guidance, prompt in asked))) == {200}
        assert await ask({**PARGS, "reward_model": "broken"}, [POISON]) == 500
        assert await ask({"method": "none"}, [1]) == 400
