"""What the built world is measured by: how well the models write, and what the reward models know of prefixes."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from steersman.training.accuracy import accuracy_by_share, score_last_tokens
from steersman.training.checkpoints import read_facts
from steersman.training.data import Preference, TokenizedPreference, tokenize
from steersman.training.implicit_reward import implicit_accuracy
from steersman.training.world import gold
from steersman.training.world.grammar import NAMES, Prompt
from steersman.training.world.pairs import by_gold
from steersman.training.world.sampling import sample
from steersman.training.world.tokenizer import WINDOW


def measure_writing(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], seed: int
) -> dict[str, float]:
    """Of samples at temperature 1: copying of item and name (of the responses that name one), ends, gold reward."""
    name = Path(model.name_or_path).name
    sampled = sample(model, tokenizer, [prompt.text for prompt in prompts], seed, f"{name}: measured")
    responses = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sampled]
    pairs = list(zip(prompts, responses, strict=True))
    items = [set(gold.items_in(text)) == {prompt.item} for prompt, text in pairs if gold.items_in(text)]
    names = [set(names_in(text)) == {prompt.name} for prompt, text in pairs if names_in(text)]
    totals = [gold.score(prompt.text, text).total for prompt, text in pairs]
    return {
        "samples": len(pairs),
        "item_copied": _mean(items),
        "name_copied": _mean(names),
        "finished": _mean([ids[-1] == tokenizer.eos_token_id for ids in sampled]),
        "gold_mean": _mean(totals),
        "gold_deviation": round(statistics.pstdev(totals), 4),
    }


def measure_reward(
    folder: Path, tokenizer: PreTrainedTokenizerFast, test_pairs: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Accuracy against gold order (no label noise) by share of the longer response."""
    rows = _in_gold_order(test_pairs, tokenizer)
    if read_facts(folder)["kind"] == "vocabulary":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        return accuracy_by_share(model, rows, score_last_tokens)
    return accuracy_by_share(AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32"), rows)


def measure_policy(
    folder: Path,
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    test_pairs: Sequence[dict[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """How it writes alone, at temperature 1, and its implicit reward's `accuracy` against gold order by share."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    writing = measure_writing(policy, tokenizer, prompts, seed)
    return writing | {"accuracy": measure_implicit_reward(folder, base, tokenizer, test_pairs)}


def measure_implicit_reward(
    folder: Path, base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, test_pairs: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Of a policy: accuracy against gold order (no label noise) by share of the longer response."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return implicit_accuracy(policy, base, _in_gold_order(test_pairs, tokenizer), read_facts(folder)["beta"], batch=64)


def _in_gold_order(
    test_pairs: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> list[TokenizedPreference]:
    rows = [Preference(row["prompt"], row["chosen"], row["rejected"], "test pairs") for row in by_gold(test_pairs)]
    return [tokenize(row, tokenizer, WINDOW) for row in rows]


def names_in(text: str) -> list[str]:
    return re.findall(rf"\b(?:{'|'.join(NAMES)})\b", text)


def _mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), 4)
