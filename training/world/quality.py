"""What the built world is measured by: how well the models write, and what the reward models know of prefixes."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from steersman.guidance.head_files import POLICY, REWARD, read_head
from steersman.guidance.heads import Head
from steersman.guidance.reward_loading import load_scorer
from steersman.training.accuracy import accuracy_of
from steersman.training.checkpoints import read_facts
from steersman.training.data.preferences import Preference, TokenizedPreference, tokenize
from steersman.training.heads.guides import PolicyGuide, RewardGuide
from steersman.training.implicit_reward import implicit_accuracy
from steersman.training.prefixes import SHARES, cut, tokens_at
from steersman.training.world import gold
from steersman.training.world.grammar import NAMES, Prompt
from steersman.training.world.pairs import by_gold
from steersman.training.world.sampling import Guide, sample
from steersman.training.world.tokenizer import WINDOW

HEAD_STRENGTHS = {REWARD: 4.0, POLICY: 1.0}
"""β over the base's 10 likeliest tokens, and the mix of a policy: the best on the tuning prompts."""
_SIDES = ("chosen", "rejected")


def measure_writing(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    seed: int,
    guide: Guide | None = None,
) -> dict[str, float]:
    """Of samples at temperature 1, guided or not: copying of item and name (of responses that name one), ends, gold."""
    name = Path(model.name_or_path).name
    sampled = sample(model, tokenizer, [prompt.text for prompt in prompts], seed, f"{name}: measured", guide=guide)
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
    """Accuracy against gold order (no label noise) by share of the longer response, as the server reads the model."""
    model = load_scorer(folder.name, str(folder), tokenizer)
    rows = _in_gold_order(test_pairs, tokenizer)
    # All beginnings of a pair at once: what they share is read once.
    cuts = [[tokens_at(share, row.longer) for share in SHARES] for row in rows]
    beginnings = [
        [cut(side, i) for side in (r.chosen, r.rejected) for i in at] for r, at in zip(rows, cuts, strict=True)
    ]
    scored = [model.score_answers(row.prompt, texts)[0] for row, texts in zip(rows, beginnings, strict=True)]
    rewards = torch.tensor(scored).view(len(rows), 2, len(SHARES))

    def at_cuts(wanted: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.tensor([at.index(i) for at, i in zip(cuts, wanted, strict=True)])
        chosen, rejected = rewards[torch.arange(len(rows)), :, places].unbind(dim=1)
        return chosen, rejected

    return accuracy_of(at_cuts, rows)


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


def measure_head(
    folder: Path,
    role: str,
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    test_pairs: Sequence[dict[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """How the base writes under a head at its `strength`, and the head's `accuracy` against gold order by share."""
    head = read_head(folder.name, folder, role).head
    strength = HEAD_STRENGTHS[role]
    guide = RewardGuide(head, strength) if role == REWARD else PolicyGuide(head, strength)
    writing = measure_writing(base, tokenizer, prompts, seed, guide)
    rows = _in_gold_order(test_pairs, tokenizer)
    return {"strength": strength, **writing, "accuracy": head_accuracy(head, role, base, rows)}


@torch.inference_mode()
def head_accuracy(
    head: Head, role: str, base: LlamaForCausalLM, rows: Sequence[TokenizedPreference]
) -> dict[str, float]:
    """Share of the longer response → accuracy: of a reward head's output for a prefix's last token, of a policy head's
    log-ratios up to there."""

    def scores(row: TokenizedPreference, response: list[int]) -> torch.Tensor:
        ids = torch.tensor([[*row.prompt, *response[:-1]]])
        hidden = base.model(input_ids=ids).last_hidden_state[0, len(row.prompt) - 1 :]
        outputs, own = head(hidden), torch.tensor(response).unsqueeze(1)
        if role == REWARD:
            return outputs.gather(1, own)[:, 0]
        reference = base.lm_head(hidden).log_softmax(-1)
        return (outputs.gather(1, own)[:, 0] - (reference + outputs).logsumexp(-1)).cumsum(0)

    sides = [[scores(row, getattr(row, side)) for row in rows] for side in _SIDES]

    def at_cuts(cuts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = (
            torch.stack([own[min(i, len(own)) - 1] for own, i in zip(side, cuts, strict=True)]) for side in sides
        )
        return chosen, rejected

    return accuracy_of(at_cuts, rows)


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
