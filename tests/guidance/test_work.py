"""What is read, counted at the models themselves: never a token that is not needed."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance.generate import load_runtime
from steersman.guidance.report import Report
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from tests.support.oracle import plan_of
from tests.support.random_input import random_prompts
from tests.support.tiny import VOCABULARY

LENGTH = 12
REWARDS = {"method": "pargs", "reward_model": "first", "top_k": 6}


@pytest.fixture(scope="module")
def runtime(models: Path) -> GuidanceRuntime:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    policies = {name: str(models / name) for name in ("expert", "other")}
    return load_runtime(tokenizer, {"first": str(models / "first")}, policies, cache_bytes=2**22)


@pytest.fixture
def prompt() -> list[int]:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random_prompts(random.Random(seed), 1, shortest=5, longest=40)[0]


def test_a_policy_reads_one_token_for_each_generated_token_and_the_prompt_once(
    runtime: GuidanceRuntime, prompt: list[int]
) -> None:
    report, read = _decode(runtime, prompt, {"method": "mixed", "policy": "expert", "mix": 0.5})
    assert read == {"expert": len(prompt) + LENGTH - 1, "other": 0, "first": 0}
    assert (report.policy_tokens, report.saved_policy_tokens) == (read["expert"], 0)


def test_each_policy_of_a_product_reads_as_much(runtime: GuidanceRuntime, prompt: list[int]) -> None:
    report, read = _decode(runtime, prompt, {"method": "product", "policies": {"expert": 1.0, "other": -0.3}})
    assert read == {"expert": len(prompt) + LENGTH - 1, "other": len(prompt) + LENGTH - 1, "first": 0}
    assert report.policy_tokens == 2 * (len(prompt) + LENGTH - 1)


@pytest.mark.parametrize("first", [1, 5, LENGTH + 9])
def test_nothing_is_read_behind_a_gate_on_the_position(runtime: GuidanceRuntime, prompt: list[int], first: int) -> None:
    opened = min(first, LENGTH)
    report, read = _decode(runtime, prompt, {"method": "length_control", "policy": "expert", "length": first})
    assert read["expert"] == report.policy_tokens == len(prompt) + opened - 1
    assert report.saved_policy_tokens == LENGTH - opened
    report, read = _decode(runtime, prompt, {**REWARDS, "gate": {"first_tokens": first}})
    assert read["first"] == report.reward_model_tokens == len(prompt) - 1 + 7 * opened
    assert report.saved_reward_model_tokens == 7 * (LENGTH - opened)
    assert report.guided_tokens == opened


def test_tokens_skipped_behind_an_entropy_gate_are_caught_up_in_one_chunk(
    runtime: GuidanceRuntime, prompt: list[int]
) -> None:
    certain, uncertain = {2, 3, 4, 7}, {0, 1, 5, 6}
    wanted = {**REWARDS, "policies": {"base": 0.5, "expert": 0.5}, "gate": {"entropy_above": 2.0}}
    report, read = _decode(runtime, prompt, wanted, length=8, certain=certain, forwards=(forwards := {}))
    # The prompt, then a token a step; before position 5 the three that were skipped, together.
    assert report.guided_tokens == len(uncertain)
    assert read["expert"] == report.policy_tokens == len(prompt) - 1 + len(uncertain) + 3
    assert read["first"] == report.reward_model_tokens == len(prompt) - 1 + 7 * len(uncertain) + 3
    assert report.saved_policy_tokens == len(certain) - 3
    assert report.saved_reward_model_tokens == 7 * len(certain) - 3
    # A forward for the prompt, one for the chunk that was skipped, and one for every open position.
    assert forwards["expert"] == forwards["first"] == 2 + len(uncertain)


def test_a_kl_gate_reads_its_policy_at_every_position_and_spares_the_reward_model(
    runtime: GuidanceRuntime, prompt: list[int]
) -> None:
    closed = {**REWARDS, "gate": {"kl_above": 1000.0, "policy": "expert"}}
    report, read = _decode(runtime, prompt, closed)
    assert read == {"expert": len(prompt) + LENGTH - 1, "other": 0, "first": 0}
    assert (report.guided_tokens, report.saved_reward_model_tokens) == (0, 7 * LENGTH)


def test_a_policy_that_gate_and_formula_share_is_read_once(runtime: GuidanceRuntime, prompt: list[int]) -> None:
    guidance = {"method": "kl_threshold", "policy": "expert", "threshold": 0.0}
    report, read = _decode(runtime, prompt, guidance)
    assert read["expert"] == report.policy_tokens == len(prompt) + LENGTH - 1


def test_all_rows_of_one_policy_are_read_in_one_forward(runtime: GuidanceRuntime, prompt: list[int]) -> None:
    kinds: list[dict[str, Any]] = [
        {"method": "mixed", "policy": "expert", "mix": 0.3},
        {"method": "length_control", "policy": "expert", "length": 9},
        {"method": "kl_threshold", "policy": "expert", "threshold": 0.5},
        {**REWARDS, "policies": {"base": 1.0, "expert": -0.2}},
        {**REWARDS, "gate": {"kl_above": 0.1, "policy": "expert"}},
    ]
    rows = [Row(n, runtime.start(n, plan_of(kinds[n % 5]), len(prompt)), [*prompt[:-1], n + 3], []) for n in range(20)]
    runtime.step(torch.randn(20, VOCABULARY), rows)
    for row in rows:
        row.output = [5]
    with _counting(runtime) as (_, forwards):
        runtime.step(torch.randn(20, VOCABULARY), rows)
    assert forwards == {"expert": 1, "other": 0, "first": 1}
    for row in rows:
        runtime.finish(row.request.key, [5])


def _decode(
    runtime: GuidanceRuntime,
    prompt: list[int],
    guidance: dict[str, Any],
    length: int = LENGTH,
    certain: frozenset[int] | set[int] = frozenset(),
    forwards: dict[str, int] | None = None,
) -> tuple[Report, dict[str, int]]:
    """A random answer of a prompt that no cache knows, and the tokens that each model really read."""
    for model in (*runtime.reward_models.values(), *runtime.policies.values()):
        model.model.cache._children.clear()  # type: ignore[attr-defined]
    request = runtime.start("counted", plan_of(guidance), len(prompt))
    row, output = Row(0, request, prompt, []), []
    with _counting(runtime) as (tokens, calls):
        for n in range(length):
            row.output = list(output)
            logits = torch.randn(1, VOCABULARY)
            if n in certain:
                logits[0, 7] = 50.0
            runtime.step(logits, [row])
            output.append(int(torch.multinomial(logits.softmax(-1), 1)))
    report = runtime.finish("counted", output)
    assert report is not None
    if forwards is not None:
        forwards.update(calls)
    return report, tokens


@contextmanager
def _counting(runtime: GuidanceRuntime) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Tokens and forwards by model, seen where they are embedded."""
    models = {**runtime.reward_models, **runtime.policies}
    tokens, forwards = dict.fromkeys(models, 0), dict.fromkeys(models, 0)

    def hook(name: str) -> Any:
        def count(_module: Any, inputs: tuple[torch.Tensor]) -> None:
            tokens[name] += inputs[0].numel()
            forwards[name] += 1

        return count

    handles = [
        model.model.body.get_input_embeddings().register_forward_pre_hook(hook(name))  # type: ignore[attr-defined]
        for name, model in models.items()
    ]
    try:
        yield tokens, forwards
    finally:
        for handle in handles:
            handle.remove()
