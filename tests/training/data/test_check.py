"""`steersman data check`: every problem of a file, by line."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steersman import cli
from tests.support.preferences import GOOD, build_word_tokenizer, said, write_rows

Report = dict[str, Any]


def check(capsys: pytest.CaptureFixture[str], source: Path, *flags: str, status: int = 0) -> Report:
    assert cli.main(["data", "check", str(source), "--json", *flags]) == status
    report: Report = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def found(report: Report, severity: str) -> list[tuple[str, str]]:
    """Line (or what stands for it) and message."""
    return [(p["where"].rsplit(":")[-1], p["message"]) for p in report["problems"] if p["severity"] == severity]


def test_all_problems_are_found_not_only_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_word_tokenizer().save_pretrained(tmp_path / "model")
    source = write_rows(
        tmp_path / "rows",
        GOOD,
        "nonsense",
        {"prompt": "", "chosen": 3, "strength": -1},
        GOOD | {"chosen": "c " * 9, "rejected": "d " * 9, "chosen_segments": [{"text": "c", "scores": {"x": 7}}, {}]},
        "",
        GOOD | {"chosen": "c " * 9, "rejected": "d " * 9},
    )
    report = check(capsys, source, "--tokenizer", str(tmp_path / "model"), "--window", "8", status=1)
    errors = found(report, "error")
    assert [line for line, _ in errors] == ["2", "3", "3", "3", "3", "4", "4", "6", "6"]
    assert report["rows"] == 5
    for line, message in [
        ("3", "field 'rejected' is missing"),
        ("3", "'prompt' is empty"),
        ("3", "'strength' is -1: how much better chosen is, above 0"),
        ("4", "segment 2 of 'chosen_segments' is not an object with a text"),
        ("6", "prompt and 'chosen' have 12 tokens, the window 8"),
        ("6", "prompt and 'rejected' have 12 tokens, the window 8"),
    ]:
        assert (line, message) in errors
    assert cli.main(["data", "check", str(source)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{source}:2: error: not JSON")
    assert lines[-1].startswith("5 rows, 7 errors, ")


@pytest.mark.parametrize(
    ("rows", "line", "warning"),
    [
        ([GOOD | {"rejected": "c d"}], 1, "chosen and rejected are the same"),
        ([GOOD, GOOD | {"chosen": "e"}, GOOD | {"id": 2}], 3, "the same as {}:1"),
        ([GOOD, GOOD | {"chosen": "e", "rejected": "c d"}], 2, "chosen and rejected are those of {}:1 the other way"),
        ([GOOD | {"chosen": "a b c", "rejected": "a b d"}], 1, "chosen and rejected repeat the prompt"),
        (
            [{"prompt": "c", "chosen": said("user", "a") + said("assistant", "b"), "rejected": said("user", "a") * 2}],
            1,
            "'prompt' is not what chosen and rejected begin with",
        ),
        (
            [{"prompt": said("user", "a"), "chosen": said("assistant", "b"), "rejected": said("user", "c")}],
            1,
            "'rejected' begins with a message of role 'user'",
        ),
        ([GOOD | {"score_chosen": 1, "score_rejected": 2}], 1, "score_chosen is 1, below score_rejected, 2"),
        (
            [GOOD | {"strength": 1}, GOOD | {"chosen": "f"}, GOOD | {"chosen": "g"}],
            2,
            "2 of 3 rows lack 'strength', this the first",
        ),
        ([GOOD | {"rejected_segments": [{"text": "e"}]}], 1, "1 of 1 rows lack scores in 'rejected_segments', this"),
        (
            [GOOD, {"prompt": said("user", "a"), "chosen": said("assistant", "b"), "rejected": said("assistant", "c")}],
            2,
            "text and messages in one file",
        ),
        ([GOOD | {"chosen": "c <turn> d"}], 1, "'chosen' holds the special token <turn>"),
        ([GOOD | {"chosen": "c z"}], 1, "'chosen' holds the special token <unk>"),
        ([GOOD | {"prompt": "<eos> a"}], 1, "'prompt' holds the special token <eos>"),
    ],
)
def test_what_may_spoil_a_training_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], line: int, warning: str
) -> None:
    build_word_tokenizer(additional_special_tokens=["<turn>"]).save_pretrained(tmp_path / "model")
    source = write_rows(tmp_path / "rows", *rows)
    report = check(capsys, source, "--tokenizer", str(tmp_path / "model"), "--window", "64")
    assert any(at == str(line) and text.startswith(warning.format(source)) for at, text in found(report, "warning"))
    assert report["warnings"] == len(found(report, "warning"))


def test_aspects_that_differ_between_rows_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [GOOD | {"chosen_segments": [{"text": "c d", "scores": {name: 1}}]} for name in ("safety", "clarity")]
    report = check(capsys, write_rows(tmp_path / "rows", *rows), status=1)
    assert found(report, "error") == [
        ("2", "the aspects of 'chosen_segments' are clarity, those of the rows before safety")
    ]


def test_the_command_says_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ([], 2), (["--help"], 0), (["burn"], 2):
        assert cli.main(["data", *arguments]) == status
        printed = capsys.readouterr()
        assert all(name in printed.out + printed.err for name in ("usage: ", "check", "segment", "annotate"))
    assert "'burn'" in printed.err


def test_a_tokenizer_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_word_tokenizer().save_pretrained(tmp_path / "model")
    report = check(capsys, write_rows(tmp_path / "rows", GOOD), "--tokenizer", str(tmp_path / "model"))
    place = str(tmp_path / "model")
    assert found(report, "warning") == [
        (place, "the tokenizer names no window (model_max_length): --window does"),
    ]


def test_the_summary_counts_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: random.Random) -> None:
    lengths = np.array([[rng.randint(1, 30) for _ in range(3)] for _ in range(rng.randint(1, 60))])
    fields = ("prompt", "chosen", "rejected")
    rows = [dict(zip(fields, (" ".join("a" * n) for n in row), strict=True)) for row in lengths.tolist()]
    build_word_tokenizer().save_pretrained(tmp_path / "model")
    source = write_rows(tmp_path / "rows", *rows)
    report = check(capsys, source, "--tokenizer", str(tmp_path / "model"), "--window", "99")
    lengths[:, 1:] += 1  # the end token
    for column, name in enumerate(fields):
        ordered = sorted(lengths[:, column].tolist())
        # The smallest length that at least this share of the rows doesn't exceed, ends counted as 0 and 1.
        for share in (50, 90, 99):
            assert report[name][f"p{share}"] == ordered[-(-(len(ordered) - 1) * share // 100)]
        assert report[name]["longest"] == ordered[-1]
    unequal = lengths[lengths[:, 1] != lengths[:, 2]]
    if len(unequal):
        assert report["chosen_longer"] == pytest.approx((unequal[:, 1] > unequal[:, 2]).mean())


@pytest.mark.parametrize(
    ("longer", "shorter", "bias"), [(60, 20, "chosen"), (20, 60, "rejected"), (42, 38, None), (4, 1, None)]
)
def test_length_bias_is_named_where_it_is_no_accident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], longer: int, shorter: int, bias: str | None
) -> None:
    rows = [GOOD | {"prompt": "a" * n, "chosen": "cc", "rejected": "d"} for n in range(1, longer + 1)]
    rows += [GOOD | {"prompt": "b" * n, "chosen": "c", "rejected": "dd"} for n in range(1, shorter + 1)]
    source = write_rows(tmp_path / "rows", *rows)
    assert check(capsys, source)["length_bias"] == bias
    assert cli.main(["data", "check", str(source)]) == 0
    assert ("length bias is likely" in capsys.readouterr().out) == bool(bias)


def test_problems_of_one_kind_are_counted_and_the_first_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: random.Random
) -> None:
    repeated, low, missing = (rng.randint(5, 30) for _ in range(3))
    rows: list[Any] = [GOOD] * (repeated + 1)
    rows += [GOOD | {"prompt": "p" * (n + 1), "score_chosen": n, "score_rejected": n + 0.5} for n in range(low)]
    rows += [GOOD | {"prompt": "q", "chosen": None}] * missing + [GOOD | {"prompt": "r", "rejected": None}]
    source = write_rows(tmp_path / "rows", *rows)
    capsys.readouterr()
    assert cli.main(["data", "check", str(source)]) == 1
    lines = capsys.readouterr().out.splitlines()
    first = 1 + repeated + low
    assert lines[:3] == [f"{source}:{first + n}: error: field 'chosen' is missing" for n in (1, 2, 3)]
    assert lines[3] == f"  and {missing - 3} more errors of this kind, {missing} in all (--json lists every one)"
    assert lines[4].startswith(f"{source}:{first + missing + 1}: error: field 'rejected' is missing")
    assert lines[5:8] == [f"{source}:{n}: warning: the same as {source}:1" for n in (2, 3, 4)]
    assert lines[8] == f"  and {repeated - 3} more warnings of this kind, {repeated} in all (--json lists every one)"
    assert lines[9].endswith("warning: score_chosen is 0, below score_rejected, 0.5")
    assert lines[12] == f"  and {low - 3} more warnings of this kind, {low} in all (--json lists every one)"
    report = check(capsys, source, status=1)
    assert len(report["problems"]) == report["errors"] + report["warnings"] >= missing + 1 + repeated + low
