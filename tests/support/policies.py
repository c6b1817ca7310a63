"""Trainers of policies over rows of random token ids, and log-probabilities one response at a time, in float64."""

import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer

from steersman.training.data.preferences import TokenizedPreference
from steersman.training.data.segments import SegmentedResponse
from steersman.training.dpo import METHODS
from steersman.training.policies.arguments import MethodName
from tests.support.training import VOCABULARY

EOS = 1


def draw_rows(rng: random.Random, count: int, aspects: int = 0) -> list[TokenizedPreference]:
    """Pairs of any lengths; with `aspects` each response is cut into segments, scored from 0 to 4 on that many."""

    def ids(longest: int) -> list[int]:
        return [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, longest))]

    def segments(response: list[int]) -> SegmentedResponse | None:
        inner = rng.sample(range(1, len(response)), min(len(response) - 1, rng.randrange(5)))
        ends = [*sorted(inner), len(response)]
        return SegmentedResponse(ends, [[rng.randint(0, 4) for _ in range(aspects)] for _ in ends]) if aspects else None

    rows = []
    for _ in range(count):
        chosen, rejected = [*ids(30), EOS], [*ids(30), EOS]
        sides = {"chosen_segments": segments(chosen), "rejected_segments": segments(rejected)}
        rows.append(TokenizedPreference(ids(12), chosen, rejected, **sides))
    return rows


def begin(response: list[int], keep: float) -> list[int]:
    """A share of a response's tokens, from its start, rounded up."""
    return response[: math.ceil(Fraction(str(keep)) * len(response))]


def make_trainer(
    folder: Path,
    method: MethodName,
    rows: list[TokenizedPreference],
    padding: bool = True,
    lora: LoraConfig | None = None,
    **keys: Any,
) -> Trainer:
    """A method's trainer, which reads the rows in their order as one batch unless `keys` say otherwise.

    padding: whether the tokenizer has a padding token.
    """
    settings: dict[str, Any] = {
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"},
        **{
            "per_device_train_batch_size": len(rows) * (2 if method == "kto" else 1),
            "train_sampling_strategy": "sequential",
            "beta": 0.3,
        },
    }
    config = METHODS[method].config(str(folder / "out"), **settings | keys)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if not padding:
        tokenizer.pad_token = None
    return METHODS[method].make_trainer(config, model, tokenizer, rows, lora)


def compute_loss(trainer: Trainer, batch: Any) -> float:
    """Of a batch, which is not changed."""
    return float(trainer.compute_loss(trainer.model.train(), dict(batch)).item())


def step_away(trainer: Trainer, folder: Path) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Moves the trained weights at random; the policy and what it started from in float64."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float64") for _ in range(2))
    policy.load_state_dict(trainer.model.state_dict())
    return policy, reference


def distributions(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log π(· | x, y_<t) before every token of a response, [T, V] float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    assert logits.dtype == torch.float64
    before = logits[len(prompt) - 1 : -1]
    return before - before.exp().sum(dim=1, keepdim=True).log()


def token_logprobs(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> list[float]:
    """log π(y_t | x, y_<t) of every token of a response."""
    return [float(line[token]) for line, token in zip(distributions(model, prompt, response), response, strict=True)]


def log_ratios(
    policy: LlamaForCausalLM, reference: LlamaForCausalLM, prompt: list[int], response: list[int]
) -> list[float]:
    """log π/π_ref of every token of a response."""
    both = (token_logprobs(model, prompt, response) for model in (policy, reference))
    return [own - other for own, other in zip(*both, strict=True)]


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))
