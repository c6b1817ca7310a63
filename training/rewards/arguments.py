"""What `steersman train reward` is given beyond TRL's RewardConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trl.trainer.reward_config import RewardConfig

from steersman.training.configuration import ConfigError, RunArguments
from steersman.training.heads.arguments import RANK, WIDTH, HeadArguments, check_head, refuse_head_options
from steersman.training.options import refuse

Objective = Literal[
    "partial", "full", "truncated", "vocabulary", "distilled", "prefix_value", "regression", "scaled", "aspects", "head"
]

HeadTarget = Literal["pairs", "ratings", "teacher"]

WITHOUT_LABELS = ("distilled", "prefix_value", "regression", "aspects")


@dataclass(kw_only=True)
class ObjectiveArguments:
    """What decides which configuration the rest is read into."""

    objective: Objective = field(
        default="partial",
        metadata={
            "help": "partial: PARGS's equation 4, on prefixes. full: on whole responses. truncated: on the beginnings "
            "of responses. vocabulary: partial, with one output for every next token, from a causal language model. "
            "distilled: the same outputs, taught by a teacher. prefix_value: every prefix of an answer of the policy "
            "learns the answer's reward. regression: the ratings score_chosen and score_rejected of whole responses. "
            "scaled: full, every pair times its strength. aspects: the scores of segments, with one output for every "
            "aspect. head: one output for every next token, on the hidden states of the base model itself, which is "
            "frozen; towards head_target."
        },
    )


@dataclass
class RewardArguments(HeadArguments, ObjectiveArguments, RunArguments):
    """What is trained on what. Everything else is TRL's RewardConfig: learning_rate, output_dir, …"""

    model: str = field(
        metadata={
            "help": "Checkpoint to start from: a causal language model or a reward model. With objective=head the base "
            "model that will be steered."
        }
    )
    train_file: str = field(
        metadata={
            "help": "Preference pairs: JSON lines, Parquet, a folder, or a Hub dataset (org/name:split). With "
            "objective=prefix_value rows with prompt, response and reward, or prompts that policy answers. With "
            "head_target=ratings such rows, or pairs with score_chosen and score_rejected."
        }
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Preference pairs; accuracy by prefix length is measured on them."}
    )
    # Half of a policy head's, which guides as well and costs less in every step.
    head_width: int = field(default=128, kw_only=True, metadata=WIDTH)
    head_rank: int = field(default=64, kw_only=True, metadata=RANK)
    head_target: HeadTarget = field(
        default="pairs",
        metadata={
            "help": "With objective=head. pairs: Bradley-Terry on prefixes of equal length. ratings: every prefix of "
            "an answer is trained towards the answer's rating. teacher: a reward model's rewards of the base's top_k "
            "likeliest tokens."
        },
    )
    keep: float | None = field(
        default=None,
        metadata={
            "help": "With objective=truncated or head, what is kept of each response from its start: up to 1 a share "
            "of its tokens, above 1 a number of tokens. By default .5 with truncated, everything with head."
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of labels that are taken to be wrong: from 0 to below 0.5."}
    )
    prefixes: Literal["subset", "causal"] = field(
        default="subset",
        metadata={
            "help": "subset: a random subset of all partial sequences, each its own row. causal: many prefixes of a "
            "pair from one forward pass; needs a causal model."
        },
    )
    subset_ratio: float = field(default=1.5, metadata={"help": "Partial sequences a pair, with prefixes=subset."})
    prefixes_per_pair: int = field(
        default=10,
        metadata={
            "help": "Prefixes a pair, with prefixes=causal and with objectives vocabulary, distilled and head (there "
            "of rated answers too); 0 trains on all of them."
        },
    )
    policy: str | None = field(
        default=None,
        metadata={
            "help": "The language model that will be steered. With objective=distilled, its top_k likeliest tokens are "
            "what the teacher scores; with prefix_value, it answers the prompts of train_file."
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Reward model to learn from. With objective=distilled, a causal one trained on prefixes, and with "
            "head_target=teacher one with a vocabulary head too; with prefix_value, any that scores whole answers."
        },
    )
    top_k: int = field(
        default=10,
        metadata={
            "help": "With objective=distilled, the policy's tokens at a prefix; with head_target=teacher, the base's."
        },
    )
    weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "With objective=aspects, aspect → weight in the reward that the server steers by; 2D-DPO's five by "
            "default: helpfulness .3, correctness .4, safety, completeness and clarity .1 each."
        },
    )
    aspects_at: Literal["tokens", "segments"] = field(
        default="tokens",
        metadata={
            "help": "With objective=aspects, where a segment's scores are learned. tokens: at all of its tokens, for a "
            "model that steers. segments: at its last token alone (2D-DPO), for a model that scores whole segments "
            "only, as in train iterate: more exact there, but what it says within a segment is arbitrary."
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Train a LoRA adapter of this rank on all linear layers, and the output head; it is merged into "
            "the weights that are saved. 0 trains all weights."
        },
    )
    store: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the weights' file; accuracy is measured on what it keeps."}
    )

    @property
    def kept(self) -> float:
        """`keep`, or what it is by default."""
        return (0.5 if self.objective == "truncated" else 1.0) if self.keep is None else self.keep


_OBJECTIVES: dict[str, tuple[Objective, ...]] = {
    "keep": ("truncated", "head"),
    "head_target": ("head",),
    "prefixes": ("partial",),
    "subset_ratio": ("partial",),
    "prefixes_per_pair": ("partial", "vocabulary", "distilled", "head"),
    "policy": ("distilled", "prefix_value"),
    "teacher": ("distilled", "prefix_value", "head"),
    "top_k": ("distilled", "head"),
    "weights": ("aspects",),
    "aspects_at": ("aspects",),
}
"""Options that belong to some objectives only."""


def check_center(arguments: RewardArguments, config: RewardConfig) -> None:
    """Raises ConfigError where TRL's term that centers rewards would be left out of the loss."""
    if arguments.objective in WITHOUT_LABELS:
        reason = f"objective {arguments.objective} has ratings, which fix the rewards' mean: leave it out"
        refuse(config, {"center_rewards_coefficient": reason})


def check(arguments: RewardArguments) -> None:
    """Raises ConfigError for a value out of range, or one that the objective has no use for."""
    if arguments.subset_ratio <= 0 or arguments.prefixes_per_pair < 0:
        raise ConfigError("subset_ratio is above 0 and prefixes_per_pair at least 0, which is all")
    if arguments.kept <= 0 or (arguments.kept > 1 and arguments.kept != int(arguments.kept)):
        raise ConfigError(
            f"keep is a share above 0 and at most 1, or a whole number of tokens above 1, not {arguments.kept:g}"
        )
    if arguments.top_k < 1:
        raise ConfigError(f"top_k is at least 1, not {arguments.top_k}")
    if arguments.objective == "distilled" and not (arguments.teacher and arguments.policy):
        raise ConfigError("objective distilled needs teacher, a reward model, and policy, the model to be steered")
    if arguments.objective == "prefix_value" and bool(arguments.teacher) != bool(arguments.policy):
        raise ConfigError(
            "policy answers the prompts and teacher rewards the answers: give both, or neither for rows "
            "with prompt, response and reward"
        )
    if arguments.lora_rank < 0:
        raise ConfigError(f"lora_rank is at least 0, not {arguments.lora_rank}; 0 trains all weights")
    if not 0 <= arguments.label_smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing is from 0 to below 0.5, not {arguments.label_smoothing:g}: of labels that are wrong half "
            "of the time nothing can be learned"
        )
    if arguments.label_smoothing and arguments.objective in WITHOUT_LABELS:
        raise ConfigError(f"label_smoothing is of objectives that learn from labels, {arguments.objective} does not")
    _check_objective(arguments)
    if arguments.objective == "head":
        _check_head_target(arguments)
    else:
        refuse_head_options(arguments, "objective head")


def _check_head_target(arguments: RewardArguments) -> None:
    """Raises ConfigError for an option that the target of a head has no use for, or one that it lacks."""
    target = arguments.head_target
    check_head(arguments)
    if target != "teacher":
        reason = f"it belongs to head_target teacher, not {target}: leave it out"
        refuse(arguments, {"teacher": reason, "top_k": reason})
    elif not arguments.teacher:
        raise ConfigError("head_target teacher needs teacher, a reward model of the base's tokens")
    if target != "pairs" and arguments.label_smoothing:
        raise ConfigError(f"label_smoothing is of head_target pairs, which learns from labels; {target} does not")
    fixed = "a head's weights are stored in float16 and float32: leave it out"
    refuse(arguments, {"lora_rank": "the base is frozen: leave it out", "store": fixed})


def _check_objective(arguments: RewardArguments) -> None:
    for name, objectives in _OBJECTIVES.items():
        if arguments.objective not in objectives:
            belongs = f"it belongs to objective {' and '.join(objectives)}, not {arguments.objective}: leave it out"
            refuse(arguments, {name: belongs})
    if arguments.objective == "partial":
        other, own = ("subset_ratio", "causal") if arguments.prefixes == "causal" else ("prefixes_per_pair", "subset")
        refuse(arguments, {other: f"it has no part in prefixes: {own}: leave it out, or choose the other prefixes"})
