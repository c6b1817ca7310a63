"""Preference pairs: two samples of the base for a prompt, labelled by gold with Bradley and Terry's noise."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from steersman.training.world import gold
from steersman.training.world.aspects import annotate
from steersman.training.world.grammar import Split, draw_prompts
from steersman.training.world.sampling import sample


def draw_pairs(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, split: Split, count: int, seed: int
) -> list[dict[str, Any]]:
    """`count` rows of prompt, chosen, rejected, their gold rewards and scored segments; P(chosen) = σ(gold difference).

    A prompt whose two samples are the same, or whose sample did not finish, gives no row: spare prompts replace it.
    """
    prompts = [prompt.text for prompt in draw_prompts(split, count + count // 10 + 20, seed)]
    first, second = (
        sample(model, tokenizer, prompts, 2 * seed + half, f"{split} pairs, {half + 1} of 2") for half in (0, 1)
    )
    rng = random.Random(f"labels/{split}/{seed}")
    rating_rng = random.Random(f"ratings/{split}/{seed}")
    rows = []
    for prompt, one, two in zip(prompts, first, second, strict=True):
        if one == two or one[-1] != tokenizer.eos_token_id or two[-1] != tokenizer.eos_token_id:
            continue
        row = _label(prompt, tokenizer.decode(one[:-1]), tokenizer.decode(two[:-1]), rng)
        rows.append(row | rate(row["gold_chosen"], row["gold_rejected"], rating_rng))
    if len(rows) < count:
        raise RuntimeError(f"{split}: only {len(rows)} of {count} pairs: the base does not finish its responses")
    return annotate(rows[:count], f"{split}/{seed}")


def rate(gold_chosen: float, gold_rejected: float, rng: random.Random) -> dict[str, float]:
    """A judge's ratings of both responses, given which of them it chose, and how much better it found the chosen one.

    A rating is gold plus Gumbel noise, and the higher one is chosen: that is P(chosen) = σ(gold difference), the law of
    the labels. Given the winner, the higher rating is Gumbel around log Σ exp(gold) whichever it is, and the other one
    around its own gold, cut off at the higher (Maddison et al. 2014, A* sampling).
    """

    def draw(location: float, bound: float = math.inf) -> float:
        return location - math.log(math.exp(location - bound) + rng.expovariate(1.0))

    score_chosen = draw(math.log(math.exp(gold_chosen) + math.exp(gold_rejected)))
    score_rejected = draw(gold_rejected, score_chosen)
    strength = score_chosen - score_rejected
    return {"score_chosen": score_chosen, "score_rejected": score_rejected, "strength": strength}


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_gold(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose gold rewards differ, relabelled without noise: chosen is the better."""
    ordered = []
    for row in rows:
        if row["gold_chosen"] > row["gold_rejected"]:
            ordered.append(row)
        elif row["gold_chosen"] < row["gold_rejected"]:
            ordered.append({"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]})
    return ordered


def agreement(rows: Sequence[dict[str, Any]]) -> float:
    """The share of labels that agree with gold, where gold tells the two apart."""
    told_apart = [row for row in rows if row["gold_chosen"] != row["gold_rejected"]]
    return sum(row["gold_chosen"] > row["gold_rejected"] for row in told_apart) / len(told_apart)


def _label(prompt: str, one: str, two: str, rng: random.Random) -> dict[str, Any]:
    golds = {text: gold.score(prompt, text).total for text in (one, two)}
    one_wins = rng.random() < 1 / (1 + math.exp(golds[two] - golds[one]))
    chosen, rejected = (one, two) if one_wins else (two, one)
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "gold_chosen": golds[chosen],
        "gold_rejected": golds[rejected],
    }
