"""Texts cut into sentences and blocks."""

import json
import random
from pathlib import Path

import pytest

from steersman import cli
from steersman.training.data.segmentation import cut_into_segments
from tests.support.preferences import GOOD, said, write_rows

CODE = "```python\nx = 1.  # One. Two!\n\ny = 2\n```\n"
TABLE = "| a. b | c |\n|---|---|\n| 1. | Two! Three. |\n"
LIST = "1. First. And more.\n2. Second.\n\n   A paragraph of it.\n"
PIECES = [
    *("Yes.", "No!", "Is it?", "e.g.", "3.14", "Dr.", "word", "i.e. that", "…", "...", '"Quoted."', "(So.)", "日本。"),
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u2028", "\x00", "    ", "👍", "`a. B`", "**", "#", "# Title\n", "> "),
    *("```", "~~~", "- ", "* ", "1. ", "---", "|", "<b>", "\\", "[x]: y\n", CODE, TABLE, LIST),
]


def test_joined_segments_are_the_text(rng: random.Random) -> None:
    for _ in range(500):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 30)))
        segments = cut_into_segments(text)
        assert "".join(segments) == text
        assert all(any(letter.isalnum() for letter in segment) for segment in segments) or len(segments) <= 1


def test_blocks_stay_whole_wherever_they_are(rng: random.Random) -> None:
    blocks = [CODE, TABLE, LIST, "> Quoted. Twice.\n", "## A title. Or two\n"]
    for _ in range(50):
        chosen = rng.sample(blocks, k=rng.randint(1, len(blocks)))
        text = "".join(f"One. Two!\n\n{block}\n" for block in chosen) + "End."
        expected = [part for block in chosen for part in ("One. ", "Two!\n\n", f"{block}\n")]
        assert cut_into_segments(text) == [*expected, "End."]


@pytest.mark.parametrize(
    "sentences",
    [
        ["Dr. Smith and J. Doe paid 3.14 dollars, e.g. for tea. ", "Then they left."],
        ['He said "Stop." ', "She did (at last!). ", "Why?! ", "who knows."],
        ["Tea, coffee, etc. are there. ", "So is cake, pie, etc. ", "See Fig. 3 and No. 5. ", "No. ", "I do."],
        ["Well... it depends… on you. ", "Wait... ", "What? ", "yes."],
        ["Call `a.b(). C` here. ", "It is **bold.** ", "Done. 🎉"],
        ["今日は。", "元気ですか？", "はい。"],
        ["We meet at 5 p.m. on Monday, in the U.S. ", "That is far."],
        ["no capitals here. ", "none there. ", "www.example.org is a name, v1.2 a version."],
        ["  Leading white space. ", "And trailing.\n\n"],
        ["👍 !!!"],
    ],
)
def test_sentences_end_with_their_final_punctuation(sentences: list[str]) -> None:
    assert cut_into_segments("".join(sentences)) == sentences


def test_the_command_adds_segments_and_keeps_everything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = said("user", "Hi. You."), said("assistant", "Hm. No.")
    rows = [
        {"prompt": "A. B", "chosen": " So. It is.", "rejected": "E", "id": 7},
        {"chosen": [*talk[0], *said("assistant", "Yes. Sir.")], "rejected": [*talk[0], *talk[1]]},
        GOOD | {"chosen_segments": [{"text": "c d", "scores": {"clarity": 3}}]},
    ]
    source, out = write_rows(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    assert cli.main(["data", "segment", str(source), str(out)]) == 0
    first, second, third = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert first == rows[0] | {
        "chosen_segments": [{"text": " So. "}, {"text": "It is."}],
        "rejected_segments": [{"text": "E"}],
    }
    assert second["prompt"] == talk[0]
    assert second["rejected"] == talk[1]
    assert second["rejected_segments"] == [{"text": "Hm. "}, {"text": "No."}]
    assert third == rows[2] | {"rejected_segments": [{"text": "e"}]}

    written = out.read_bytes()
    assert cli.main(["data", "segment", str(source), str(out)]) == 2
    assert out.read_bytes() == written
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["data", "segment", str(source), str(out), "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
