"""`steersman train reward`: reward models on whole responses, their beginnings or, for PARGS, their prefixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed
from trl.trainer.reward_config import RewardConfig

from steersman.guidance.checkpoints import is_causal
from steersman.training.accuracy import accuracy_by_share
from steersman.training.checkpoints import add_facts, round_weights, save_checkpoint, write_reward_card
from steersman.training.configuration import log_data, peek, prepare_tokenizer, run
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.figure import draw_accuracy
from steersman.training.heads.arguments import HeadRewardConfig
from steersman.training.heads.reward import train_reward_head
from steersman.training.lora import add_lora, merge_lora
from steersman.training.output import replacing
from steersman.training.rewards.arguments import Objective, ObjectiveArguments, RewardArguments, check, check_center
from steersman.training.rewards.aspects import ASPECTS
from steersman.training.rewards.causal import PARTIAL
from steersman.training.rewards.distilled import DISTILLED
from steersman.training.rewards.endings import ended, ending_of
from steersman.training.rewards.pairs import FULL, TRUNCATED
from steersman.training.rewards.prefix_value import PREFIX_VALUE
from steersman.training.rewards.rated import REGRESSION, SCALED
from steersman.training.rewards.recipe import Recipe, check_padding, window_of
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
    return run("reward", RewardArguments, config_type, train_reward, argv)


def config_type(argv: Sequence[str]) -> type[RewardConfig]:
    """The configuration of the objective that the arguments name; raises ConfigError."""
    return HeadRewardConfig if peek("reward", ObjectiveArguments, argv).objective == "head" else RewardConfig


def train_reward(arguments: RewardArguments, config: RewardConfig) -> dict[str, Any]:
    """Trains, measures and saves a reward model; returns the facts that its config.json carries, or a head's file."""
    check(arguments)
    if arguments.objective == "head":
        return train_reward_head(arguments, config)
    check_center(arguments, config)
    recipe = RECIPES[arguments.objective]
    set_seed(config.seed)
    tokenizer = prepare_tokenizer(arguments.model, config)
    check_padding(arguments.model, tokenizer)
    rows = recipe.read(arguments, config, tokenizer)
    held_out = _read_held_out(arguments, config, tokenizer) if arguments.validation_file else []
    log_data(arguments, len(rows), len(held_out))
    model, _ = recipe.load(arguments)
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
    folder, name = Path(config.output_dir), Path(config.output_dir).name
    seen = f"{recipe.seen} ({len(rows)} {recipe.rows})"
    with replacing(folder) as unfinished:
        save_checkpoint(trained, tokenizer, unfinished, facts, store=arguments.store)
        write_reward_card(unfinished, name, facts, seen)
    if held_out:
        measure = recipe.measure or _measure_accuracy(recipe, tokenizer, config.per_device_eval_batch_size)
        measured = measure(trained, held_out) | {"validation_pairs": len(held_out)}
        facts |= measured
        add_facts(folder, measured)
        if "accuracy" in facts and arguments.figure:
            draw_accuracy(folder, facts, name)
        write_reward_card(folder, name, facts, seen)
    return facts


def _read_held_out(
    arguments: RewardArguments, config: RewardConfig, tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedPreference]:
    assert arguments.validation_file is not None
    aspects = RECIPES[arguments.objective].aspects(arguments)
    return load_preferences(arguments.validation_file, tokenizer, window_of(config, tokenizer), aspects=aspects)


def _measure_accuracy(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, batch: int
) -> Callable[[PreTrainedModel, Sequence[TokenizedPreference]], dict[str, Any]]:
    def measure(model: PreTrainedModel, held_out: Sequence[TokenizedPreference]) -> dict[str, Any]:
        score = ended(partial(recipe.score, batch=batch), ending_of(model, tokenizer))
        return {"accuracy": accuracy_by_share(model, held_out, score)}

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
