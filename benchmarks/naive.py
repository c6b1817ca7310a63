"""The papers' way, for comparison: batch size one, no cache, k full reward forwards for every token (in one batch)."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from steersman.demo import MODELS, REWARD_MODELS
from steersman.guidance.reference import ReferenceModels, reference_step
from steersman.guidance.request import parse_guidance


def measure_naive(prompts: Sequence[str], guidance: dict, max_tokens: int) -> float:
    """Generated tokens per second of guided sampling with the demo models."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    base = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32).eval()
    reward = AutoModelForSequenceClassification.from_pretrained(
        MODELS / REWARD_MODELS[guidance["reward_model"]], dtype=torch.float32
    ).eval()
    parsed: Any = parse_guidance(guidance)

    def logits(tokens: Sequence[int]) -> torch.Tensor:
        return base(input_ids=torch.tensor([list(tokens)])).logits[0, -1]

    def rewards(texts: list[list[int]]) -> torch.Tensor:
        return reward(input_ids=torch.tensor(texts)).logits[:, 0]

    models = ReferenceModels(logits, tokenizer.eos_token_id, {guidance["reward_model"]: rewards})
    began, generated = time.perf_counter(), 0
    with torch.inference_mode():
        for prompt in prompts:
            tokens = tokenizer.encode(prompt)
            for _ in range(max_tokens):
                step = reference_step(tokens, parsed, models)
                tokens.append(int(torch.multinomial(step.logprobs.exp(), 1)))
                generated += 1
    return generated / (time.perf_counter() - began)
