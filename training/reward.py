"""`steersman train reward`: Bradley-Terry reward models on whole responses or, for PARGS, on their prefixes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer, suppress_seqcls_warning

from steersman.training.accuracy import accuracy_by_share
from steersman.training.checkpoints import round_weights, save_checkpoint, write_reward_card
from steersman.training.configuration import ConfigError, load, run
from steersman.training.data import TokenizedPreference, load_preferences
from steersman.training.prefixes import cut, draw_cuts, draw_subset
from steersman.training.reward_trainer import PrefixCollator, PrefixRewardTrainer


@dataclass
class RewardArguments:
    """What is trained on what. Everything else is TRL's RewardConfig: learning_rate, output_dir, …"""

    model: str = field(metadata={"help": "Checkpoint to start from: a causal language model or a reward model."})
    train_file: str = field(metadata={"help": "JSON lines with prompt, chosen and rejected."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Rows of the same form; accuracy by prefix length is measured on them."}
    )
    objective: Literal["partial", "full"] = field(
        default="partial", metadata={"help": "partial: PARGS's equation 4, on prefixes. full: on whole responses."}
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
    if arguments.subset_ratio <= 0 or arguments.prefixes_per_pair < 1:
        raise ConfigError("subset_ratio is above 0 and prefixes_per_pair at least 1")
    set_seed(config.seed)
    model, tokenizer = _load(arguments.model)
    window = config.max_length or tokenizer.model_max_length
    rows = load_preferences(arguments.train_file, tokenizer, window)
    held_out = load_preferences(arguments.validation_file, tokenizer, window) if arguments.validation_file else []
    trainer = _trainer(arguments, config, model, tokenizer, rows)
    trainer.train()
    round_weights(model, arguments.store)
    facts = _facts(arguments, config, len(rows))
    if held_out:
        facts |= {"accuracy": accuracy_by_share(model, held_out), "validation_pairs": len(held_out)}
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
) -> RewardTrainer:
    if arguments.objective == "partial" and arguments.prefixes == "causal":
        if not hasattr(model, "score"):
            raise ConfigError(f"prefixes: causal needs a causal model, {arguments.model} is not: use subset")
        dataset = causal_rows(rows, arguments.prefixes_per_pair, config.seed)
        collator = PrefixCollator(tokenizer.pad_token_id)
        return PrefixRewardTrainer(model, config, collator, dataset, processing_class=tokenizer)
    partial = arguments.objective == "partial"
    dataset = subset_rows(rows, arguments.subset_ratio, config.seed) if partial else whole_rows(rows)
    return RewardTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)


def _load(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier of one label, in float32, and its tokenizer with a padding token that is not the end token."""
    with suppress_seqcls_warning():
        model, tokenizer = load(path, AutoModelForSequenceClassification, num_labels=1)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # A classifier pools at the last token that is not padding: the end token would never be scored.
        raise ConfigError(f"{path}: the tokenizer needs a padding token of its own, other than the end token")
    return model, tokenizer


def _facts(arguments: RewardArguments, config: RewardConfig, pairs: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": "reward",
        "objective": arguments.objective,
        "loss": "Bradley-Terry on whole responses",
        "model": Path(arguments.model).name,
        "pairs": pairs,
        "learning_rate": config.learning_rate,
        "epochs": config.num_train_epochs,
        "batch": config.per_device_train_batch_size * config.gradient_accumulation_steps,
        "seed": config.seed,
    }
    if arguments.objective == "partial":
        facts |= {
            "loss": "Bradley-Terry on prefixes of equal length (PARGS, equation 4)",
            "prefixes": arguments.prefixes,
        }
        name = "subset_ratio" if arguments.prefixes == "subset" else "prefixes_per_pair"
        facts[name] = getattr(arguments, name)
    return facts
