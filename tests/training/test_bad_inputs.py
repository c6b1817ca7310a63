"""Bad data, through the commands: one line that names the place, before a model is loaded and anything is written."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from steersman import cli
from tests.support.preferences import GOOD, build_word_tokenizer, contents, said, write_rows

CHAT = {"prompt": said("user", "a b"), "chosen": said("assistant", "c d"), "rejected": said("assistant", "e")}
REFUSING = "{%- if messages[-1].role == 'bot' -%}{{ raise_exception('no bots\nhere') }}{%- endif -%}a"
JUDGE = ["--base-url", "http://127.0.0.1:9/v1", "--judge", "judge"]
REWRITING = "{%- if messages | length > 1 -%}{{ 'b' }}{%- endif -%}{{ 'a' }}"


@dataclass
class Case:
    """The file's second row is wrong, or `place` says what is named instead."""

    complaint: str
    bad: Any
    place: str = "rows.jsonl:2"
    first: Any = field(default_factory=lambda: GOOD)
    tokenizer: dict[str, Any] = field(default_factory=dict)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


def cut(*segments: Any) -> dict[str, Any]:
    return GOOD | {"chosen_segments": list(segments)}


def scored(text: str, score: Any) -> dict[str, Any]:
    return {"text": text, "scores": {"safety": score}}


CASES = {
    "no chosen": Case("field 'chosen' is missing", without("chosen")),
    "no rejected": Case("field 'rejected' is missing", without("rejected")),
    "no prompt to be found": Case("chosen and rejected begin differently", without("prompt")),
    "null": Case("field 'chosen' is missing", GOOD | {"chosen": None}),
    "a number": Case("'rejected' is 3: prompt, chosen", GOOD | {"rejected": 3}),
    "empty prompt": Case("'prompt' is empty", GOOD | {"prompt": ""}),
    "empty response": Case("'chosen' is empty", GOOD | {"chosen": ""}),
    "white space": Case("'rejected' is empty", GOOD | {"rejected": " \n"}),
    "empty after the prompt": Case("'chosen' is empty after", {"chosen": "a b ", "rejected": "a bc"}),
    "messages for a text": Case("not of different kinds", GOOD | {"chosen": said("assistant", "c")}),
    "messages before text": Case("not of different kinds", GOOD | {"prompt": said("user", "a")}),
    "no messages": Case("'chosen' is empty", CHAT | {"chosen": []}),
    "empty message": Case("'rejected' is empty", CHAT | {"rejected": said("assistant", "")}),
    "a text for a message": Case("message 1 of 'chosen' is not an object with a role", CHAT | {"chosen": ["c"]}),
    "no role": Case("message 1 of 'prompt' is not an object with a role", CHAT | {"prompt": [{"content": "a"}]}),
    "no content": Case("message 1 of 'chosen' has a content that is not text", CHAT | {"chosen": [{"role": "user"}]}),
    "conversations that differ": Case(
        "chosen and rejected begin differently",
        {"prompt": "a", "chosen": said("user", "a") + CHAT["chosen"], "rejected": said("user", "b") + CHAT["chosen"]},
    ),
    "half a character": Case("'chosen' holds '\\ud83d', which is half a character", GOOD | {"chosen": "c \ud83d"}),
    "not JSON": Case("not JSON", '{"prompt": "a", '),
    "a list": Case("a row is an object", [1, 2]),
    "not UTF-8": Case("not UTF-8: byte 0xe9 after 12 bytes", b'{"prompt": "\xe9"}'),
    "NaN": Case("'score_chosen' is nan, not a finite number", GOOD | {"score_chosen": float("nan")}),
    "infinite": Case("'score_rejected' is inf, not a finite", json.dumps(GOOD)[:-1] + ', "score_rejected": 1e999}'),
    "a score in quotes": Case("'score_chosen' is '7', not a finite number", GOOD | {"score_chosen": "7"}),
    "no strength": Case("'strength' is 0: how much better chosen is, above 0", GOOD | {"strength": 0}),
    "strength is yes": Case("'strength' is True, not a finite number", GOOD | {"strength": True}),
    "too long": Case("prompt and 'rejected' have 9 tokens, the window 8", GOOD | {"rejected": "c d e f g h"}),
    "a template that refuses": Case(
        "the chat template refuses the messages: no bots here",
        CHAT | {"chosen": said("bot", "c")},
        first=CHAT,
        tokenizer={"chat_template": REFUSING},
    ),
    "a template that rewrites": Case(
        "'chosen' changes how the chat template renders the prompt",
        CHAT,
        place="rows.jsonl:1",
        tokenizer={"chat_template": REWRITING},
        first=CHAT,
    ),
    "no template": Case("chat template", CHAT, tokenizer={"chat_template": None}),
    "tools that are no JSON": Case("'tools' is not JSON", CHAT | {"tools": "[a"}),
    "tools that are no list": Case("'tools' is a list", CHAT | {"tools": {"a": 1}}),
    "no end token": Case("the tokenizer has no end token", GOOD, place="model", tokenizer={"eos_token": None}),
    "no rows": Case("no rows", "", first="", place="rows.jsonl"),
    "segments are text": Case("'chosen_segments' has no segments", GOOD | {"chosen_segments": "c d"}),
    "no segments": Case("'chosen_segments' has no segments", cut()),
    "a segment without text": Case("segment 1 of 'chosen_segments' is not an object with a text", cut("c d")),
    "empty segment": Case("segment 2 of 'chosen_segments' is empty", cut({"text": "c d"}, {"text": ""})),
    "segments of something else": Case("differ after 2 characters", cut({"text": "c "}, {"text": "e"})),
    "segments of two messages": Case(
        "'chosen_segments' needs a response of one message",
        CHAT | {"chosen": CHAT["chosen"] * 2, "chosen_segments": [{"text": "c d"}]},
    ),
    "score above 4": Case("has 5 for 'safety': a score is a number from 0 to 4", cut(scored("c d", 5))),
    "score below 0": Case("has -0.5 for 'safety': a score is a number from 0 to 4", cut(scored("c d", -0.5))),
    "score NaN": Case("has nan for 'safety'", cut(scored("c d", float("nan")))),
    "score in quotes": Case("has '3' for 'safety'", cut(scored("c d", "3"))),
    "scores are a list": Case("has scores that are not an object", cut({"text": "c d", "scores": [1]})),
    "an aspect that one lacks": Case(
        "segment 2 of 'chosen_segments' has no score for 'safety', others have", cut(scored("c ", 1), {"text": "d"})
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def save_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a checkpoint without weights: they are never asked for."""

    @cache
    def save(**changes: str | None) -> Path:
        folder = tmp_path_factory.mktemp("tokenizers") / "model"
        build_word_tokenizer(**changes).save_pretrained(folder)
        return folder

    return save


def write_task(folder: Path, model: Path, source: Any) -> Path:
    """A configuration that would train on the source, and replace a model that is there already."""
    (folder / "out").mkdir()
    (folder / "out" / "model.safetensors").write_bytes(b"a model of weeks")
    keys = {"model": str(model), "train_file": str(source), "output_dir": str(folder / "out"), "max_length": 8}
    keys["overwrite_output_dir"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(keys | {"use_cpu": True, "bf16": False}))
    return folder / "config.yaml"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("command", ["check", "reward", "dpo"])
def test_a_bad_row_is_named_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], save_tokenizer: Callable[..., Path], name: str, command: str
) -> None:
    case = CASES[name]
    model = save_tokenizer(**case.tokenizer)
    source = write_rows(tmp_path / "rows.jsonl", case.first, case.bad)
    config = write_task(tmp_path, model, source)
    place = model if case.place == "model" else tmp_path / case.place
    before = contents(tmp_path)
    if command == "check":
        assert cli.main(["data", "check", str(source), "--tokenizer", str(model), "--window", "8"]) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if ": error: " in line]
        assert lines[0].startswith(f"{place}: error: ")
    else:
        assert cli.main(["train", command, "--config", str(config)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"steersman train {command}: error: {place}: ")
    assert case.complaint in lines[0]
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{}/absent.jsonl", "absent.jsonl: no such file"),
        ("{}/rows.jsonl:train", "rows.jsonl:train: no such file"),
        ("{}/broken.parquet", "broken.parquet:row 1: not Parquet"),
        ("{}/empty", "empty: split 'train' can't be loaded"),
        ("{}/folder:tset", "folder: split 'tset' can't be loaded"),
    ],
)
@pytest.mark.parametrize("command", ["check", "segment", "annotate", "reward", "dpo"])
def test_a_source_that_cannot_be_read_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    save_tokenizer: Callable[..., Path],
    source: str,
    complaint: str,
    command: str,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_rows(tmp_path / "rows.jsonl", GOOD)
    write_rows(tmp_path / "broken.parquet", GOOD)
    for name in ("empty", "folder"):
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "folder" / "train.jsonl", GOOD)
    source = source.format(tmp_path)
    config = write_task(tmp_path, save_tokenizer(), source)
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"rows of weeks")
    before = contents(tmp_path)
    flags = {
        "check": ["data", "check", source],
        "segment": ["data", "segment", source, str(out), "--overwrite"],
        "annotate": ["data", "annotate", source, str(out), *JUDGE, "--overwrite"],
    }
    assert cli.main(flags.get(command, ["train", command, "--config", str(config)])) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert complaint in line
    assert {name: text for name, text in contents(tmp_path).items() if not name.startswith("cache")} == before


@pytest.mark.parametrize(
    ("command", "flags", "complaint"),
    [
        ("segment", ["there.jsonl"], "there.jsonl: is there already: --overwrite replaces it"),
        ("segment", ["out.parquet"], "out.parquet: JSON lines are written: name it .jsonl"),
        ("segment", ["none/out.jsonl"], "none/out.jsonl: its folder does not exist"),
        ("annotate", ["out.jsonl"], "rows.jsonl:1: 'chosen_segments' is missing: `steersman data segment` adds it"),
        ("annotate", ["out.jsonl", "--concurrency", "0"], "--concurrency is at least 1, not 0"),
        ("annotate", ["out.jsonl", "--api-key-env", "NOT_SET"], "NOT_SET: there is no such environment variable"),
        ("check", ["--window", "8"], "--window 8: a number of tokens above 0, which --tokenizer counts"),
        ("check", ["--tokenizer", "./absent"], "./absent can't be loaded"),
    ],
)
def test_flags_that_cannot_work_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, flags: list[str], complaint: str
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", GOOD)
    (tmp_path / "there.jsonl").write_bytes(b"rows of weeks")
    before = contents(tmp_path)
    out, *others = flags if command != "check" else ["", *flags]
    arguments = [str(source), *([str(tmp_path / out)] if out else []), *others]
    assert cli.main(["data", command, *arguments, *(JUDGE if command == "annotate" else [])]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert complaint in line
    assert contents(tmp_path) == before
