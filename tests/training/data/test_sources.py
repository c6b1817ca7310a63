"""Where rows come from: JSON lines, Parquet, folders and the Hub."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steersman.training.data.preferences import DataError, load_preferences, read_preferences
from tests.support.preferences import GOOD, build_word_tokenizer, said, write_rows


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def draw_rows(rng: random.Random, count: int = 8) -> list[dict[str, Any]]:
    def words() -> str:
        return " ".join(rng.choices("abcdefgh", k=rng.randint(1, 6)))

    rows = []
    for n in range(count):
        row: dict[str, Any] = {
            "prompt": said("user", words()),
            "chosen": said("assistant", words()),
            "rejected": said("assistant", words()),
        }
        # Optional fields of some rows are nulls in a table.
        rows.append(row | ({"score_chosen": rng.random(), "strength": 2.0} if n % 2 else {}))
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.Table.from_pylist(rows[::-1]).schema), path)
    return path


def test_every_source_has_the_same_rows(tmp_path: Path, rng: random.Random) -> None:
    rows = draw_rows(rng)
    lines = write_rows(tmp_path / "rows.jsonl", *rows)
    table = write_parquet(tmp_path / "rows.parquet", rows)
    for n in range(2):
        write_parquet(tmp_path / "tables" / f"train-{n}.parquet", rows[4 * n : 4 * n + 4])
    (tmp_path / "shards").mkdir()
    for n in range(2):
        write_rows(tmp_path / "shards" / f"train-{n}.jsonl", *rows[4 * n : 4 * n + 4])
        write_rows(tmp_path / "shards" / f"test-{n}.jsonl", rows[n])
    tokenizer = build_word_tokenizer()
    expected = load_preferences(lines, tokenizer, window=64)
    assert len(expected) == len(rows)
    for source in (table, tmp_path / "tables", tmp_path / "shards", f"{tmp_path / 'shards'}:train"):
        assert load_preferences(source, tokenizer, window=64) == expected
    assert load_preferences(f"{tmp_path / 'shards'}:test", tokenizer, window=64) == expected[:2]


def test_a_bad_row_of_a_table_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [GOOD, GOOD, GOOD | {"chosen": " "}]
    for source in (
        write_parquet(tmp_path / "bad.parquet", rows),
        write_parquet(tmp_path / "f" / "b.parquet", rows).parent,
    ):
        with pytest.raises(DataError) as error:
            list(read_preferences(source))
        assert str(error.value) == f"{source}:row 3: 'chosen' is empty"


@pytest.mark.parametrize("name", ["org/name", "org/name:test_prefs"])
def test_a_hub_dataset_that_cannot_be_reached_is_one_line_with_the_way_out(name: str) -> None:
    with pytest.raises(DataError) as error:
        list(read_preferences(name))
    assert str(error.value).startswith(f"org/name: split '{(name + ':train').split(':')[1]}' can't be loaded: ")
    assert "hf download" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_split_that_is_not_there_and_a_file_that_is_no_table(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "tables" / "train.parquet", [GOOD]).parent
    with pytest.raises(DataError, match=r"split 'tset' can't be loaded.*train"):
        list(read_preferences(f"{source}:tset"))
    (tmp_path / "rows.parquet").write_text(json.dumps(GOOD))
    with pytest.raises(DataError, match=r"rows.parquet:row 1: not Parquet"):
        list(read_preferences(tmp_path / "rows.parquet"))


def test_lines_may_begin_with_a_byte_order_mark_and_end_as_on_windows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", GOOD)
    assert [row.chosen for row in read_preferences(path)] == ["c d", "c d"]
