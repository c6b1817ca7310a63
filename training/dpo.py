"""`steersman train dpo`: policies trained directly on preferences, over TRL's DPOTrainer; whole responses or heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed
from trl.trainer.dpo_config import DPOConfig

from steersman.training.checkpoints import round_weights, save_adapter, save_checkpoint, write_policy_card
from steersman.training.configuration import ConfigError, RunArguments, load, one_line, run
from steersman.training.data import TokenizedPreference, load_preferences
from steersman.training.dpo_trainers import TokenizedDPOTrainer, TokenLevelDPOTrainer
from steersman.training.figure import draw_accuracy
from steersman.training.implicit_reward import implicit_accuracy
from steersman.training.output import replacing
from steersman.training.prefixes import cut, tokens_at
from steersman.training.running import train


@dataclass
class DPOArguments(RunArguments):
    """What is trained on what. Everything else is TRL's DPOConfig: beta, loss_type, learning_rate, output_dir, …"""

    model: str = field(metadata={"help": "Causal language model to start from; it is the reference too."})
    train_file: str = field(metadata={"help": "JSON lines with prompt, chosen and rejected."})
    validation_file: str | None = field(
        default=None,
        metadata={
            "help": "Rows of the same form; the implicit reward's accuracy by prefix length is measured on them."
        },
    )
    pairs: int | None = field(default=None, metadata={"help": "Train on this many rows, the file's first; else all."})
    keep: float = field(
        default=1.0,
        metadata={"help": "Share of each response's tokens, from its start, that is trained on: above 0, at most 1."},
    )
    method: Literal["dpo", "tdpo1", "tdpo2"] = field(
        default="dpo",
        metadata={
            "help": "dpo: TRL's losses, chosen by loss_type. tdpo1, tdpo2: token-level DPO, which holds the sequential "
            "KL of both responses beside their rewards."
        },
    )
    alpha: float = field(default=0.5, metadata={"help": "Of tdpo2: how much the sequential KL weighs; 0 is DPO."})
    lora_rank: int = field(
        default=0, metadata={"help": "Train a LoRA adapter of this rank on all linear layers; 0 trains all weights."}
    )
    store: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the weights' file; accuracy is measured on what it keeps."}
    )


def main(argv: Sequence[str]) -> int:
    """Runs `steersman train dpo` with these arguments; 2 for an error in what the user gave."""
    return run("dpo", DPOArguments, DPOConfig, train_dpo, argv)


def train_dpo(arguments: DPOArguments, config: DPOConfig) -> dict[str, Any]:
    """Trains, measures and saves a policy, or its adapter; returns the facts that its config.json carries."""
    _check(arguments, config)
    set_seed(config.seed)
    model, tokenizer = load(arguments.model, AutoModelForCausalLM)
    window = config.max_length or tokenizer.model_max_length
    rows = load_preferences(arguments.train_file, tokenizer, window)[: arguments.pairs]
    held_out = load_preferences(arguments.validation_file, tokenizer, window) if arguments.validation_file else []
    facts = _facts(arguments, config, len(rows))
    policy = _train(arguments, config, model, tokenizer, rows)
    if policy is None:
        return facts
    round_weights(policy, arguments.store)
    if held_out:
        reference, _ = load(arguments.model, AutoModelForCausalLM)
        reference.to(policy.device)
        facts |= {
            "accuracy": implicit_accuracy(policy, reference, held_out, config.beta, config.per_device_eval_batch_size),
            "validation_pairs": len(held_out),
        }
    save = save_adapter if arguments.lora_rank else save_checkpoint
    with replacing(config.output_dir) as folder:
        save(policy, tokenizer, folder, facts, store=arguments.store)
        if held_out and arguments.figure:
            draw_accuracy(folder, facts, Path(config.output_dir).name)
        write_policy_card(folder, Path(config.output_dir).name, facts)
    return facts


def truncated(rows: Sequence[TokenizedPreference], keep: float) -> Dataset:
    """Rows with the columns of TRL's collator: each response's first tokens, a share `keep` of its own length.

    At least one token stays, and a cut is given no end token: the policy would learn to stop there (Shallow Preference
    Signals, §3.3). `length` is what `train_sampling_strategy: group_by_length` reads.
    """
    examples = []
    for row in rows:
        chosen, rejected = (cut(ids, tokens_at(keep, len(ids))) for ids in (row.chosen, row.rejected))
        length = len(row.prompt) + max(len(chosen), len(rejected))
        examples.append({"prompt_ids": row.prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length})
    return Dataset.from_list(examples)


def _train(
    arguments: DPOArguments,
    config: DPOConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedPreference],
) -> PreTrainedModel | None:
    """The trained model, wrapped by PEFT where an adapter was asked for; None where another process writes it."""
    rank = arguments.lora_rank
    # An alpha of the rank scales the adapter by one, so that the learning rate alone says how far it goes.
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM") if rank else None
    use_cache = model.config.use_cache
    try:
        trainer = (TokenizedDPOTrainer if arguments.method == "dpo" else TokenLevelDPOTrainer)(
            model,
            args=config,
            train_dataset=truncated(rows, arguments.keep),
            processing_class=tokenizer,
            peft_config=lora,
        )
        if isinstance(trainer, TokenLevelDPOTrainer):
            trainer.version, trainer.alpha = (1 if arguments.method == "tdpo1" else 2), arguments.alpha
        policy = train(trainer)
    except (ValueError, NotImplementedError) as error:  # combinations of its settings that TRL refuses
        raise one_line(error) from error
    if policy is not None:
        policy.config.use_cache = use_cache  # switched off for training, and saved with the model that will generate
    return policy


def _check(arguments: DPOArguments, config: DPOConfig) -> None:
    if not 0 < arguments.keep <= 1:
        raise ConfigError(f"keep is a share above 0 and at most 1, not {arguments.keep:g}; 1 keeps whole responses")
    if arguments.lora_rank < 0:
        raise ConfigError(f"lora_rank is at least 0, not {arguments.lora_rank}; 0 trains all weights")
    if arguments.method != "dpo" and config.loss_type != ["sigmoid"]:
        raise ConfigError(f"loss_type is TRL's choice among losses; method {arguments.method} is one of its own")
    if arguments.alpha < 0:
        raise ConfigError(f"alpha is at least 0, not {arguments.alpha:g}; 0 leaves the sequential KL out")
    if arguments.pairs is not None and arguments.pairs < 1:
        raise ConfigError(f"pairs is at least 1, not {arguments.pairs}; without it, all rows are trained on")


def _facts(arguments: DPOArguments, config: DPOConfig, pairs: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": "policy",
        "method": arguments.method,
        "loss": " + ".join(config.loss_type) if arguments.method == "dpo" else arguments.method,
        "keep": arguments.keep,
        "beta": config.beta,
        "model": Path(arguments.model).name,
        "pairs": pairs,
        "learning_rate": config.learning_rate,
        "epochs": config.num_train_epochs,
        "batch": config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size,
        "seed": config.seed,
    }
    if arguments.method == "tdpo2":
        facts["alpha"] = arguments.alpha
    return facts | ({"lora_rank": arguments.lora_rank} if arguments.lora_rank else {})
