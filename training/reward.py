"""`steersman train reward`: reward models on whole responses, their beginnings or, for PARGS, their prefixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed
from trl.trainer.reward_config import RewardConfig

from steersman.training.accuracy import accuracy_by_share
from steersman.training.checkpoints import round_weights, save_checkpoint, write_reward_card
from steersman.training.configuration import run
from steersman.training.data import TokenizedPreference, load_preferences, load_tokenizer
from steersman.training.rewards.arguments import Objective, RewardArguments, check
from steersman.training.rewards.aspects import ASPECTS
from steersman.training.rewards.causal import PARTIAL
from steersman.training.rewards.pairs import FULL, TRUNCATED
from steersman.training.rewards.recipe import Recipe, window_of
from steersman.training.rewards.vocabulary import VOCABULARY

RECIPES: dict[Objective, Recipe] = {
    "full": FULL,
    "truncated": TRUNCATED,
    "partial": PARTIAL,
    "vocabulary": VOCABULARY,
    "aspects": ASPECTS,
}


def main(argv: Sequence[str]) -> int:
    """Runs `steersman train reward` with these arguments; 2 for an error in what the user gave."""
    return run("reward", RewardArguments, lambda _: RewardConfig, train_reward, argv)


def train_reward(arguments: RewardArguments, config: RewardConfig) -> dict[str, Any]:
    """Trains, measures and saves a reward model; returns the facts that its config.json carries."""
    check(arguments)
    recipe = RECIPES[arguments.objective]
    set_seed(config.seed)
    tokenizer = load_tokenizer(arguments.model)
    rows = recipe.read(arguments, config, tokenizer)
    held_out = _read_held_out(arguments, config, tokenizer) if arguments.validation_file else []
    model, tokenizer = recipe.load(arguments)
    trainer = recipe.make_trainer(arguments, config, model, tokenizer, rows)
    trainer.train()
    round_weights(model, arguments.store)
    facts = _facts(arguments, config, len(rows)) | recipe.describe(arguments)
    if held_out:
        measure = recipe.measure or _measure_accuracy(recipe)
        facts |= measure(model, held_out) | {"validation_pairs": len(held_out)}
    if trainer.is_world_process_zero():
        save_checkpoint(model, tokenizer, config.output_dir, facts, store=arguments.store)
        write_reward_card(config.output_dir, Path(config.output_dir).name, facts, recipe.seen)
    return facts


def _read_held_out(
    arguments: RewardArguments, config: RewardConfig, tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedPreference]:
    assert arguments.validation_file is not None
    aspects = RECIPES[arguments.objective].aspects(arguments)
    return load_preferences(arguments.validation_file, tokenizer, window_of(config, tokenizer), aspects=aspects)


def _measure_accuracy(recipe: Recipe) -> Callable[[PreTrainedModel, Sequence[TokenizedPreference]], dict[str, Any]]:
    return lambda model, held_out: {"accuracy": accuracy_by_share(model, held_out, recipe.score)}


def _facts(arguments: RewardArguments, config: RewardConfig, pairs: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": RECIPES[arguments.objective].kind,
        "objective": arguments.objective,
        "model": Path(arguments.model).name,
        "pairs": pairs,
        "learning_rate": config.learning_rate,
        "epochs": config.num_train_epochs,
        "batch": config.per_device_train_batch_size * config.gradient_accumulation_steps,
        "seed": config.seed,
    }
    return facts | ({"label_smoothing": arguments.label_smoothing} if arguments.label_smoothing else {})
