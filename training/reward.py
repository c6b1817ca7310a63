"""`steersman train reward`: reward models on whole responses, their beginnings or, for PARGS, their prefixes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import set_seed
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import suppress_seqcls_warning

from steersman.training.accuracy import accuracy_by_share, score_ends, score_last_tokens
from steersman.training.checkpoints import round_weights, save_checkpoint, write_reward_card
from steersman.training.configuration import ConfigError, load, run
from steersman.training.data import TokenizedPreference, load_preferences
from steersman.training.prefixes import cut, draw_cuts, draw_subset, tokens_at
from steersman.training.reward_trainer import (
    PairRewardTrainer,
    PrefixCollator,
    PrefixRewardTrainer,
    VocabularyRewardTrainer,
)


@dataclass
class RewardArguments:
    """What is trained on what. Everything else is TRL's RewardConfig: learning_rate, output_dir, …"""

    model: str = field(metadata={"help": "Checkpoint to start from: a causal language model or a reward model."})
    train_file: str = field(metadata={"help": "JSON lines with prompt, chosen and rejected."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Rows of the same form; accuracy by prefix length is measured on them."}
    )
    objective: Literal["partial", "full", "truncated", "vocabulary"] = field(
        default="partial",
        metadata={
            "help": "partial: PARGS's equation 4, on prefixes. full: on whole responses. truncated: on the beginnings "
            "of responses. vocabulary: partial, with one output for every next token, from a causal language model."
        },
    )
    keep: float = field(
        default=0.5,
        metadata={
            "help": "With objective=truncated, what is kept of each response from its start: up to 1 a share of its "
            "tokens, above 1 a number of tokens."
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of labels that are taken to be wrong: from 0 to below 0.5."}
    )
    prefixes: Literal["subset", "causal"] = field(
        default="subset",
        metadata={
            "help": "subset: a random subset of all partial sequences, each its own row. causal: many prefixes of a "
            "pair from one forward pass; needs a causal model."
        },
    )
    subset_ratio: float = field(default=1.5, metadata={"help": "Partial sequences a pair, with prefixes=subset."})
    prefixes_per_pair: int = field(default=10, metadata={"help": "Prefixes a pair, with prefixes=causal."})
    store: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the weights' file; accuracy is measured on what it keeps."}
    )


def main(argv: Sequence[str]) -> int:
    """Runs `steersman train reward` with these arguments; 2 for an error in what the user gave."""
    return run("reward", RewardArguments, RewardConfig, train_reward, argv)


def train_reward(arguments: RewardArguments, config: RewardConfig) -> dict[str, Any]:
    """Trains, measures and saves a reward model; returns the facts that its config.json carries."""
    _check(arguments)
    set_seed(config.seed)
    model, tokenizer = (_load_vocabulary if arguments.objective == "vocabulary" else _load)(arguments.model)
    window = config.max_length or tokenizer.model_max_length
    rows = load_preferences(arguments.train_file, tokenizer, window)
    held_out = load_preferences(arguments.validation_file, tokenizer, window) if arguments.validation_file else []
    trainer = _trainer(arguments, config, model, tokenizer, rows)
    trainer.train()
    round_weights(model, arguments.store)
    facts = _facts(arguments, config, len(rows))
    if held_out:
        score = score_last_tokens if arguments.objective == "vocabulary" else score_ends
        facts |= {"accuracy": accuracy_by_share(model, held_out, score), "validation_pairs": len(held_out)}
    if trainer.is_world_process_zero():
        save_checkpoint(model, tokenizer, config.output_dir, facts, store=arguments.store)
        write_reward_card(config.output_dir, Path(config.output_dir).name, facts)
    return facts


def whole_rows(rows: Sequence[TokenizedPreference]) -> Dataset:
    return Dataset.from_list(
        [{"chosen_ids": row.prompt + row.chosen, "rejected_ids": row.prompt + row.rejected} for row in rows]
    )


def subset_rows(rows: Sequence[TokenizedPreference], ratio: float, seed: int) -> Dataset:
    """Each partial sequence of a random subset as a row of its own."""
    subset = draw_subset([row.longer for row in rows], ratio, seed)
    return whole_rows(
        [TokenizedPreference(rows[n].prompt, cut(rows[n].chosen, i), cut(rows[n].rejected, i)) for n, i in subset]
    )


def causal_rows(rows: Sequence[TokenizedPreference], count: int, seed: int) -> Dataset:
    """Whole pairs, with the positions of their prefixes' last tokens."""
    rng = random.Random(seed)
    examples = []
    for row in rows:
        cuts = draw_cuts(row.longer, count, rng)
        examples.append(
            {
                "chosen_ids": row.prompt + row.chosen,
                "rejected_ids": row.prompt + row.rejected,
                "chosen_positions": [len(row.prompt) + min(i, len(row.chosen)) - 1 for i in cuts],
                "rejected_positions": [len(row.prompt) + min(i, len(row.rejected)) - 1 for i in cuts],
            }
        )
    return Dataset.from_list(examples)


def _trainer(
    arguments: RewardArguments,
    config: RewardConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedPreference],
) -> PairRewardTrainer:
    made: PairRewardTrainer
    if arguments.objective == "vocabulary" or (arguments.objective == "partial" and arguments.prefixes == "causal"):
        trainer = VocabularyRewardTrainer if arguments.objective == "vocabulary" else PrefixRewardTrainer
        if trainer is PrefixRewardTrainer and not hasattr(model, "score"):
            raise ConfigError(f"prefixes: causal needs a causal model, {arguments.model} is not: use subset")
        dataset = causal_rows(rows, arguments.prefixes_per_pair, config.seed)
        made = trainer(model, config, PrefixCollator(tokenizer.pad_token_id), dataset, processing_class=tokenizer)
    else:
        dataset = _pair_rows(arguments, rows, config.seed)
        made = PairRewardTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    made.label_smoothing = arguments.label_smoothing
    return made


def _pair_rows(arguments: RewardArguments, rows: Sequence[TokenizedPreference], seed: int) -> Dataset:
    if arguments.objective == "partial":
        return subset_rows(rows, arguments.subset_ratio, seed)
    return whole_rows(truncate(rows, arguments.keep) if arguments.objective == "truncated" else rows)


def truncate(rows: Sequence[TokenizedPreference], keep: float) -> list[TokenizedPreference]:
    """The beginnings of all responses (Shallow Preference Signals): up to 1 a share of each one's own tokens, at least
    one of them, above 1 a number of tokens. A cut is given no end token."""

    def begin(response: list[int]) -> list[int]:
        return cut(response, tokens_at(keep, len(response)) if keep <= 1 else int(keep))

    return [TokenizedPreference(row.prompt, begin(row.chosen), begin(row.rejected)) for row in rows]


def _check(arguments: RewardArguments) -> None:
    if arguments.subset_ratio <= 0 or arguments.prefixes_per_pair < 1:
        raise ConfigError("subset_ratio is above 0 and prefixes_per_pair at least 1")
    if arguments.keep <= 0 or (arguments.keep > 1 and arguments.keep != int(arguments.keep)):
        raise ConfigError(
            f"keep is a share above 0 and at most 1, or a whole number of tokens above 1, not {arguments.keep:g}"
        )
    if not 0 <= arguments.label_smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing is from 0 to below 0.5, not {arguments.label_smoothing:g}: of labels that are wrong half "
            "of the time nothing can be learned"
        )


def _load(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier of one label, in float32, and its tokenizer with a padding token that is not the end token."""
    with suppress_seqcls_warning():
        model, tokenizer = load(path, AutoModelForSequenceClassification, num_labels=1)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # A classifier pools at the last token that is not padding: the end token would never be scored.
        raise ConfigError(f"{path}: the tokenizer needs a padding token of its own, other than the end token")
    return model, tokenizer


def _load_vocabulary(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, in float32, whose head is its own and begins with no opinion: rewards are no logits."""
    model, tokenizer = load(path, AutoModelForCausalLM)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.num_labels = 1  # what TRL takes for a reward model
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    return model, tokenizer


def _facts(arguments: RewardArguments, config: RewardConfig, pairs: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": "vocabulary" if arguments.objective == "vocabulary" else "reward",
        "objective": arguments.objective,
        "loss": "Bradley-Terry on whole responses",
        "model": Path(arguments.model).name,
        "pairs": pairs,
        "learning_rate": config.learning_rate,
        "epochs": config.num_train_epochs,
        "batch": config.per_device_train_batch_size * config.gradient_accumulation_steps,
        "seed": config.seed,
    }
    if arguments.label_smoothing:
        facts["label_smoothing"] = arguments.label_smoothing
    if arguments.objective == "truncated":
        facts |= {"loss": "Bradley-Terry on the beginnings of responses", "keep": arguments.keep}
    if arguments.objective in ("partial", "vocabulary"):
        prefixes = "causal" if arguments.objective == "vocabulary" else arguments.prefixes
        name = "subset_ratio" if prefixes == "subset" else "prefixes_per_pair"
        loss = "Bradley-Terry on prefixes of equal length (PARGS, equation 4)"
        facts |= {"loss": loss, "prefixes": prefixes, name: getattr(arguments, name)}
    return facts
