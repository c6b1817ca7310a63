"""What `/metrics` says is what the reports say, added up; and nothing that a client sends becomes a label."""

import asyncio
import random
import string
from typing import Any

import httpx
import pytest

from steersman.guidance.request import METHODS
from tests.conftest import POISON
from tests.server.polling import wait_until
from tests.support.metrics import Series, growth, read_metrics, total
from tests.support.random_input import random_prompts
from tests.support.server import Server

PARGS = {"method": "pargs", "reward_model": "first", "beta": 1.5, "top_k": 6}
MIXED = {"method": "mixed", "policy": "expert", "mix": 0.5}
EVERY_METHOD: dict[str, dict[str, Any]] = {
    "pargs": {**PARGS, "gate": {"first_tokens": 6}},
    "args": {**PARGS, "method": "args", "rewards": [{"model": "second"}, {"model": "every", "weight": 0.5}]},
    "mixed": MIXED,
    "length_control": {"method": "length_control", "policy": "other", "length": 5},
    "kl_threshold": {"method": "kl_threshold", "policy": "expert", "threshold": 0.5},
    "product": {"method": "product", "policies": {"base": 1.0, "expert": 0.5, "other": -0.3}},
    "best_of_n": {"method": "best_of_n", "reward_model": "first", "n": 3},
    "blockwise": {"method": "blockwise", "reward_model": "first", "n": 2, "block": 4},
}
EVERY_METHOD["args"].pop("reward_model")
SUMMED = {
    "steersman_generated_tokens_total": "tokens",
    "steersman_guided_tokens_total": "guided_tokens",
    "steersman_interventions_total": "interventions",
    "steersman_switches_total": "switches",
}


def test_the_methods_above_are_all_there_are() -> None:
    assert EVERY_METHOD.keys() == METHODS.keys()


def test_counters_are_the_sums_of_reports(server: Server, rng: random.Random) -> None:
    before, reports = read_metrics(server), _ask_every_method(server, rng)
    grown = growth(before, _settled(server))
    for method, report in reports.items():
        for metric, field in SUMMED.items():
            assert total(grown, metric, method=method) == report[field]
        for kind in ("reward_model", "policy"):
            saved = total(grown, "steersman_saved_tokens_total", method=method, kind=kind)
            assert saved == report[f"saved_{kind}_tokens"]
        for source, tokens in report["sources"].items():
            assert total(grown, "steersman_source_tokens_total", method=method, source=source) == tokens
        assert total(grown, "steersman_source_tokens_total", method=method) == report["tokens"]
        assert total(grown, "steersman_requests_total", method=method, outcome="finished") == 1
        assert total(grown, "steersman_requests_total", method=method) == 1
        assert total(grown, "steersman_request_kl_nats_count", method=method) == 1
        expected = pytest.approx(max(0.0, report["kl"]), abs=1e-6)
        assert total(grown, "steersman_request_kl_nats_sum", method=method) == expected
        steered = pytest.approx(max(0.0, report["kl_steering"]), abs=1e-6)
        assert total(grown, "steersman_request_kl_steering_nats_sum", method=method) == steered
    rewards = [(name, value) for report in reports.values() for name, value in report["rewards"].items()]
    for model in {name for name, _ in rewards}:
        given = [value for name, value in rewards if name == model and value is not None]
        assert total(grown, "steersman_final_reward_count", model=model) == len(given)
        for sign, part in (("positive", max), ("negative", min)):
            magnitude = abs(sum(part(value, 0.0) for value in given))
            found = total(grown, "steersman_final_reward_magnitude_total", model=model, sign=sign)
            assert found == pytest.approx(magnitude, abs=1e-6)


def test_the_worker_counts_every_token_that_a_model_reads_and_no_block_stays_in_use(
    server: Server, rng: random.Random
) -> None:
    before, reports = read_metrics(server), _ask_every_method(server, rng)
    grown = growth(before, after := _settled(server))
    searched = sum(r["reward_model_tokens"] for method, r in reports.items() if method in ("best_of_n", "blockwise"))
    read = sum(report["reward_model_tokens"] + report["policy_tokens"] for report in reports.values())
    assert total(grown, "steersman_auxiliary_tokens_total", phase="score") == searched
    assert total(grown, "steersman_auxiliary_tokens_total") == read
    assert total(grown, "steersman_auxiliary_tokens_total", model="other", phase="prompt") > 0
    steps = total(grown, "steersman_step_seconds_count", stage="total")
    assert steps == total(grown, "steersman_step_rows_count")
    assert steps >= max(r["tokens"] for method, r in reports.items() if method not in ("best_of_n", "blockwise"))
    stages = [total(grown, "steersman_step_seconds_sum", stage=s) for s in ("candidates", "rewards", "policies")]
    whole = total(grown, "steersman_step_seconds_sum", stage="total")
    assert 0 < sum(stages) <= whole
    assert total(after, "steersman_cache_blocks", model="first") > 0
    for metric in ("steersman_cache_blocks_in_use", "steersman_cache_blocks_reserved", "steersman_running_requests"):
        assert total(after, metric) == 0


def test_vllm_s_own_metrics_and_the_process_s_are_beside_them(server: Server, rng: random.Random) -> None:
    before, reports = read_metrics(server), _ask_every_method(server, rng)
    grown = growth(before, after := _settled(server))
    sampled = sum(report.get("generated_tokens", report["tokens"]) for report in reports.values())
    assert total(grown, "vllm:generation_tokens_total") == sampled
    assert total(after, "process_resident_memory_bytes") > 0
    assert total(after, "process_open_fds") > 0


@pytest.mark.parametrize(
    ("guidance", "reason"),
    [
        ({**PARGS, "beta": -1}, "guidance"),
        ({**PARGS, "reward_model": "nobody"}, "model_not_loaded"),
        ({**PARGS, "reward_model": "narrow"}, "too_long"),
        ({"method": "best_of_n", "reward_model": "first", "n": 2}, "unsupported"),
    ],
)
def test_a_refusal_is_counted_once_by_its_reason(server: Server, guidance: dict[str, Any], reason: str) -> None:
    before = read_metrics(server)
    body = {"model": "base", "prompt": list(range(10, 80)), "max_tokens": 9, "temperature": 0, "guidance": guidance}
    assert server.post("/v1/completions", body).status_code == 400
    grown = growth(before, read_metrics(server))
    assert total(grown, "steersman_refusals_total", reason=reason) == 1
    assert total(grown, "steersman_refusals_total") == 1
    assert total(grown, "steersman_requests_total") == 0


def test_a_model_that_spoils_a_request_is_counted_by_name(server: Server) -> None:
    before = read_metrics(server)
    body = {"model": "base", "prompt": [7, POISON, 9], "max_tokens": 9, "guidance": {**PARGS, "reward_model": "broken"}}
    assert server.post("/v1/completions", body).status_code == 500
    grown = growth(before, _settled(server))
    assert total(grown, "steersman_model_failures_total", model="broken", reason="not_finite") == 1
    assert total(grown, "steersman_errors_total", reason="guidance") == 1
    assert total(grown, "steersman_requests_total", method="pargs", outcome="failed") == 1


def test_a_client_that_goes_is_counted_as_cancelled(server: Server, rng: random.Random) -> None:
    before = read_metrics(server)
    prompt = random_prompts(rng, 1, 5, 20)[0]
    fields: dict[str, Any] = {"model": "base", "max_tokens": 200, "stream": True, "extra_body": {"guidance": MIXED}}
    with server.client.completions.create(prompt=prompt, **fields) as stream:
        next(iter(stream))
        assert total(read_metrics(server), "steersman_running_requests") == 1
    grown = growth(before, _settled(server))
    assert total(grown, "steersman_requests_total", method="mixed", outcome="cancelled") == 1
    assert total(grown, "steersman_answers_total", method="mixed") == 0


def test_a_thousand_requests_with_hostile_names_add_no_series(server: Server, rng: random.Random) -> None:
    _ask_every_method(server, rng)
    asyncio.run(_send_hostile(server, rng, 50))
    before = read_metrics(server)
    asyncio.run(_send_hostile(server, rng, 1000))
    after = _settled(server)
    assert after.keys() - before.keys() == set()
    assert total(growth(before, after), "steersman_refusals_total") > 500


def test_vllm_s_names_keep_their_colons_whatever_format_a_scraper_prefers(server: Server) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0, text/plain; version=0.0.4; q=0.5"}
    answer = httpx.get(f"{server.url}/metrics", timeout=60, headers=accept)
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "\nvllm:generation_tokens_total{" in answer.text


def _ask_every_method(server: Server, rng: random.Random) -> dict[str, dict[str, Any]]:
    reports = {}
    for method, guidance in EVERY_METHOD.items():
        prompt = random_prompts(rng, 1, 5, 40)[0]
        answer = server.complete(prompt, guidance, max_tokens=rng.randint(7, 12), ignore_eos=True)
        reports[method] = answer["choices"][0]["guidance"]
    return reports


def _settled(server: Server) -> Series:
    """Once nothing runs: what ends last is counted a moment after the client has its answer."""

    def idle() -> bool:
        found = read_metrics(server)
        names = ("steersman_running_requests", "steersman_cache_blocks_in_use", "vllm:num_requests_running")
        return not any(total(found, name) for name in names)

    wait_until(idle, "no request runs")
    return read_metrics(server)


async def _send_hostile(server: Server, rng: random.Random, count: int) -> None:
    def word() -> str:
        return "".join(rng.choices(string.printable + 'é漢\u0000\u202e{}"\\', k=rng.randint(1, 60)))

    def body(number: int) -> dict[str, Any]:
        shapes = (
            {"guidance": {**PARGS, "reward_model": word()}},
            {"guidance": {**MIXED, "policy": word()}},
            {"guidance": {**PARGS, word(): 1}},
            {"guidance": {"method": word()}},
            {"guidance": word()},
            {"model": f"base:{word()}"},
            {"guidance": PARGS, "user": word(), "max_tokens": 1},
        )
        return {"model": "base", "prompt": "x", **shapes[number % len(shapes)]}

    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        turns = asyncio.Semaphore(16)

        async def send(number: int) -> None:
            async with turns:
                name = "".join(rng.choices(string.ascii_letters, k=12))
                await client.post("/v1/completions", json=body(number), headers={"X-Request-Id": name})
                if number % 10 == 0:
                    await client.get(f"/v1/{name}")

        await asyncio.gather(*(send(number) for number in range(count)))
