"""`steersman train dpo --head`: a policy as a head that changes the frozen base's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from steersman.guidance.head_files import POLICY, HeadCheckpoint
from steersman.guidance.heads import Head
from steersman.training.accuracy import accuracy_of
from steersman.training.configuration import ConfigError, log_data, prepare_tokenizer
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.heads.arguments import (
    HeadPolicyConfig,
    HeadSimPOConfig,
    check_head_config,
)
from steersman.training.heads.examples import read_pair, tokens_of, whole_pair
from steersman.training.heads.features import Features, Reading, compute_features, feature_folder
from steersman.training.heads.frozen_base import READ_TOKENS, FrozenBase, check_tokens
from steersman.training.heads.network import build_network
from steersman.training.heads.policy_losses import PolicyLoss, PolicyLossSettings
from steersman.training.heads.saving import make_probe, write_head
from steersman.training.heads.trainer import HeadTrainer
from steersman.training.options import refuse
from steersman.training.outputs import CHUNK
from steersman.training.policies.arguments import DPOArguments, MethodName
from steersman.training.running import train

CONFIGS: dict[MethodName, type[HeadPolicyConfig]] = {
    "dpo": HeadPolicyConfig,
    "kto": HeadPolicyConfig,
    "orpo": HeadPolicyConfig,
    "simpo": HeadSimPOConfig,
}
"""Of the methods that a head can be trained by."""

_LOSSES = ("sigmoid", "robust", "ipo")
_OF_TRL = (
    *("loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "discopop_tau"),
    *("router_aux_loss_coef", "precompute_ref_log_probs", "sync_ref_model"),
)


def head_config_type(method: MethodName) -> type[HeadPolicyConfig]:
    """The configuration of a method for heads; raises ConfigError for one that has none."""
    if method not in CONFIGS:
        raise ConfigError(f"method {method} does not train heads, {', '.join(CONFIGS)} do: leave head out")
    return CONFIGS[method]


def check_policy_config(arguments: DPOArguments, config: HeadPolicyConfig) -> PolicyLossSettings:
    """The loss that is trained; raises ConfigError for options that have no part in it."""
    check_head_config(config)
    refuse(config, dict.fromkeys(_OF_TRL, "it belongs to TRL's trainer of whole models: leave it out"))
    refuse(
        arguments,
        {
            "lora_rank": "a head is no adapter, and the base is frozen: leave one of the two out",
            "store": "a head's weights are stored in float16 and float32: leave it out",
        },
    )
    (name, *more) = config.loss_type
    if arguments.method == "dpo" and (more or name not in _LOSSES):
        raise ConfigError(f"loss_type is one of {', '.join(_LOSSES)} for a head, not {' '.join(config.loss_type)}")
    if arguments.method != "dpo" and config.loss_type != ["sigmoid"]:
        raise ConfigError(f"loss_type: it is of method dpo; {arguments.method} has a loss of its own: leave it out")
    if config.beta <= 0:
        raise ConfigError(f"beta is above 0, not {config.beta:g}")
    loss: Any = name if arguments.method == "dpo" else arguments.method
    if loss != "robust":
        refuse(config, {"label_smoothing": "it belongs to loss_type robust: choose that, or leave it out"})
    elif not 0 <= config.label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing is from 0 to below 0.5, not {config.label_smoothing:g}")
    return PolicyLossSettings(loss, config.beta, config.label_smoothing, getattr(config, "simpo_gamma", 0.0))


ReadRows = Callable[[DPOArguments, Any, PreTrainedTokenizerBase, int], list[TokenizedPreference]]


def train_policy_head(arguments: DPOArguments, config: HeadPolicyConfig, read: ReadRows) -> dict[str, Any]:
    """Trains, measures and saves a policy head; returns the facts that its file carries.

    read: from arguments, configuration, tokenizer and window, the rows to train on.
    """
    settings = check_policy_config(arguments, config)
    set_seed(config.seed)
    tokenizer = prepare_tokenizer(arguments.model, config)
    window = config.max_length or tokenizer.model_max_length
    rows = read(arguments, config, tokenizer, window)
    held_out = load_preferences(arguments.validation_file, tokenizer, window) if arguments.validation_file else []
    log_data(arguments, len(rows), len(held_out))
    base = _load_base(arguments, config, tokenizer, rows)
    with feature_folder(arguments.feature_cache, config.output_dir) as folder:
        sets = []
        for part, what in ((rows, "train_file"), (held_out, "validation_file")):
            readings = [reading for row in part for reading in read_pair(row)]
            features = compute_features(base, readings, folder, tokens=READ_TOKENS, what=what) if part else None
            sets.append((readings, features))
        (readings, features), (others, measured) = sets
        assert features is not None
        loss = PolicyLoss(settings, base)
        head, trained = _fit(arguments, config, base, loss, (readings, features), (others, measured))
        facts = _facts(arguments, config, settings, len(rows)) | trained
        if measured is not None:
            facts |= {
                "accuracy": _accuracy(head, base, held_out, others, measured),
                "validation_pairs": len(held_out),
            }
    probe = make_probe(base, [reading.ids for reading in readings])
    checkpoint = HeadCheckpoint(head, POLICY, base.facts, probe, facts)
    kept = "whole responses" if arguments.keep == 1 else f"the first {100 * arguments.keep:g} % of every response"
    seen = f"{kept} ({len(rows)} pairs)"
    return write_head(Path(config.output_dir), checkpoint, facts, seen, figure=arguments.figure).facts


def _load_base(
    arguments: DPOArguments,
    config: HeadPolicyConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedPreference],
) -> FrozenBase:
    base = FrozenBase(arguments.model, config.device)
    check_tokens(base, tokenizer)
    base.check_output_layer([[*row.prompt, *row.chosen] for row in rows[:: max(1, len(rows) // 3)][:3]])
    return base


def _fit(
    arguments: DPOArguments,
    config: HeadPolicyConfig,
    base: FrozenBase,
    loss: PolicyLoss,
    data: tuple[list[Reading], Features],
    held_out: tuple[list[Reading], Features | None],
) -> tuple[Head, dict[str, Any]]:
    network = build_network(arguments, base, data[1].moments(), value=False)
    examples, others = (
        [whole_pair(features, readings, n) for n in range(len(readings) // 2)] if features is not None else []
        for readings, features in (data, held_out)
    )
    validation = (held_out[1], others) if held_out[1] is not None else None
    trainer = HeadTrainer(network, config, loss, (data[1], examples), validation)
    return train(trainer).fold(), trainer.describe()


@torch.no_grad()
def _accuracy(
    head: Head,
    base: FrozenBase,
    rows: Sequence[TokenizedPreference],
    readings: Sequence[Reading],
    features: Features,
) -> dict[str, float]:
    """Of the implicit reward: share of the longer response → accuracy."""
    sums = [_log_ratios(head, base, features, readings, n).cumsum(0) for n in range(len(readings))]

    def at_cuts(cuts: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen, rejected = (
            torch.stack([own[min(i, len(own)) - 1] for own, i in zip(sums[side::2], cuts, strict=True)])
            for side in (0, 1)
        )
        return chosen, rejected

    return accuracy_of(at_cuts, rows)


def _log_ratios(head: Head, base: FrozenBase, features: Features, readings: Sequence[Reading], n: int) -> Tensor:
    """log π/π₀ [T] of every token of a response, on the CPU."""
    hidden = features.states[features.starts[n] : features.starts[n + 1]]
    tokens = tokens_of(readings[n]).unsqueeze(1)
    rows = max(1, CHUNK // head.shape.vocabulary)
    found = []
    for part, own in zip(hidden.split(rows), tokens.split(rows), strict=True):
        changes = head(part)
        reference = base.logits(part.to(base.model.device)).log_softmax(dim=-1).cpu()
        found.append(changes.gather(1, own)[:, 0] - (reference + changes).logsumexp(dim=-1))
    return torch.cat(found)


def _facts(
    arguments: DPOArguments, config: HeadPolicyConfig, settings: PolicyLossSettings, pairs: int
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "objective": arguments.method,
        "loss": settings.name,
        "beta": settings.beta,
        "model": Path(arguments.model).name,
        "pairs": pairs,
        "keep": arguments.keep,
        "width": arguments.head_width,
        "dropout": arguments.head_dropout,
        "tokens": arguments.head_tokens,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "epochs": config.num_train_epochs,
        "batch": config.per_device_train_batch_size * config.gradient_accumulation_steps,
        "seed": config.seed,
    }
    if settings.name == "robust":
        facts["label_smoothing"] = settings.label_smoothing
    if settings.name == "simpo":
        facts["simpo_gamma"] = settings.gamma
    if arguments.curriculum != "none":
        facts["curriculum"] = arguments.curriculum
    return facts
