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
from steersman.training.figure import draw_accuracy
from steersman.training.output import replacing
from steersman.training.rewards.arguments import Objective, RewardArguments, check
from steersman.training.rewards.aspects import ASPECTS
from steersman.training.rewards.causal import PARTIAL
from steersman.training.rewards.pairs import FULL, TRUNCATED
from steersman.training.rewards.recipe import Recipe, window_of
from steersman.training.rewards.vocabulary import VOCABULARY
from steersman.training.running import train

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
    facts = _facts(arguments, config, len(rows)) | recipe.describe(arguments)
    trained = train(trainer)
    if trained is None:
        return facts
    round_weights(trained, arguments.store)
    if held_out:
        measure = recipe.measure or _measure_accuracy(recipe)
        facts |= measure(trained, held_out) | {"validation_pairs": len(held_out)}
    with replacing(config.output_dir) as folder:
        save_checkpoint(trained, tokenizer, folder, facts, store=arguments.store)
        if "accuracy" in facts and arguments.figure:
            draw_accuracy(folder, facts, Path(config.output_dir).name)
        write_reward_card(folder, Path(config.output_dir).name, facts, recipe.seen)
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
        "batch": config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size,
        "seed": config.seed,
    }
    return facts | ({"label_smoothing": arguments.label_smoothing} if arguments.label_smoothing else {})
