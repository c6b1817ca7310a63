"""Other people's clients, as their users have them: the official Node client, LangChain and lm-eval."""

import itertools
import json
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.support.oracle import Oracle, load_oracle
from tests.support.server import Server
from tests.support.tiny import END

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".venv" / "clients"
OUTSIDE = Path(__file__).parent / "outside"
BLENDED = {"method": "mixed", "policy": "expert", "mix": 0.7}
"""The shared server's preset of that name."""
GUIDED = {"guidance": {"method": "pargs", "reward_model": "first", "beta": 1.5}}


def test_the_node_client_guides_streams_and_uses_presets(server: Server) -> None:
    said = json.loads(_run([CLIENTS / "bin" / "node", CLIENTS / "node" / "node_client.mjs", server.url]))
    expected = _chat(server, GUIDED)
    assert said["whole"]["text"] == said["streamed"]["text"] == said["preset"]["text"] == expected["message"]["content"]
    assert said["whole"]["report"]["method"] == said["streamed"]["report"]["method"] == "pargs"
    assert said["streamed"]["report"]["kl"] == pytest.approx(said["whole"]["report"]["kl"], abs=1e-3)
    assert said["preset"]["model"] == said["found"] == "base:steered"
    assert {"base", "base:steered", "base:blended"} <= set(said["listed"])
    assert said["misplaced"]["status"] == said["unknown"]["status"] == 400
    assert "extra_body" in said["misplaced"]["message"]
    assert "none" in said["unknown"]["message"]


def test_langchain_guides_by_extra_body_and_by_preset(server: Server) -> None:
    said = json.loads(_run([CLIENTS / "bin" / "python", OUTSIDE / "langchain_client.py", server.url]))
    guided, plain = _chat(server, GUIDED)["message"]["content"], _chat(server, {})["message"]["content"]
    assert [said["guided"], said["streamed"], said["preset"], *said["batch"]] == [guided] * 5
    assert said["plain"] == plain


def test_lm_eval_measures_the_guided_model(server: Server, models: Path, tmp_path: Path, rng: random.Random) -> None:
    words = ["kettle", "lamp", "stone", "water", "the light", "a door", "nothing"]
    questions = [
        {
            "question": question,
            "choices": [f" {word}" for word in rng.sample(words, 3)],
            "label": rng.randrange(3),
        }
        for question in rng.sample([" ".join(pair) for pair in itertools.permutations(words, 2)] + words, 6)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    for task in (OUTSIDE / "tasks").glob("*.yaml"):
        (tmp_path / task.name).write_text(task.read_text().replace("{{FOLDER}}", str(tmp_path)))
    oracle, tokenizer = load_oracle(models), AutoTokenizer.from_pretrained(models / "base")
    for model, guidance in (("base:blended", BLENDED), ("base", {**BLENDED, "mix": 0.0})):
        samples = _evaluate(server, model, models / "base", tmp_path)
        by_question = {sample["doc"]["question"]: sample for sample in samples["likelihood"]}
        for question in questions:
            sample = by_question[question["question"]]
            found = [float(values[0][0]) for values in sample["resps"]]
            expected = [_likelihood(oracle, tokenizer, guidance, question["question"], c) for c in question["choices"]]
            assert found == pytest.approx(expected, abs=1e-3), model
        for sample in samples["generation"]:
            prompt = tokenizer.encode(sample["doc"]["question"])
            answer = tokenizer.encode(sample["resps"][0][0])
            assert tokenizer.decode(_greedy(oracle, guidance, prompt, 6)).startswith(tokenizer.decode(answer))


def _run(command: Sequence[Any], **options: Any) -> str:
    assert CLIENTS.exists(), f"{CLIENTS} is missing: make {CLIENTS.relative_to(ROOT)}"
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _chat(server: Server, fields: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello there"}]
    body = {"model": "base", "messages": messages, "max_tokens": 8, "temperature": 0, "seed": 3, **fields}
    choice: dict[str, Any] = server.post("/v1/chat/completions", body).json()["choices"][0]
    return choice


def _evaluate(server: Server, model: str, tokenizer: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval's command has logged of every sample, by task."""
    out = folder / model.replace(":", "-")
    arguments = (
        f"model={model},base_url={server.url}/v1/completions,tokenizer={tokenizer},num_concurrent=4,max_retries=1"
    )
    command = [CLIENTS / "bin" / "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    tasks = ["--tasks", "likelihood", "generation", "--include_path", folder, "--output_path", out, "--log_samples"]
    _run([*command, *tasks], cwd=folder)
    logged = {}
    for task in ("likelihood", "generation"):
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        logged[task] = [json.loads(line) for line in file.read_text().splitlines()]
    return logged


def _likelihood(oracle: Oracle, tokenizer: Any, guidance: dict[str, Any], question: str, choice: str) -> float:
    """log π(choice | question), each position straight from the formula."""
    prompt = tokenizer.encode(question)
    whole = tokenizer.encode(question + choice)
    steps = oracle.replay(prompt, whole[len(prompt) :], guidance)
    return float(sum(step.logprobs[token] for step, token in zip(steps, whole[len(prompt) :], strict=True)))


def _greedy(oracle: Oracle, guidance: dict[str, Any], prompt: list[int], limit: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < limit and END not in answer:
        answer.append(int(oracle.step([*prompt, *answer], guidance, len(answer)).logprobs.argmax()))
    return answer
