"""Open-loop traffic by vLLM's own load generator: requests arrive at a rate, whether or not others are answered."""

import contextlib
import io
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

PLAIN = "plain"


@dataclass(frozen=True)
class Arm:
    """One kind of traffic: kinds of requests in turn, each with its guidance."""

    name: str
    kinds: tuple[tuple[str, Mapping[str, Any] | None], ...]


@dataclass(frozen=True)
class Traffic:
    """How much is sent, and of what."""

    url: str
    model: str
    prompts: Sequence[str]
    max_tokens: int
    seconds: float
    """For which requests arrive."""
    concurrency: int
    """The most at once; what arrives beyond it waits at the client."""


@dataclass(frozen=True)
class Sent:
    """One request as its client saw it. Times are seconds."""

    kind: str
    prompt: str
    text: str
    tokens: int
    first_token: float
    gaps: tuple[float, ...]
    """Between chunks."""
    whole: float
    error: str

    @property
    def per_token(self) -> float:
        """Time per output token behind the first."""
        return (self.whole - self.first_token) / max(1, self.tokens - 1)


@dataclass
class Measured:
    """An arm at a rate."""

    arm: str
    rate: float
    """Requests a second; infinite: as many as may be at once."""
    seconds: float = 0.0
    sent: list[Sent] = field(default_factory=list)
    kl: dict[str, float] = field(default_factory=dict)
    """By method, the mean of what the server observed, nats."""


async def send(traffic: Traffic, arm: Arm, rate: float) -> Measured:
    """Sends one arm's requests and waits for all of them."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    count = math.ceil(traffic.seconds * rate) if math.isfinite(rate) else 6 * traffic.concurrency
    start = random.randrange(len(traffic.prompts))
    prompts = list(itertools.islice(itertools.cycle(traffic.prompts), start, start + count))
    kinds = list(itertools.islice(itertools.cycle(arm.kinds), count))
    requests = [
        SampleRequest(
            prompt=prompt,
            prompt_len=0,
            expected_output_len=traffic.max_tokens,
            request_overrides=None if guidance is None else {"guidance": dict(guidance)},
        )
        for prompt, (_, guidance) in zip(prompts, kinds, strict=True)
    ]
    before = _observed_kl(traffic.url)
    with contextlib.redirect_stdout(io.StringIO()):
        result = await benchmark(
            **{"task_type": TaskType.GENERATION, "endpoint_type": "openai", "base_url": traffic.url},
            **{"api_url": f"{traffic.url}/v1/completions", "model_id": traffic.model, "model_name": traffic.model},
            **{"tokenizer": None, "input_requests": requests, "logprobs": None, "request_rate": rate},
            **{"burstiness": 1.0, "disable_tqdm": True, "num_warmups": 0, "profile": False},
            **{"selected_percentile_metrics": [], "selected_percentiles": [50.0], "ignore_eos": False},
            **{"goodput_config_dict": {}, "max_concurrency": traffic.concurrency, "lora_modules": None},
            **{"extra_headers": None, "extra_body": {"temperature": 1.0}, "ready_check_timeout_sec": 0},
        )
    columns = ("generated_texts", "output_lens", "ttfts", "itls", "latencies", "errors")
    sent = [
        Sent(kind, prompt, text, tokens, first, tuple(gaps), whole, error)
        for (kind, _), prompt, text, tokens, first, gaps, whole, error in zip(
            kinds, prompts, *(result[name] for name in columns), strict=True
        )
    ]
    return Measured(arm.name, rate, result["duration"], sent, _mean_growth(before, _observed_kl(traffic.url)))


def _observed_kl(url: str) -> dict[str, tuple[float, float]]:
    """Method → sum and count of the server's histogram."""
    text = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text
    found = {
        (sample.name.rpartition("_")[2], sample.labels["method"]): sample.value
        for family in text_string_to_metric_families(text)
        if family.name == "steersman_request_kl_nats"
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }
    return {method: (value, found["count", method]) for (part, method), value in found.items() if part == "sum"}


def _mean_growth(
    before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    grown = {method: (after[method][0] - total, after[method][1] - count) for method, (total, count) in before.items()}
    return {method: total / count for method, (total, count) in grown.items() if count}
