"""Options of TRL and transformers that our training would take and ignore: each is refused by its name, with the way
out, before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from steersman.training.errors import ConfigError

_EVALUATION = "nothing is evaluated during training: leave it out; the model is measured on validation_file after it"
_HUB = "nothing is uploaded: leave it out, and upload output_dir with `hf upload` when it is written"

IGNORED: Mapping[str, str] = {
    "dataset_num_proc": "rows are tokenised in one process: leave it out",
    "model_init_kwargs": "models are loaded in float32 as their own config.json has them: leave it out",
    "trust_remote_code": "checkpoints with code of their own are not loaded: leave it out",
    "label_smoothing_factor": "it is of cross-entropy, which is not trained on: use label_smoothing",
    "label_names": "columns are fixed: leave it out",
    "length_column_name": "rows are grouped by their column 'length': leave it out",
    "padding_free": "TRL falls back to padding: leave it out",
    "truncation_mode": "no response is cut, rows longer than max_length are refused: leave it out",
    "max_completion_length": "no response is cut: leave it out; `keep` trains on the beginnings of responses",
    "is_encoder_decoder": "the model is causal: leave it out",
    "generate_during_eval": _EVALUATION,
    **dict.fromkeys(
        (
            *("eval_strategy", "do_eval", "do_predict", "eval_steps", "eval_delay", "eval_on_start"),
            *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics"),
            *("prediction_loss_only", "include_for_metrics", "bf16_full_eval", "fp16_full_eval"),
            *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        ),
        _EVALUATION,
    ),
    **dict.fromkeys(
        (
            *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
            "hub_revision",
        ),
        _HUB,
    ),
}


def check_options(config: Any) -> None:
    """Raises ConfigError for an option, set to another value than its default, that no command has a use for."""
    refuse(config, IGNORED)
    if config.save_strategy == "best":
        raise ConfigError(
            f"save_strategy: best needs evaluations, and {_EVALUATION.replace('leave it out', 'use steps')}"
        )
    if not getattr(config, "sync_ref_model", False):
        without = "it belongs to sync_ref_model: set that to true, or leave it out"
        refuse(config, dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), without))
    if not getattr(config, "precompute_ref_log_probs", False):
        refuse(
            config, {"precompute_ref_batch_size": "it belongs to precompute_ref_log_probs: set that, or leave it out"}
        )


def refuse(options: Any, reasons: Mapping[str, str]) -> None:
    """Raises ConfigError for the first of these options that is not at its default. options: a dataclass's instance,
    which need not have all of them."""
    for field in fields(options):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in reasons and getattr(options, field.name) != default:
            raise ConfigError(f"{field.name}: {reasons[field.name]}")
