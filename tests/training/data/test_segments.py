"""Segments of a response and their tokens."""

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steersman.training.data.preferences import DataError, load_preferences
from steersman.training.data.segments import SegmentedResponse
from tests.support.preferences import build_word_tokenizer, said, token_ids, write_rows

BASE = Path(__file__).parents[3] / "training" / "world" / "models" / "base"
ASPECTS = ("clarity", "safety")
ALPHABET = ["come", *"abcdef ABC", " The", " customer", "é", "日", "👩‍🚀", "\n", "\n\n", "...", "!", '"', "  "]


def draw_segments(rng: random.Random) -> list[dict[str, Any]]:
    """Every segment has a word of its own, so that no token holds one whole, and may end within one."""
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 12))) + " xyz wel" for _ in range(rng.randint(1, 6))]
    return [{"text": text, "scores": {"safety": rng.randint(0, 4), "clarity": rng.random() * 4}} for text in texts]


def owners_by_hand(segments: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """For every token, the segment in which its last character lies."""
    letters = [number for number, segment in enumerate(segments) for _ in segment["text"]]
    encoding = tokenizer("".join(s["text"] for s in segments), add_special_tokens=False).encodings[0]
    return [letters[encoding.token_to_chars(token)[1] - 1] for token in range(len(encoding.ids))]


def row_of(chosen: Any, rejected: Any, *segments: list[dict[str, Any]]) -> dict[str, Any]:
    prompt = "a b" if isinstance(chosen, str) else said("user", "a b")
    fields = dict(zip(("chosen_segments", "rejected_segments"), segments, strict=True))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | fields


def test_every_token_belongs_to_the_segment_of_its_last_character(tmp_path: Path, rng: random.Random) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    drawn = [(draw_segments(rng), draw_segments(rng)) for _ in range(50)]
    texts = [["".join(s["text"] for s in segments) for segments in pair] for pair in drawn]
    path = write_rows(tmp_path / "rows", *(row_of(*text, *pair) for text, pair in zip(texts, drawn, strict=True)))
    straddling = 0
    for row, pair in zip(load_preferences(path, tokenizer, 10_000, aspects=ASPECTS), drawn, strict=True):
        for ids, read, segments in (
            (row.chosen, row.chosen_segments, pair[0]),
            (row.rejected, row.rejected_segments, pair[1]),
        ):
            owners = owners_by_hand(segments, tokenizer)
            assert read
            assert read.ends[-1] == len(ids) == len(owners) + 1  # the end token
            assert read.ends[:-1] == [sum(owner <= k for owner in owners) for k in range(len(segments) - 1)]
            assert read.scores == [[s["scores"]["clarity"], s["scores"]["safety"]] for s in segments]
            straddling += sum("wel" + s["text"][:4] == "welcome" for s in segments[1:])
    assert straddling, "no token straddled two segments"


def test_a_token_across_a_border_goes_to_the_later_segment(tmp_path: Path) -> None:
    segments = [{"text": "c da", "scores": {"clarity": 1}}, {"text": "b e ", "scores": {"clarity": 4}}]
    path = write_rows(tmp_path / "rows", row_of("c dab e ", "c dab e ", segments, segments))
    (row,) = load_preferences(path, build_word_tokenizer(), 16, aspects=["clarity"])
    assert row.chosen_segments == SegmentedResponse(ends=[1, 4], scores=[[1.0], [4.0]])


def test_what_a_chat_template_puts_around_a_response_goes_to_its_ends(tmp_path: Path) -> None:
    template = (
        "{%- for m in messages -%}{{ '<turn> ' }}{%- if m.role == 'assistant' -%}{{ 'h h ' }}{%- endif -%}"
        "{{ m.content | trim + ' g <eos> ' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<turn> ' }}{%- endif -%}"
    )
    segments = [{"text": "  c d ", "scores": {"clarity": 0}}, {"text": "e ", "scores": {"clarity": 2}}]
    answer = said("assistant", "  c d e ")
    path = write_rows(tmp_path / "rows", row_of(answer, answer, segments, segments))
    (row,) = load_preferences(path, build_word_tokenizer(chat_template=template), 32, aspects=["clarity"])
    assert row.chosen == token_ids("h h c d e g <eos>")
    assert row.chosen_segments == SegmentedResponse(ends=[4, 7], scores=[[0.0], [2.0]])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"chosen_segments": None}, "'chosen_segments' is missing: `steersman data segment` adds it"),
        ({"rejected_segments": [{"text": "e"}]}, "'rejected_segments' has no scores for 'clarity': `steersman data an"),
        ({"rejected_segments": [{"text": "e", "scores": {"safety": 1}}]}, "has no scores for 'clarity'"),
        (
            {"rejected_segments": [{"text": "e", "scores": {"clarity": 1, "safety": 1}}]},
            "aspects of 'rejected_segments' are clarity, safety, those of the rows before clarity",
        ),
        (
            {"chosen_segments": [{"text": "c d", "scores": {"clarity": 1}}, {"text": "d", "scores": {"clarity": 1}}]},
            "the texts of 'chosen_segments' joined are not the response: they differ after 3 characters",
        ),
        (
            {"chosen": "cd", "chosen_segments": [{"text": letter, "scores": {"clarity": 1}} for letter in "cd"]},
            "'chosen_segments': segment 1 has no token of its own: join it with the one after it",
        ),
    ],
)
def test_segments_that_cannot_be_trained_on(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    scores = {"scores": {"clarity": 3}}
    good = row_of("c d", "e", [{"text": "c "} | scores, {"text": "d"} | scores], [{"text": "e"} | scores])
    bad = {name: value for name, value in (good | changes).items() if value is not None}
    with pytest.raises(DataError) as error:
        load_preferences(write_rows(tmp_path / "rows", good, bad), build_word_tokenizer(), 16, aspects=["clarity"])
    assert str(error.value).startswith(f"{tmp_path / 'rows'}:2: ")
    assert complaint in str(error.value)
