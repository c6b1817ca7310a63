"""Preference data in small: a tokenizer whose tokens are words, and files of rows."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<turn>", "<unk>", *"abcdefgh"]
TEMPLATE = (
    "{%- for m in messages -%}{{ '<turn> ' + m.content + ' <eos> ' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<turn> ' }}{%- endif -%}"
)
GOOD = {"prompt": "a b", "chosen": "c d", "rejected": "e"}


def build_word_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """Words between white space are tokens; `changes` are its settings, None takes one away."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    settings = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **{name: value for name, value in (settings | changes).items() if value is not None}
    )


def token_ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def said(role: str, text: str) -> list[dict[str, str]]:
    """A chat of one message."""
    return [{"role": role, "content": text}]


def write_rows(path: Path, *rows: Any) -> Path:
    """JSON lines; text is written as it is, and so are bytes."""
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
