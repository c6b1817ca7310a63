"""`steersman train reward`: reward models on whole responses, their beginnings or, for PARGS, their prefixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed
from trl.trainer.reward_config import RewardConfig

from steersman.guidance.checkpoints import is_causal
from steersman.training.accuracy import accuracy_by_share
from steersman.training.checkpoints import round_weights, save_checkpoint, write_reward_card
from steersman.training.configuration import run
from steersman.training.data.preferences import TokenizedPreference, load_preferences, load_tokenizer
from steersman.training.figure import draw_accuracy
from steersman.training.lora import add_lora, merge_lora
from steersman.training.output import replacing
from steersman.training.rewards.arguments import Objective, RewardArguments, check
from steersman.training.rewards.aspects import ASPECTS
from steersman.training.rewards.causal import PARTIAL
from steersman.training.rewards.distilled import DISTILLED
from steersman.training.rewards.endings import ended, ending_of
from steersman.training.rewards.pairs import FULL, TRUNCATED
from steersman.training.rewards.prefix_value import PREFIX_VALUE
from steersman.training.rewards.rated import REGRESSION, SCALED
from steersman.training.rewards.recipe import Recipe, window_of
from steersman.training.rewards.vocabulary import VOCABULARY
from steersman.training.running import train

RECIPES: dict[Objective, Recipe] = {
    "full": FULL,
    "truncated": TRUNCATED,
    "partial": PARTIAL,
    "vocabulary": VOCABULARY,
    "distilled": DISTILLED,
    "prefix_value": PREFIX_VALUE,
    "regression": REGRESSION,
    "scaled": SCALED,
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
    adapted = add_lora(model, arguments.lora_rank)
    trainer = recipe.make_trainer(arguments, config, adapted, tokenizer, rows)
    facts = _facts(arguments, config, len(rows)) | recipe.describe(arguments)
    if not is_causal(model.config):
        facts["kind"] = "text"
    trained = train(trainer)
    if trained is None:
        return facts
    trained = merge_lora(trained)
    round_weights(trained, arguments.store)
    if held_out:
        measure = recipe.measure or _measure_accuracy(recipe, tokenizer)
        facts |= measure(trained, held_out) | {"validation_pairs": len(held_out)}
    with replacing(config.output_dir) as folder:
        save_checkpoint(trained, tokenizer, folder, facts, store=arguments.store)
        if "accuracy" in facts and arguments.figure:
            draw_accuracy(folder, facts, Path(config.output_dir).name)
        seen = f"{recipe.seen} ({len(rows)} {recipe.rows})"
        write_reward_card(folder, Path(config.output_dir).name, facts, seen)
    return facts


def _read_held_out(
    arguments: RewardArguments, config: RewardConfig, tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedPreference]:
    assert arguments.validation_file is not None
    aspects = RECIPES[arguments.objective].aspects(arguments)
    return load_preferences(arguments.validation_file, tokenizer, window_of(config, tokenizer), aspects=aspects)


def _measure_accuracy(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> Callable[[PreTrainedModel, Sequence[TokenizedPreference]], dict[str, Any]]:
    def measure(model: PreTrainedModel, held_out: Sequence[TokenizedPreference]) -> dict[str, Any]:
        return {"accuracy": accuracy_by_share(model, held_out, ended(recipe.score, ending_of(model, tokenizer)))}

    return measure


def _facts(arguments: RewardArguments, config: RewardConfig, rows: int) -> dict[str, Any]:
    recipe = RECIPES[arguments.objective]
    facts: dict[str, Any] = {
        "kind": recipe.kind,
        "objective": arguments.objective,
        "model": Path(arguments.model).name,
        recipe.rows: rows,
        "learning_rate": config.learning_rate,
        "epochs": config.num_train_epochs,
        "batch": config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size,
        "seed": config.seed,
    }
    given = {name: getattr(arguments, name) for name in ("label_smoothing", "lora_rank")}
    return facts | {name: value for name, value in given.items() if value}
