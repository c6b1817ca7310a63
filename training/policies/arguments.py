"""What `steersman train dpo` is given beyond TRL's configuration of the method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from steersman.training.configuration import ConfigError, RunArguments
from steersman.training.heads.arguments import HeadArguments, check_head, refuse_head_options

MethodName = Literal["dpo", "tdpo1", "tdpo2", "1d", "2d", "kto", "orpo", "simpo"]


@dataclass
class MethodArguments:
    """What decides which configuration the rest is read into."""

    method: MethodName = field(
        default="dpo",
        metadata={
            "help": "dpo: TRL's losses, chosen by loss_type. tdpo1, tdpo2: token-level DPO, which holds the sequential "
            "KL of both responses beside their rewards. 2d, 1d: DPO by segments that are scored by aspect, or by one "
            "aspect. kto: TRL's, on each response by itself. orpo, simpo: TRL's, without a reference model."
        },
    )
    head: bool = field(
        default=False,
        metadata={
            "help": "Train a head on the hidden states of the base, which is frozen, in place of a model: methods dpo, "
            "kto, orpo and simpo."
        },
    )


@dataclass(kw_only=True)
class DPOArguments(HeadArguments, MethodArguments, RunArguments):
    """What is trained on what. Everything else is the method's configuration, TRL's with a few keys more: beta,
    loss_type, learning_rate, output_dir, …"""

    model: str = field(metadata={"help": "Causal language model to start from; it is the reference too."})
    train_file: str = field(
        metadata={"help": "Preference pairs: JSON lines, Parquet, a folder, or a Hub dataset (org/name:split)."}
    )
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
    curriculum: Literal["none", "easy_first"] = field(
        default="none",
        metadata={
            "help": "easy_first: in every epoch the pairs whose score_chosen and score_rejected differ most come first "
            "(Curry-DPO); none: in random order."
        },
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Train a LoRA adapter of this rank on all linear layers; 0 trains all weights."}
    )
    store: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the weights' file; accuracy is measured on what it keeps."}
    )


def check(arguments: DPOArguments) -> None:
    """Raises ConfigError for a value out of range."""
    if not 0 < arguments.keep <= 1:
        raise ConfigError(f"keep is a share above 0 and at most 1, not {arguments.keep:g}; 1 keeps whole responses")
    if arguments.lora_rank < 0:
        raise ConfigError(f"lora_rank is at least 0, not {arguments.lora_rank}; 0 trains all weights")
    if arguments.pairs is not None and arguments.pairs < 1:
        raise ConfigError(f"pairs is at least 1, not {arguments.pairs}; without it, all rows are trained on")
    if arguments.head:
        check_head(arguments)
    else:
        refuse_head_options(arguments, "head: true")
