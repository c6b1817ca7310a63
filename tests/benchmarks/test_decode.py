"""`benchmarks.decode` with tiny models in vLLM itself, and its arithmetic."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from steersman.benchmarks.decode import GUIDANCE, measure_round, summarise
from tests.support.server import test_environment as environment


def test_every_kind_of_guidance_is_decoded_and_shown(tmp_path: Path) -> None:
    shapes = [flag for kind in ("base", "causal", "vocabulary", "policy") for flag in (f"--{kind}", "tiny")]
    sizes = ["--sequences", "2", "--context", "48", "--tokens", "16", "--rounds", "1", "--memory-steps", "16"]
    command = [sys.executable, "-m", "steersman.benchmarks.decode", *shapes, *sizes]
    out = tmp_path / "decode"
    run = subprocess.run(
        [*command, "--guidance-cache", "0.05", "--out", str(out)],
        env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(out.with_suffix(".json").read_text())
    assert [row["method"] for row in found["latencies"]] == list(GUIDANCE)
    assert found["latencies"][0]["ratio"] == 1
    assert found["memory"]["after_mib"] > 0
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert all(name in out.with_suffix(".md").read_text() for name in GUIDANCE)


def test_latency_is_what_more_tokens_cost() -> None:
    def generate(method: str, sequences: int, tokens: int) -> float:
        return 5.0 + sequences * tokens * (0.002 if method == "plain" else 0.003)

    rounds = [measure_round(generate, ["plain", "mixed"], 4, 64) for _ in range(3)]
    plain, mixed = summarise(rounds, 4, {"mixed": 0.001})
    assert plain.milliseconds == pytest.approx(8)
    assert mixed.ratio == pytest.approx(1.5)
    assert mixed.tokens_per_second == pytest.approx(4 / 0.012)
    assert mixed.floor == pytest.approx(1 + 1 / 8)
    assert plain.floor is None
