"""What a client does to logits acts on the guided distribution as on a plain one, once, whatever the coefficients."""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.support.oracle import NEAR_TIE, Oracle
from tests.support.random_input import random_prompts
from tests.support.server import Server
from tests.support.tiny import END, VOCABULARY
from tests.support.traffic import Asked, ask, gather_limited

METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "pargs": {"method": "pargs", "reward_model": "first", "beta": 2.0, "top_k": 8},
    "pargs over a policy": {
        "method": "pargs", "reward_model": "every", "beta": 1.0, "top_k": 6, "policies": {"base": -0.5, "expert": 1.5},
    },
    "an affine reward": {
        "method": "pargs", "top_k": 8, "beta": 2.0,
        "rewards": [{"model": "first", "transform": "affine", "scale": 1.0, "shift": 500.0}],
    },
    "mixed 1": {"method": "mixed", "policy": "expert", "mix": 1.0},
    "mixed 1.5": {"method": "mixed", "policy": "expert", "mix": 1.5},
    "length control": {"method": "length_control", "policy": "expert", "length": 6},
    "threshold": {"method": "kl_threshold", "policy": "expert", "threshold": 0.0},
    "one policy": {"method": "product", "policies": {"expert": 1.0}},
    "a product": {"method": "product", "policies": {"base": -1.0, "expert": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_greedy_answers_are_the_references_under_biases_bans_and_penalties(
    interface: Server, oracle: Oracle, rng: random.Random, method: str
) -> None:
    guidance = METHODS[method]
    asked = [Asked(p, guidance, 10, {"temperature": 0, **_fields(rng)}) for p in random_prompts(rng, 8, longest=30)]
    client = interface.async_client
    answers = asyncio.run(gather_limited(8, [ask(client, one) for one in asked]))
    for one, (answer, *_) in zip(asked, answers, strict=True):
        _assert_greedy(oracle, one, answer.tokens)


def test_a_token_that_is_banned_is_never_drawn_and_one_with_a_large_bias_always(
    interface: Server, rng: random.Random
) -> None:
    for guidance in METHODS.values():
        prompt = random_prompts(rng, 1, longest=20)[0]
        first = _draw(interface, prompt, guidance, {})
        assert _draw(interface, prompt, guidance, {"logit_bias": {str(first): -100}}) != first
        wanted = rng.randrange(4, VOCABULARY)
        assert _draw(interface, prompt, guidance, {"logit_bias": {str(wanted): 100}}) == wanted


def test_the_report_looks_at_the_models_own_distributions(interface: Server, rng: random.Random) -> None:
    """A ban of nearly all tokens changes no KL."""
    prompt = random_prompts(rng, 1, longest=20)[0]
    guidance = {"method": "mixed", "policy": "expert", "mix": 1.0}
    free = _complete(interface, prompt, guidance, {"max_tokens": 1})
    held = _complete(interface, prompt, guidance, {"max_tokens": 1, "allowed_token_ids": [*free["token_ids"], END]})
    assert held["token_ids"] == free["token_ids"]
    assert held["guidance"]["kl"] == pytest.approx(free["guidance"]["kl"], abs=1e-4)


def test_gates_look_at_the_models_own_distributions_under_a_grammar(
    server: Server, oracle: Oracle, models: Path, rng: random.Random
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    digits = [token for token in range(2, VOCABULARY) if re.fullmatch("[0-9]{1,3}", tokenizer.decode([token]))]
    grammar = {"structured_outputs": {"regex": "[0-9]{3}"}, "max_tokens": 1}
    for prompt in random_prompts(rng, 6, longest=20):
        base, expert = (
            model(prompt).double().log_softmax(-1) for model in (oracle.logits, oracle.models.policies["expert"])
        )
        kl = float((expert.exp() * (expert - base)).sum())
        for threshold, source in ((0.99 * kl, "expert"), (1.01 * kl, "base")):
            guidance = {"method": "mixed", "policy": "expert", "mix": 1.0, "gate": {"kl_above": threshold}}
            choice = _complete(server, prompt, guidance, grammar)
            assert choice["guidance"]["sources"] == {source: 1}
            logits = (oracle.models.policies["expert"] if source == "expert" else oracle.logits)(prompt)
            assert choice["token_ids"] == [max(digits, key=lambda token: float(logits[token]))]


def _fields(rng: random.Random) -> dict[str, Any]:
    """Two or three ways in which a client changes logits."""
    some = [str(token) for token in rng.sample(range(2, VOCABULARY), 40)]
    choices: dict[str, Any] = {
        "logit_bias": {token: rng.choice([-100, -2.5, 1.5, 4]) for token in some},
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
        "repetition_penalty": rng.uniform(0.6, 2),
        "min_tokens": rng.randint(2, 8),
        "allowed_token_ids": [END, *(int(token) for token in some)],
    }
    return {name: choices[name] for name in rng.sample(sorted(choices), rng.randint(2, 3))}


def _assert_greedy(oracle: Oracle, asked: Asked, answer: Sequence[int]) -> None:
    for position, token in enumerate(answer):
        logits = _changed(oracle, asked, list(answer[:position]))
        short = float(logits.max() - logits[token])
        assert short < NEAR_TIE * max(1.0, float(logits.max().abs())), (
            f"{asked}: token {position} of {list(answer)} is {short:.3g} nats behind {int(logits.argmax())}"
        )


def _changed(oracle: Oracle, asked: Asked, output: list[int]) -> torch.Tensor:
    """Guided logits [V] float64 after the client's changes, straight from the formula."""
    tokens = [*asked.prompt, *output]
    biased = _bias(oracle.logits(tokens).double(), asked.fields, len(output))
    guided = _bias(_guided(oracle, asked.guidance, tokens, biased, len(output)), asked.fields, len(output))
    repetition = asked.fields.get("repetition_penalty", 1.0)
    seen = list({*tokens})
    guided[seen] = torch.where(guided[seen] > 0, guided[seen] / repetition, guided[seen] * repetition)
    for token, count in Counter(output).items():
        guided[token] -= asked.fields.get("frequency_penalty", 0.0) * count + asked.fields.get("presence_penalty", 0.0)
    return guided


def _bias(logits: torch.Tensor, fields: dict[str, Any], position: int) -> torch.Tensor:
    logits = logits.clone()
    if "allowed_token_ids" in fields:
        banned = torch.ones(len(logits), dtype=torch.bool)
        banned[fields["allowed_token_ids"]] = False
        logits[banned] = -torch.inf
    if position < fields.get("min_tokens", 0):
        logits[END] = -torch.inf
    for token, bias in fields.get("logit_bias", {}).items():
        logits[int(token)] += bias
    return logits


def _guided(
    oracle: Oracle, guidance: dict[str, Any] | None, tokens: list[int], biased: torch.Tensor, position: int
) -> torch.Tensor:
    """Logits [V] of the formula: Σ c · logits, and rewards on the best of `biased` with the same log-sum-exp."""
    base = oracle.logits(tokens).double()
    if guidance is None or (guidance["method"] == "length_control" and position >= guidance["length"]):
        return base
    expert = oracle.models.policies["expert"](tokens).double()
    mix = guidance.get("mix", 1.0)
    policies = guidance.get("policies", {"base": 1.0} if "beta" in guidance else {"base": 1 - mix, "expert": mix})
    over = policies.get("base", 0.0) * base + policies.get("expert", 0.0) * expert
    if "beta" not in guidance:
        return over
    term = guidance["rewards"][0] if "rewards" in guidance else {"model": guidance["reward_model"]}
    allowed = int((biased > -torch.inf).sum())
    candidates = biased.topk(min(guidance["top_k"], allowed)).indices.tolist()
    rewards = oracle.models.rewards[term["model"]]([[*tokens, candidate] for candidate in candidates]).double()
    scores = over[candidates] + guidance["beta"] * rewards
    guided = torch.full_like(base, -torch.inf)
    guided[candidates] = scores.log_softmax(-1) + over[candidates].logsumexp(-1)
    return guided


def _draw(server: Server, prompt: list[int], guidance: dict[str, Any] | None, fields: dict[str, Any]) -> int:
    return _complete(server, prompt, guidance, {"max_tokens": 1, **fields})["token_ids"][0]


def _complete(server: Server, prompt: list[int], guidance: Any, fields: dict[str, Any]) -> dict[str, Any]:
    body = server.complete(prompt, guidance, temperature=0, return_token_ids=True, **fields)
    return body["choices"][0]
