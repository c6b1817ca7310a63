"""Models of given shapes with random weights: enough to measure speed, and nothing has to be downloaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 128_256

    def config(self, context: int, **changes: Any) -> transformers.LlamaConfig:
        """For sequences of up to `context` tokens."""
        return transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=context,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            **changes,
        )


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8),
    "3b": Shape(3072, 8192, 28, 24, 8),
    "1b": Shape(2048, 8192, 16, 32, 8),
    "0.5b": Shape(896, 4864, 24, 14, 2),
    "tiny": Shape(128, 256, 2, 4, 2, vocabulary=512),
}
"""As Llama 3's, and the smallest as Qwen 2.5's smallest."""


def save_base(folder: Path, shape: Shape, context: int, dtype: torch.dtype) -> Path:
    """A checkpoint without weights: vLLM draws them (`load_format="dummy"`)."""
    config = shape.config(context, architectures=["LlamaForCausalLM"], dtype=dtype)
    config.save_pretrained(folder)
    _save_tokenizer(folder, shape.vocabulary)
    return folder


def save_auxiliary(
    folder: Path, shape: Shape, vocabulary: int, context: int, kind: str, dtype: torch.dtype, device: torch.device
) -> Path:
    """A reward model (`kind` "causal" or "vocabulary") or a policy ("policy") over `vocabulary` tokens."""
    changes: dict[str, Any] = {"steersman": {"kind": "vocabulary"}} if kind == "vocabulary" else {}
    config = shape.config(context, **changes)
    config.vocab_size = vocabulary
    if kind == "causal":
        config.num_labels = 1
    family = transformers.AutoModelForSequenceClassification if kind == "causal" else transformers.AutoModelForCausalLM
    with device:
        model = family.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    _save_tokenizer(folder, vocabulary)
    return folder


def _save_tokenizer(folder: Path, vocabulary: int) -> None:
    words = {f"w{n}": n for n in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1").save_pretrained(folder)
