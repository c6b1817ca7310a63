"""`steersman train reward`: reward models on whole responses, their beginnings or, for PARGS, their prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import set_seed
from trl.trainer.reward_config import RewardConfig

from steersman.training.accuracy import accuracy_by_share
from steersman.training.checkpoints import round_weights, save_checkpoint, write_reward_card
from steersman.training.configuration import run
from steersman.training.data import load_preferences
from steersman.training.figure import draw_accuracy
from steersman.training.output import replacing
from steersman.training.rewards.arguments import Objective, RewardArguments, check
from steersman.training.rewards.causal import PARTIAL
from steersman.training.rewards.pairs import FULL, TRUNCATED
from steersman.training.rewards.recipe import Recipe
from steersman.training.rewards.vocabulary import VOCABULARY
from steersman.training.running import train

RECIPES: dict[Objective, Recipe] = {
    "full": FULL,
    "truncated": TRUNCATED,
    "partial": PARTIAL,
    "vocabulary": VOCABULARY,
}


def main(argv: Sequence[str]) -> int:
    """Runs `steersman train reward` with these arguments; 2 for an error in what the user gave."""
    return run("reward", RewardArguments, RewardConfig, train_reward, argv)


def train_reward(arguments: RewardArguments, config: RewardConfig) -> dict[str, Any]:
    """Trains, measures and saves a reward model; returns the facts that its config.json carries."""
    check(arguments)
    recipe = RECIPES[arguments.objective]
    set_seed(config.seed)
    model, tokenizer = recipe.load(arguments)
    window = config.max_length or tokenizer.model_max_length
    rows = load_preferences(arguments.train_file, tokenizer, window)
    held_out = load_preferences(arguments.validation_file, tokenizer, window) if arguments.validation_file else []
    trainer = recipe.make_trainer(arguments, config, model, tokenizer, rows)
    facts = _facts(arguments, config, len(rows)) | recipe.describe(arguments)
    trained = train(trainer)
    if trained is None:
        return facts
    round_weights(trained, arguments.store)
    if held_out:
        facts |= {"accuracy": accuracy_by_share(trained, held_out, recipe.score), "validation_pairs": len(held_out)}
    with replacing(config.output_dir) as folder:
        save_checkpoint(trained, tokenizer, folder, facts, store=arguments.store)
        if held_out and arguments.figure:
            draw_accuracy(folder, facts, Path(config.output_dir).name)
        write_reward_card(folder, Path(config.output_dir).name, facts, recipe.seen)
    return facts


def _facts(arguments: RewardArguments, config: RewardConfig, pairs: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": RECIPES[arguments.objective].kind,
        "objective": arguments.objective,
        "model": Path(arguments.model).name,
        "pairs": pairs,
        "learning_rate": config.learning_rate,
        "epochs": config.num_train_epochs,
        "batch": config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size,
        "seed": config.seed,
    }
    return facts | ({"label_smoothing": arguments.label_smoothing} if arguments.label_smoothing else {})
