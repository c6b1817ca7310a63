"""Preference rows: what is read, and what a bad row is told."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from steersman.training.data.preferences import DataError, load_preferences, load_tokenizer, read_preferences
from tests.support.preferences import GOOD, build_word_tokenizer, said, token_ids, write_rows


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_word_tokenizer()


def write(folder: Path, *rows: Any) -> Path:
    return write_rows(folder / "rows.jsonl", *rows)


def test_text_rows_end_with_one_end_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, GOOD | {"extra": 1}, "", GOOD | {"rejected": "e <eos>"})
    for row in load_preferences(path, tokenizer, window=8):
        assert (row.prompt, row.chosen) == (token_ids("a b"), token_ids("c d <eos>"))
        assert row.rejected == token_ids("e <eos>")
        assert row.longer == 3


def test_chat_rows_are_rendered_up_to_the_response_and_through_its_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"prompt": said("user", "a b"), "chosen": said("assistant", "c d"), "rejected": said("assistant", "e")}
    (read,) = load_preferences(write(tmp_path, row), tokenizer, window=16)
    assert read.prompt == token_ids("<turn> a b <eos> <turn>")
    assert (read.chosen, read.rejected) == (token_ids("c d <eos>"), token_ids("e <eos>"))


@pytest.mark.parametrize("prompt", [{}, {"prompt": "a b"}], ids=["no prompt", "its text"])
def test_whole_conversations_share_their_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, prompt: dict[str, str]
) -> None:
    user = said("user", "a b")
    implicit = prompt | {"chosen": user + said("assistant", "c d"), "rejected": user + said("assistant", "e")}
    explicit = {"prompt": user, "chosen": said("assistant", "c d"), "rejected": said("assistant", "e")}
    one, other = load_preferences(write(tmp_path, implicit, explicit), tokenizer, window=16)
    assert one == other


def test_whole_texts_share_their_prompt_to_the_character(tmp_path: Path) -> None:
    path = write(tmp_path, {"chosen": "Hello. Yes", "rejected": "Hello. No"})
    (row,) = read_preferences(path)
    assert (row.prompt, row.chosen, row.rejected) == ("Hello.", " Yes", " No")


@pytest.mark.parametrize("tools", [[{"name": "g"}], '[{"name": "g"}]'], ids=["tools", "their JSON"])
def test_tools_and_options_go_to_the_chat_template(tmp_path: Path, tools: Any) -> None:
    template = "{{ tools[0].name + ' ' + word + ' ' }}{%- for m in messages -%}{{ m.content + ' ' }}{%- endfor -%}"
    row = {"prompt": said("user", "a"), "chosen": said("assistant", "c"), "rejected": said("assistant", "e")}
    path = write(tmp_path, row | {"tools": tools, "chat_template_kwargs": {"word": "f"}})
    (read,) = load_preferences(path, build_word_tokenizer(chat_template=template), window=16)
    assert (read.prompt, read.chosen) == (token_ids("g f a"), token_ids("c <eos>"))


def test_scores_and_strength_are_carried_through(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, GOOD | {"score_chosen": 7, "score_rejected": -1.5, "strength": 3}, GOOD | {"strength": None})
    scored, plain = load_preferences(path, tokenizer, window=8)
    assert (scored.score_chosen, scored.score_rejected, scored.strength) == (7, -1.5, 3)
    assert (plain.score_chosen, plain.score_rejected, plain.strength) == (None, None, None)
    with pytest.raises(DataError, match=":2: 'strength' is missing"):
        load_preferences(path, tokenizer, window=8, needed=["strength"])


def test_no_file_and_no_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_preferences(tmp_path / "absent.jsonl", tokenizer, window=8)
    with pytest.raises(DataError, match="no rows"):
        load_preferences(write(tmp_path, ""), tokenizer, window=8)


def test_a_tokenizer_needs_an_end_token_and_readable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no end token"):
        load_preferences(write(tmp_path, GOOD), build_word_tokenizer(eos_token=None), window=8)
    build_word_tokenizer().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="broken can't be loaded"):
        load_tokenizer(str(tmp_path / "broken"))
