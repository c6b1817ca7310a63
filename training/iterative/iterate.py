"""`steersman train iterate`: rounds of sampling from the policy, scoring by an aspects reward model, and 2D-DPO."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.trainer_utils import set_seed

from steersman.guidance.aspects import ASPECTS, require_aspects
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.tokenizers import same_tokenizer
from steersman.training.answers import sample_answers
from steersman.training.aspects import read_weights
from steersman.training.checkpoints import add_facts, read_facts
from steersman.training.configuration import ConfigError, RunArguments, load, prepare_tokenizer, run
from steersman.training.data.fields import find_value_problems
from steersman.training.data.preferences import DataError, load_tokenizer, prompt_ids
from steersman.training.data.segment import write_lines
from steersman.training.data.sources import read_rows
from steersman.training.dpo import train_dpo
from steersman.training.iterative.representatives import read_representatives
from steersman.training.iterative.selection import AspectScorer, make_pair, question, score_answers
from steersman.training.policies import distributions
from steersman.training.policies.arguments import DPOArguments
from steersman.training.policies.two_dimensional import TwoDimensionalConfig


@dataclass
class IterateArguments(RunArguments):
    """What is sampled and scored. Everything else is the configuration of `train dpo --method 2d`."""

    model: str = field(metadata={"help": "Causal language model to start from."})
    reward_model: str = field(metadata={"help": "Reward model of `train reward --objective aspects`."})
    prompts: str = field(
        metadata={"help": "Rows with prompt: JSON lines, Parquet, a folder, or a Hub dataset (org/name:split)."}
    )
    rounds: int = field(default=3, metadata={"help": "Each begins where the one before ended; output_dir/round-N."})
    samples: int = field(default=4, metadata={"help": "Answers to every prompt."})
    prompts_per_round: int | None = field(
        default=None,
        metadata={"help": "A round's prompts, those after the round's before; all in every round if none."},
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Longer answers are left out."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    representatives: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Aspect → mean, minimum or last: which of its segments' scores is a response's. 2D-DPO's aspects "
            "have theirs: helpfulness and correctness mean, safety minimum, completeness and clarity last."
        },
    )
    store: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the weights' files."}
    )


def main(argv: Sequence[str]) -> int:
    """Runs `steersman train iterate` with these arguments; 2 for an error in what the user gave."""
    return run("iterate", IterateArguments, lambda _: TwoDimensionalConfig, iterate, argv)


def iterate(arguments: IterateArguments, config: TwoDimensionalConfig) -> list[dict[str, Any]]:
    """Does every round that is not done yet; returns each round's facts.

    A round leaves `pairs.jsonl` and `policy` in output_dir/round-N; its policy says when it is done.
    """
    _check(arguments)
    distributions.check(config)
    prepare_tokenizer(arguments.model, config)  # which refuses special tokens that it lacks
    scorer, prompts = _load_scorer(arguments, config), _read_prompts(arguments.prompts)
    policy, facts = arguments.model, []
    for number in range(1, arguments.rounds + 1):
        folder = Path(config.output_dir) / f"round-{number}"
        if not _is_done(folder):
            _do_round(number, folder, policy, arguments, config, scorer, prompts)
        facts.append(read_facts(folder / "policy"))
        print(_describe(facts[-1]), flush=True)
        policy = str(folder / "policy")
    return facts


def _do_round(
    number: int,
    folder: Path,
    policy: str,
    arguments: IterateArguments,
    config: TwoDimensionalConfig,
    scorer: AspectScorer,
    prompts: Sequence[dict[str, Any]],
) -> None:
    pairs, own = folder / "pairs.jsonl", _of_round(prompts, number, arguments.prompts_per_round)
    if not pairs.is_file():
        _write_pairs(pairs, number, policy, arguments, config, scorer, own)
    settings = copy.copy(config)
    settings.output_dir, settings.weights = str(folder / "policy"), dict(scorer.weights)
    settings.seed = config.seed + number
    train_dpo(DPOArguments(method="2d", model=policy, train_file=str(pairs), store=arguments.store), settings)
    rewards = [row.values["mean_reward"] for row in read_rows(pairs)]
    facts = {"reward_model": Path(arguments.reward_model).name, "prompts": len(own)}
    add_facts(folder / "policy", facts | {"sampled_reward": round(sum(rewards) / len(rewards), 4), "round": number})


def _write_pairs(
    path: Path,
    number: int,
    policy: str,
    arguments: IterateArguments,
    config: TwoDimensionalConfig,
    scorer: AspectScorer,
    prompts: Sequence[dict[str, Any]],
) -> None:
    """The pairs of a round; each with `mean_reward`, of all of its prompt's answers."""
    set_seed(config.seed)
    model, tokenizer = load(policy, AutoModelForCausalLM)
    model.to(config.device)
    scorer.model.to(config.device)
    answers = sample_answers(
        model,
        tokenizer,
        [prompt_ids(question(asked), tokenizer) for asked in prompts],
        samples=arguments.samples,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=config.seed + number,
        batch=config.per_device_eval_batch_size,
        description=f"round {number}: sampling",
    )
    rows = []
    for asked, texts in zip(tqdm(prompts, desc=f"round {number}: scoring", unit="prompt"), answers, strict=True):
        scored = score_answers(asked, texts, scorer)
        pair = make_pair(asked, scored)
        if pair is not None:
            rows.append(pair | {"mean_reward": sum(answer.reward for answer in scored) / len(scored)})
    if not rows:
        raise DataError(
            f"round {number}: no prompt has two answers of different reward that ended within max_new_tokens, "
            f"{arguments.max_new_tokens}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, rows)


def _load_scorer(arguments: IterateArguments, config: TwoDimensionalConfig) -> AspectScorer:
    """The reward model; its own weights count unless the configuration has others for its aspects."""
    tokenizer = load_tokenizer(arguments.reward_model)
    if not same_tokenizer(tokenizer, load_tokenizer(arguments.model)):
        raise ConfigError(f"reward_model: {arguments.reward_model} has another tokenizer than {arguments.model}")
    model, _ = load(arguments.reward_model, AutoModelForSequenceClassification)
    facts = getattr(model.config, "steersman", None) or {}
    if facts.get("kind") != ASPECTS:
        raise ConfigError(f"reward_model: {arguments.reward_model} is none of `train reward --objective aspects`")
    try:
        require_aspects(arguments.reward_model, "reward_model", model.config)
    except ModelRefused as error:
        raise ConfigError(str(error)) from None
    given = read_weights(config.weights, dict(zip(facts["aspects"], facts["weights"], strict=True)))
    if unknown := [aspect for aspect in given if aspect not in facts["aspects"]]:
        raise ConfigError(f"weights: {arguments.reward_model} scores {', '.join(facts['aspects'])}, not {unknown[0]}")
    weights = {aspect: given.get(aspect, 0.0) for aspect in facts["aspects"]}
    representatives = read_representatives(arguments.representatives, list(weights))
    return AspectScorer(
        model.eval(), tokenizer, weights, representatives, config.max_length or tokenizer.model_max_length
    )


def _read_prompts(source: str) -> list[dict[str, Any]]:
    """Rows with `prompt`, and what belongs to it: a response that is there plays no part."""
    prompts: list[dict[str, Any]] = []
    for row in read_rows(source):
        for problem in [row.problem] if row.problem else find_value_problems("prompt", row.values.get("prompt")):
            raise DataError(f"{row.where}: {problem}")
        asked: dict[str, Any] = {
            name: row.values[name] for name in ("prompt", "tools", "chat_template_kwargs") if name in row.values
        }
        try:
            question(asked)
        except ValueError as error:
            raise DataError(f"{row.where}: {error}") from None
        prompts.append(asked)
    if not prompts:
        raise DataError(f"{source}: no rows")
    return prompts


def _of_round(prompts: Sequence[dict[str, Any]], number: int, count: int | None) -> list[dict[str, Any]]:
    """The prompts of a round, from the beginning again once all have had their turn."""
    if count is None:
        return list(prompts)
    start = (number - 1) * count
    return [prompts[n % len(prompts)] for n in range(start, start + min(count, len(prompts)))]


def _check(arguments: IterateArguments) -> None:
    for name, least in (("rounds", 1), ("samples", 2), ("prompts_per_round", 1), ("max_new_tokens", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is at least {least}, not {value}")
    if arguments.temperature <= 0:
        raise ConfigError(f"temperature is above 0, not {arguments.temperature:g}: answers must differ")


def _is_done(folder: Path) -> bool:
    return (folder / "policy" / "config.json").is_file() and "round" in read_facts(folder / "policy")


def _describe(facts: dict[str, Any]) -> str:
    return (
        f"round {facts['round']}: {facts['pairs']} pairs from {facts['prompts']} prompts; mean reward of its samples "
        f"{facts['sampled_reward']:.3f}"
    )
