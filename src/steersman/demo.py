"""`steersman demo`: serves the bundled demo models and shows one prompt answered without and with guidance."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from steersman.processes import running
from steersman.server.cpu import SMALL

WORLD = Path(__file__).parent / "training" / "world"
MODELS = WORLD / "models"
REWARD_MODELS = {
    **{"instant": "reward-head", "helpful": "reward-partial", "swift": "reward-vocabulary"},
    **{"full": "reward-full", "judge": "reward-evaluation"},
}
"""Names under which the demo serves its reward models; `instant` is a head on the base model, `swift` has a vocabulary
head, `judge` is trained apart and steers nothing."""
POLICIES = {"dpo": "dpo", "dpo-head": "dpo-head"}
PRESETS = WORLD / "presets.yaml"

_START_LIMIT_S = 300
_GUIDANCE = {"method": "pargs", "reward_model": "instant", "beta": 3.0, "top_k": 10}
_PROMPT, _SEED = 7, 1


def main(argv: Sequence[str]) -> int:
    """Serves on --port (8000) until interrupted; with ONCE=1 in the environment it stops after printing."""
    parser = argparse.ArgumentParser(prog="steersman demo", description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    args, serve_flags = parser.parse_known_args(list(argv))
    console = Console()
    with serving(args.port, serve_flags, console) as (process, url):
        show(url, console)
        if os.environ.get("ONCE") == "1":
            return 0
        console.print(f"Serving on {url}: point any OpenAI client at {url}/v1. Ctrl-C stops it.")
        try:
            return process.wait()
        except KeyboardInterrupt:
            return 0


def demo_flags(port: int) -> list[str]:
    """Arguments of `steersman serve` for the bundled models."""
    rewards = [
        flag for name, folder in REWARD_MODELS.items() for flag in ("--reward-model", f"{name}={MODELS / folder}")
    ]
    policies = [flag for name, folder in POLICIES.items() for flag in ("--policy", f"{name}={MODELS / folder}")]
    return [
        *(str(MODELS / "base"), "--served-model-name", "demo", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "1024", "--max-num-seqs", "64", "--guidance-cache", "0.25", "--port", str(port)),
        *("--guidance-presets", str(PRESETS)),
        *rewards,
        *policies,
    ]


def demo_environment() -> dict[str, str]:
    """One thread, which is fastest for models this small, a small cache, nothing looked up elsewhere."""
    return {**SMALL, "VLLM_LOGGING_LEVEL": "WARNING", **os.environ}


@contextmanager
def serving(port: int, flags: Sequence[str], console: Console) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The demo server in a process of its own: the process and its address once it answers."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "steersman.cli", "serve", *demo_flags(port), *flags]
        streams: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT}
        with running(command, env=demo_environment(), **streams) as process:
            with console.status("starting vLLM with the demo models (about half a minute)"):
                _wait_until_ready(process, url, log)
            yield process, url


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Any) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    log.seek(0)
    text = log.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.startswith("steersman: ")] or text.splitlines()[-20:]
    raise SystemExit("\n".join(["the demo server did not start:", *lines]))


def show(url: str, console: Console) -> None:
    """Prints one prompt's answers side by side."""
    from steersman.training.world import gold

    prompt = _demo_prompt()
    table = Table(title=prompt.replace("\nAgent:", ""), title_justify="left", show_lines=True)
    for heading in ("", "frozen base model", "the same, steered"):
        table.add_column(heading, ratio=None if not heading else 1)
    choices = [_answer(url, prompt, None), _answer(url, prompt, _GUIDANCE)]
    answers = [choice["text"] for choice in choices]
    table.add_row("answer", *(answer.strip() for answer in answers))
    table.add_row("gold reward (at most 3.5)", *(f"{gold.score(prompt, answer).total:.2f}" for answer in answers))
    for name, meaning in (("instant", "reward model that steers"), ("judge", "independent reward model")):
        table.add_row(meaning, *(_reward(url, name, prompt, answer) for answer in answers))
    table.add_row("tokens that steering changed", "0", str(choices[1]["guidance"]["interventions"]))
    console.print(table)
    body = {"model": "demo", "prompt": prompt, "guidance": _GUIDANCE}
    console.print(
        f"curl {url}/v1/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'", soft_wrap=True
    )


def _demo_prompt() -> str:
    rows = (WORLD / "prompts" / "tuning.jsonl").read_text(encoding="utf-8").splitlines()
    return str(json.loads(rows[_PROMPT])["prompt"])


def _answer(url: str, prompt: str, guidance: dict[str, Any] | None) -> dict[str, Any]:
    """A sampled answer, plain or guided: the response's choice."""
    body: dict[str, Any] = {"model": "demo", "prompt": prompt, "max_tokens": 200, "seed": _SEED}
    if guidance is not None:
        body["guidance"] = guidance
    return dict(_post(f"{url}/v1/completions", body)["choices"][0])


def _reward(url: str, model: str, prompt: str, answer: str) -> str:
    body = {"model": model, "prompt": prompt, "responses": [answer]}
    return f"{_post(f'{url}/v1/rewards', body)['data'][0]['reward']:.2f}"


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(url, json=body, timeout=120)
    response.raise_for_status()
    return dict(response.json())
