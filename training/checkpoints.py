"""Checkpoints as Hugging Face folders: safetensors, the facts of their training in config.json, a model card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steersman.guidance.head_files import POLICY

PICTURE = "accuracy.png"
FACTS = "steersman"  # the key of the facts in config.json


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    facts: dict[str, Any],
    *,
    store: str = "float32",
) -> None:
    """Writes weights in `store` precision, config with facts, and tokenizer.

    config.json keeps the precision the model computes in, so that a bfloat16 file of a float32 model loads in float32
    with exactly the values that were stored.
    """
    computes_in = str(model.dtype).removeprefix("torch.")
    setattr(model.config, FACTS, facts)
    with _stored_as(model, store):
        model.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)
    _follow_umask(folder, "model.safetensors")
    _set_config(folder, "dtype", computes_in)


def save_adapter(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path, facts: dict[str, Any], *, store: str = "float32"
) -> None:
    """Writes a PEFT model's adapter in `store` precision, and the facts in a config.json of the model it belongs to."""
    computes_in = str(model.dtype).removeprefix("torch.")
    with _stored_as(model, store):
        # Embeddings are not adapted; left to itself, PEFT asks the Hub whether they were resized.
        model.save_pretrained(folder, save_embedding_layers=False)
    model.config.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)
    _follow_umask(folder, "adapter_model.safetensors")
    _set_config(folder, "dtype", computes_in)
    _set_config(folder, FACTS, facts)


def _follow_umask(folder: str | Path, weights: str) -> None:
    """Lets those read the weights who may read the checkpoint's config.json: safetensors writes for the owner alone."""
    (Path(folder) / weights).chmod((Path(folder) / "config.json").stat().st_mode)


@contextmanager
def _stored_as(model: Any, store: str) -> Iterator[None]:
    """Has what was trained in `store` precision for a while. The rest stays as it is: what is frozen or computed, such
    as rotary frequencies, would not come back from a lower precision, and the model is measured after it is saved."""
    trained = {parameter: parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(getattr(torch, store))
    try:
        yield
    finally:
        for parameter, computes_in in trained.items():
            parameter.data = parameter.data.to(computes_in)


def round_weights(model: PreTrainedModel, store: str) -> None:
    """Rounds what was trained, in place, to what a file of `store` precision keeps; the model's own precision stays."""
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.data = parameter.data.to(getattr(torch, store)).to(parameter.dtype)


def add_facts(folder: str | Path, facts: dict[str, Any]) -> None:
    """Adds facts to a saved checkpoint's config.json."""
    _set_config(folder, FACTS, read_facts(folder) | facts)


def read_facts(folder: str | Path) -> dict[str, Any]:
    facts = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get(FACTS, {})
    assert isinstance(facts, dict)
    return facts


def write_reward_card(folder: str | Path, name: str, facts: dict[str, Any], seen: str) -> None:
    """A short README.md: what the model was trained on (`seen`, in words), how well it does, how to serve it."""
    lines = [
        f"# {name}",
        "",
        f"Reward model for token-level guidance, trained on {seen}, starting from `{facts['model']}`.",
        f"Loss: {facts['loss']}. Learning rate {facts['learning_rate']:g}, {facts['epochs']:g} epochs, "
        f"batch {facts['batch']}, seed {facts['seed']}.",
    ]
    lines += [*_accuracy_table(folder, facts), *_aspect_table(facts), ""]
    lines += ["```", f"steersman serve MODEL --reward-model {name}=PATH_OF_THIS_FOLDER", "```", ""]
    (Path(folder) / "README.md").write_text("\n".join(lines), encoding="utf-8")


_METHODS = {
    "dpo": "direct preference optimisation",
    "tdpo1": "token-level direct preference optimisation",
    "tdpo2": "token-level direct preference optimisation",
    "1d": "direct preference optimisation by segments that are scored by one aspect (1D-DPO)",
    "2d": "direct preference optimisation by segments that are scored by aspect (2D-DPO)",
    "kto": "KTO",
    "orpo": "ORPO",
    "simpo": "SimPO",
}
_WITHOUT_REFERENCE = ("orpo", "simpo")
_SETTINGS = ("weights", "alpha", "simpo_gamma", "cpo_alpha", "sft_weight", "curriculum")
"""Facts of some methods that belong to the loss."""


def write_policy_card(folder: str | Path, name: str, facts: dict[str, Any]) -> None:
    """A short README.md: what the policy was trained on, how well its implicit reward does, how to serve it."""
    seen = "whole responses" if facts["keep"] == 1 else f"the first {100 * facts['keep']:g} % of every response"
    trained = f"LoRA adapter of rank {facts['lora_rank']}" if "lora_rank" in facts else "All weights"
    settings = "".join(f", {name} {_shown(facts[name])}" for name in _SETTINGS if name in facts)
    lines = [
        f"# {name}",
        "",
        f"Policy trained by {_METHODS[facts['method']]} on {seen} ({facts['pairs']} pairs), starting from "
        f"`{facts['model']}`{'' if facts['method'] in _WITHOUT_REFERENCE else ', which is its reference'}.",
        f"{trained}. Loss: {facts['loss']}, β {facts['beta']:g}{settings}. Learning rate {facts['learning_rate']:g}, "
        f"{facts['epochs']:g} epochs, batch {facts['batch']}, seed {facts['seed']}.",
        *_accuracy_table(folder, facts, of=" of the implicit reward β log π/π_ref"),
    ]
    lines += ["", "```", f"steersman serve MODEL --policy {name}=PATH_OF_THIS_FOLDER", "```", ""]
    (Path(folder) / "README.md").write_text("\n".join(lines), encoding="utf-8")


def write_head_card(folder: str | Path, name: str, role: str, facts: dict[str, Any], seen: str) -> None:
    """A short README.md of a head: what it was trained on (`seen`, in words), how well it does, how to serve it."""
    policy = role == POLICY
    kind, option = ("Policy", "--policy") if policy else ("Reward model", "--reward-model")
    settings = "".join(f", {name} {_shown(facts[name])}" for name in ("beta", *_SETTINGS) if name in facts)
    chosen = f" (the weights of epoch {facts['best_epoch']} are kept)" if "best_epoch" in facts else ""
    lines = [
        f"# {name}",
        "",
        f"{kind} as a head on the hidden states of `{facts['model']}`, which alone it can guide, trained on {seen}.",
        f"Loss: {facts['loss']}{settings}. Width {facts['width']}, rank {facts['rank']}, dropout {facts['dropout']:g}, "
        f"learning rate {facts['learning_rate']:g}, {facts['epochs']:g} epochs{chosen}, batch {facts['batch']}, seed "
        f"{facts['seed']}.",
        *_accuracy_table(folder, facts, of=" of the implicit reward β log π/π_ref" if policy else ""),
    ]
    if "spread" in facts:
        lines += [
            "",
            f"Over the base's 10 likeliest tokens its outputs have a standard deviation of {facts['spread']:g}: "
            "guidance with `beta` moves their log-probabilities by about `beta` times that.",
        ]
    lines += ["", "```", f"steersman serve {facts['model']} {option} {name}=PATH_OF_THIS_FOLDER", "```", ""]
    (Path(folder) / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _shown(value: Any) -> str:
    return " ".join(f"{name} {part:g}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def _accuracy_table(folder: str | Path, facts: dict[str, Any], of: str = "") -> list[str]:
    """Lines of Markdown, none where nothing was measured; and the picture, if the folder has it."""
    if "accuracy" not in facts:
        return []
    shares = facts["accuracy"].items()
    return [
        "",
        f"Accuracy{of} on {facts['validation_pairs']} held-out labels, both responses cut at the same token:",
        "",
        "| share of the longer response | " + " | ".join(f"{100 * float(share):g} %" for share, _ in shares) + " |",
        "|---|" + "---|" * len(facts["accuracy"]),
        "| accuracy | " + " | ".join(f"{value:.3f}" for _, value in shares) + " |",
        *(["", f"![Accuracy over prefix length]({PICTURE})"] if (Path(folder) / PICTURE).exists() else []),
    ]


def _aspect_table(facts: dict[str, Any]) -> list[str]:
    """Lines of Markdown, none for a model without aspects."""
    if "aspects" not in facts:
        return []
    errors, deviations = facts.get("aspect_error", {}), facts.get("aspect_deviation", {})
    return [
        "",
        "The server steers by the weighted sum of its outputs. Error: root mean squared, on held-out segments.",
        "",
        "| aspect | weight | error | deviation of scores |",
        "|---|---|---|---|",
        *(
            f"| {aspect} | {weight:g} | {errors.get(aspect, '')} | {deviations.get(aspect, '')} |"
            for aspect, weight in zip(facts["aspects"], facts["weights"], strict=True)
        ),
    ]


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Without the white space that makes up half of its file."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer.json"
    if path.exists():
        compact = json.dumps(json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False, separators=(",", ":"))
        path.write_text(compact, encoding="utf-8")


def _set_config(folder: str | Path, key: str, value: Any) -> None:
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {key: value}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
