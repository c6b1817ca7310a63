"""Reward models whose tokenizer is not the base's: with a chat template of its own, or an encoder of two segments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from tests.support.tiny import COMMON, randomise

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for call in m.get('tool_calls') or [] %}"
    "call {{ call['function']['name'] }}({{ call['function']['arguments']['town'] }}){% endfor %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"]


def save_foreign(folder: Path, seed: int = 21, template: str | None = CHAT_TEMPLATE, window: int = 512) -> Path:
    """A Llama classifier with another tokenizer."""
    config = transformers.LlamaConfig(
        **{**COMMON, "vocab_size": 300, "num_labels": 1, "max_position_embeddings": window}
    )
    return _save(config, folder, seed, template)


def save_pair_encoder(folder: Path, seed: int = 22) -> Path:
    """A BERT classifier whose tokenizer has no chat template and marks two segments."""
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=256, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    return _save(config, folder, seed, None)


def chat_reward(folder: Path, messages: Sequence[dict[str, Any]], answer: str, template: str | None = None) -> float:
    """transformers alone: the template over the messages and the unfinished answer."""
    model, tokenizer = _load(folder)
    chat = [*messages, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, **({"continue_final_message": True} if answer else {})
    )
    if not answer:
        text = text[: text.rindex("<|end|>")]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    return _reward(model, ids)


def text_reward(folder: Path, text: str, pair: str | None = None) -> float:
    """transformers alone: one text, or two segments."""
    model, tokenizer = _load(folder)
    return _reward(model, tokenizer(text, pair, return_tensors="pt"))


def _load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _reward(model: Any, encoded: Any) -> float:
    with torch.inference_mode():
        return float(model(**encoded).logits[0, 0])


def _save(config: Any, folder: Path, seed: int, template: str | None) -> Path:
    model = AutoModelForSequenceClassification.from_config(config).float()
    randomise(model, seed, spread=0.3).save_pretrained(folder)  # type: ignore[operator]
    _build_tokenizer(template).save_pretrained(folder)
    return folder


def _build_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["where is the old harbour in the morning, and who sails there tonight"], trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=512
    )
    fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"] if template is None else [
        "input_ids", "attention_mask"
    ]  # fmt: skip
    if template is not None:
        fast.chat_template = template
    return fast
