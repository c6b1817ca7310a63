"""`steersman train dpo`: policies trained directly on preferences, over TRL's trainers; whole responses or heads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from steersman.training.checkpoints import add_facts, round_weights, save_adapter, save_checkpoint, write_policy_card
from steersman.training.configuration import ConfigError, load, log, log_data, one_line, peek, prepare_tokenizer, run
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.figure import draw_accuracy
from steersman.training.heads.policy import head_config_type, train_policy_head
from steersman.training.implicit_reward import implicit_accuracy
from steersman.training.lora import lora_config
from steersman.training.output import replacing
from steersman.training.policies.arguments import DPOArguments, MethodArguments, MethodName, check
from steersman.training.policies.method import Method
from steersman.training.policies.pairs import DPO
from steersman.training.policies.reference_free import ORPO, SIMPO
from steersman.training.policies.token_level import TDPO1, TDPO2
from steersman.training.policies.two_dimensional import ONE_DIMENSIONAL, TWO_DIMENSIONAL
from steersman.training.policies.unpaired import KTO
from steersman.training.prefixes import truncate
from steersman.training.running import train

METHODS: dict[MethodName, Method] = {
    "dpo": DPO,
    "tdpo1": TDPO1,
    "tdpo2": TDPO2,
    "1d": ONE_DIMENSIONAL,
    "2d": TWO_DIMENSIONAL,
    "kto": KTO,
    "orpo": ORPO,
    "simpo": SIMPO,
}


def main(argv: Sequence[str]) -> int:
    """Runs `steersman train dpo` with these arguments; 2 for an error in what the user gave."""
    return run("dpo", DPOArguments, config_type, train_dpo, argv)


def train_dpo(arguments: DPOArguments, config: Any) -> dict[str, Any]:
    """Trains, measures and saves a policy, or its adapter; returns the facts that its config.json carries, or a
    head's file.

    config: of the method's type.
    """
    method = METHODS[arguments.method]
    check(arguments)
    if arguments.head:
        return train_policy_head(arguments, config, load_rows)
    method.check(config)
    set_seed(config.seed)
    tokenizer = prepare_tokenizer(arguments.model, config)
    window = config.max_length or tokenizer.model_max_length
    rows = load_rows(arguments, config, tokenizer, window)
    held_out = load_preferences(arguments.validation_file, tokenizer, window) if arguments.validation_file else []
    log_data(arguments, len(rows), len(held_out))
    model, _ = load(arguments.model, AutoModelForCausalLM)
    facts = _facts(arguments, config, len(rows))
    folder, name = Path(config.output_dir), Path(config.output_dir).name
    policy = _train(arguments, config, model, tokenizer, rows)
    if policy is None:
        return facts
    round_weights(policy, arguments.store)
    save = save_adapter if arguments.lora_rank else save_checkpoint
    with replacing(folder) as unfinished:
        save(policy, tokenizer, unfinished, facts, store=arguments.store)
        write_policy_card(unfinished, name, facts)
    if held_out:
        reference, _ = load(arguments.model, AutoModelForCausalLM)
        reference.to(policy.device)
        accuracy = implicit_accuracy(policy, reference, held_out, config.beta, config.per_device_eval_batch_size)
        measured = {"accuracy": accuracy, "validation_pairs": len(held_out)}
        facts |= measured
        add_facts(folder, measured)
        if arguments.figure:
            draw_accuracy(folder, facts, name)
        write_policy_card(folder, name, facts)
    return facts


def easy_first(rows: Sequence[TokenizedPreference]) -> list[TokenizedPreference]:
    """The rows by how far their scores are apart, the farthest first (Curry-DPO); those alike keep their order."""

    def difference(row: TokenizedPreference) -> float:
        assert row.score_chosen is not None
        assert row.score_rejected is not None
        return abs(row.score_chosen - row.score_rejected)

    return sorted(rows, key=difference, reverse=True)


def load_rows(
    arguments: DPOArguments, config: Any, tokenizer: PreTrainedTokenizerBase, window: int
) -> list[TokenizedPreference]:
    """The rows to train on, in the order in which they are read, if one is fixed."""
    method, by_score = METHODS[arguments.method], arguments.curriculum == "easy_first"
    needed = ("score_chosen", "score_rejected") if by_score else ()
    every = load_preferences(arguments.train_file, tokenizer, window, needed=needed, aspects=method.aspects(config))
    rows = every[: arguments.pairs]
    if len(rows) < len(every):
        log(f"pairs: {arguments.pairs} leaves out the last {len(every) - len(rows)} rows of {arguments.train_file}")
    if by_score:
        if config.train_sampling_strategy == "group_by_length":
            raise ConfigError("curriculum: easy_first has an order of its own: leave train_sampling_strategy out")
        config.train_sampling_strategy = "sequential"
        rows = easy_first(rows)
    elif method.in_order:
        random.Random(config.seed).shuffle(rows)
    return truncate(rows, arguments.keep)


def _train(
    arguments: DPOArguments,
    config: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedPreference],
) -> PreTrainedModel | None:
    """The trained model, wrapped by PEFT where an adapter was asked for; None where another process writes it."""
    rank = arguments.lora_rank
    lora = lora_config(rank, "CAUSAL_LM") if rank else None
    use_cache = model.config.use_cache
    try:
        policy = train(METHODS[arguments.method].make_trainer(config, model, tokenizer, rows, lora))
    except (ValueError, NotImplementedError) as error:  # combinations of its settings that TRL refuses
        raise one_line(error) from error
    if policy is not None:
        policy.config.use_cache = use_cache  # switched off for training, and saved with the model that will generate
    return policy


def config_type(argv: Sequence[str]) -> type[Any]:
    """The configuration of the method that the arguments name; raises ConfigError."""
    arguments = peek("dpo", MethodArguments, argv)
    return head_config_type(arguments.method) if arguments.head else METHODS[arguments.method].config


def _facts(arguments: DPOArguments, config: Any, pairs: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": "policy",
        "method": arguments.method,
        **METHODS[arguments.method].describe(config),
        "keep": arguments.keep,
        "beta": config.beta,
        "model": Path(arguments.model).name,
        "pairs": pairs,
        "learning_rate": config.learning_rate,
        "epochs": config.num_train_epochs,
        "batch": config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size,
        "seed": config.seed,
    }
    if arguments.curriculum != "none":
        facts["curriculum"] = arguments.curriculum
    return facts | ({"lora_rank": arguments.lora_rank} if arguments.lora_rank else {})
