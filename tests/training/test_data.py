"""Preference rows: what is read, and what a bad row is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steersman.training.data import DataError, load_preferences

WORDS = ["<pad>", "<eos>", "<turn>", "<unk>", *"abcdefgh"]
TEMPLATE = (
    "{%- for m in messages -%}{{ '<turn> ' + m.content + ' <eos> ' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<turn> ' }}{%- endif -%}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


GOOD = {"prompt": "a b", "chosen": "c d", "rejected": "e", "extra": 1}


def test_text_rows_end_with_one_end_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, GOOD, "", GOOD | {"rejected": "e <eos>"})
    for row in load_preferences(path, tokenizer, window=8):
        assert (row.prompt, row.chosen, row.rejected) == (ids("a b"), ids("c d <eos>"), ids("e <eos>"))
        assert row.longer == 3


def test_chat_rows_are_rendered_up_to_the_response_and_through_its_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    row = {"prompt": said("user", "a b"), "chosen": said("assistant", "c d"), "rejected": said("assistant", "e")}
    (read,) = load_preferences(write(tmp_path, row), tokenizer, window=16)
    assert read.prompt == ids("<turn> a b <eos> <turn>")
    assert (read.chosen, read.rejected) == (ids("c d <eos>"), ids("e <eos>"))


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        (GOOD | {"chosen": "  "}, "'chosen' is empty"),
        (GOOD | {"rejected": ""}, "'rejected' is empty"),
        (GOOD | {"chosen": 3}, "all text or all lists"),
        (GOOD | {"chosen": [{"role": "assistant", "content": "c"}]}, "all text or all lists"),
        (GOOD | {"rejected": "c d e f g h"}, "'rejected' have 9 tokens, the window 8"),
        ([1, 2], "a row is an object"),
        ('{"prompt": ', "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, bad: Any, complaint: str
) -> None:
    path = write(tmp_path, GOOD, "", bad)
    with pytest.raises(DataError) as error:
        load_preferences(path, tokenizer, window=8)
    assert str(error.value).startswith(f"{path}:3: ")
    assert complaint in str(error.value)


def test_no_file_and_no_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_preferences(tmp_path / "absent.jsonl", tokenizer, window=8)
    with pytest.raises(DataError, match="no rows"):
        load_preferences(write(tmp_path, ""), tokenizer, window=8)
