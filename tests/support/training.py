"""A task that any model learns in seconds, as files: pairs in which kind words win, and a random model to train."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from steersman.training.data.segments import ASPECTS
from steersman.training.world.grammar import draw_prompts
from steersman.training.world.tokenizer import train_tokenizer

KIND = (" You are kind .", " We thank you .", " You are very kind and we thank you .")
RUDE = (" You are rude .", " We blame you .", " You are very rude and we blame you .")
VOCABULARY = 500


def write_task(folder: Path, **changes: Any) -> Path:
    """`model` (a random causal language model with tokenizer) and `pairs.jsonl`; `changes` are the model's."""
    prompts = [prompt.text for prompt in draw_prompts("base", 600)]
    tokenizer = train_tokenizer([*prompts, *KIND, *RUDE], vocabulary=VOCABULARY)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
    }
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **changes)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [_row(prompt, KIND[n % 3], RUDE[n // 3 % 3], n) for n, prompt in enumerate(prompts[:64])]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder


def _row(prompt: str, chosen: str, rejected: str, number: int) -> dict[str, Any]:
    """With scores of both, and each as segments, a word or two of which speak for it."""
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": 5 + number % 7,
        "score_rejected": 2,
        "chosen_segments": _segments(chosen),
        "rejected_segments": _segments(rejected),
    }


def _segments(response: str) -> list[dict[str, Any]]:
    """Three words each; what is kind scores 4 in every aspect, what is rude 0, and else 2."""
    words = re.findall(r" \S+", response)
    texts = ["".join(words[start : start + 3]) for start in range(0, len(words), 3)]
    kind, rude = ({"kind", "thank"}, {"rude", "blame"})
    scores = [2 + 2 * bool(kind & set(text.split())) - 2 * bool(rude & set(text.split())) for text in texts]
    return [{"text": text, "scores": dict.fromkeys(ASPECTS, score)} for text, score in zip(texts, scores, strict=True)]


def write_config(folder: Path, **keys: Any) -> Path:
    """A YAML file that trains on the task for three epochs; `keys` go over it."""
    config = {
        "model": str(folder / "model"),
        "train_file": str(folder / "pairs.jsonl"),
        "validation_file": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "trained"),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | keys, sort_keys=False), encoding="utf-8")
    return path
