"""What a training of a head is given beyond what other trainings are, and TRL's configurations with defaults for it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trl.trainer.dpo_config import DPOConfig
from trl.trainer.reward_config import RewardConfig

from steersman.training.configuration import ConfigError
from steersman.training.options import refuse

WIDTH = {"help": "Of a head: units of its perceptron's middle layer, at least 1."}
RANK = {"help": "Of a head: numbers that describe a token, and a hidden state, to each other."}


@dataclass(kw_only=True)
class HeadArguments:
    """Sizes of a head, and where features of the base are kept."""

    head_width: int = field(default=256, metadata=WIDTH)
    head_rank: int = field(default=128, metadata=RANK)
    head_dropout: float = field(
        default=0.3, metadata={"help": "Of a head: share of its middle units left out in a step, from 0 to below 1."}
    )
    head_tokens: Literal["free", "embedding"] = field(
        default="free",
        metadata={
            "help": "Of a head: what describes a token. free: numbers of its own, which only rows that hold the token "
            "train. embedding: a linear map of the base's output embedding, for few rows and large vocabularies."
        },
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Of a head: folder in which the base's hidden states are kept for later trainings on the same "
            "rows; else they lie in output_dir while it is trained. The log shows their size before they are computed."
        },
    )


def check_head(arguments: HeadArguments) -> None:
    """Raises ConfigError for a value out of range."""
    for name in ("head_width", "head_rank"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"{name} is at least 1, not {getattr(arguments, name)}")
    if not 0 <= arguments.head_dropout < 1:
        raise ConfigError(f"head_dropout is from 0 to below 1, not {arguments.head_dropout:g}")


def refuse_head_options(arguments: HeadArguments, needed: str) -> None:
    """Raises ConfigError for an option of heads where none is trained. needed: what trains one."""
    refuse(arguments, {field.name: f"it belongs to {needed}: leave it out" for field in fields(HeadArguments)})


_FIXED = {
    "resume_from_checkpoint": "a head is trained in minutes and writes no checkpoints on the way: leave it out",
    "gradient_checkpointing": "the base is frozen and its hidden states are computed before: leave it out",
    "gradient_checkpointing_kwargs": "the base is frozen and its hidden states are computed before: leave it out",
    "bf16": "a head is trained in float32, on hidden states in the base's own precision: leave it out",
    "fp16": "a head is trained in float32, on hidden states in the base's own precision: leave it out",
    "activation_offloading": "the base is frozen and its hidden states are computed before: leave it out",
    "use_liger_kernel": "no layer of the base is trained: leave it out",
    "torch_compile": "no layer of the base is trained: leave it out",
    "center_rewards_coefficient": "a head has no such term: leave it out",
}


def check_head_config(config: Any) -> None:
    """Raises ConfigError for options of TRL or transformers that have no part in the training of a head."""
    refuse(config, _FIXED)
    if config.save_strategy != "no":
        raise ConfigError("save_strategy: a head is trained in minutes and writes no checkpoints on the way: use no")
    if config.world_size > 1:
        raise ConfigError("a head is trained by one process: run the command without accelerate launch")
    if config.train_sampling_strategy not in ("random", "sequential"):
        raise ConfigError(
            "train_sampling_strategy: places of hidden states are not padded, so that "
            f"{config.train_sampling_strategy} saves nothing: leave it out"
        )


@dataclass
class _HeadDefaults:
    """Defaults of TRL's options that suit a head."""

    learning_rate: float = 2e-3
    num_train_epochs: float = 8.0
    per_device_train_batch_size: int = 32
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    weight_decay: float = 0.01
    gradient_checkpointing: bool = False
    bf16: bool | None = False
    save_strategy: str = "no"


@dataclass
class HeadRewardConfig(_HeadDefaults, RewardConfig):
    """TRL's, for a reward head."""


@dataclass
class HeadPolicyConfig(_HeadDefaults, DPOConfig):
    """TRL's of DPO, for a policy head."""

    num_train_epochs: float = 4.0


@dataclass
class HeadSimPOConfig(HeadPolicyConfig):
    """With SimPO's margin, and β as in its paper (§4)."""

    beta: float = 2.0
    simpo_gamma: float = field(default=0.5, metadata={"help": "SimPO's margin between the two responses' rewards."})
