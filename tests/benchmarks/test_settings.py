"""Files and flags of `steersman evaluate`: exit code 2 and one line that names the field, before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from steersman.benchmarks import quality
from steersman.benchmarks.settings import (
    Setting,
    SettingsError,
    check_models,
    read_prompt_file,
    read_settings,
    world_prompts,
)

PARGS = {"method": "pargs", "reward_model": "helpful", "beta": 2.0}


def _write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def test_settings_are_read_as_written(tmp_path: Path) -> None:
    content = {"plain": None, "cut": {"top_k": 10}, "steered": {"guidance": PARGS, "temperature": 0.0}}
    assert read_settings(_write(tmp_path / "settings.yaml", content)) == [
        Setting("plain"),
        Setting("cut", None, {"top_k": 10}),
        Setting("steered", PARGS, {"temperature": 0.0}),
    ]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "mapping of names"),
        ("[1, 2]", "mapping of names"),
        ("a: {b: [", "settings.yaml"),
        ({"steered": 3}, "steered"),
        ({"steered": {"temprature": 1.0}}, "steered.temprature"),
        ({"steered": {"guidance": "preset"}}, "steered.guidance"),
        ({"steered": {"guidance": {"method": "sail"}}}, "steered.guidance.method"),
        ({"steered": {"guidance": {**PARGS, "beta": -1.0}}}, "steered.guidance.beta"),
        ({"steered": {"guidance": {**PARGS, "gate": {"first_tokens": 0}}}}, "steered.guidance.gate.first_tokens"),
    ],
)
def test_a_wrong_settings_file_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, named: str
) -> None:
    path = _write(tmp_path / "settings.yaml", content)
    assert quality.main(["--settings", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no prompts"),
        ("{", ":1: not JSON"),
        ('{"prompt": "Hello"}\n\n{"text": "Hello"}', ":3: give prompt"),
        ('{"messages": []}', ":1: give prompt"),
        ("3", ":1: give prompt"),
    ],
)
def test_a_wrong_prompts_file_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, named: str
) -> None:
    settings = _write(tmp_path / "settings.yaml", {"plain": None})
    prompts = _write(tmp_path / "prompts.jsonl", content)
    assert quality.main(["--settings", str(settings), "--prompts", str(prompts)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


@pytest.mark.parametrize("flag", ["--settings", "--prompts"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    settings = _write(tmp_path / "settings.yaml", {"plain": None})
    assert quality.main(["--settings", str(settings), flag, str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--limit", "0"], ["--samples", "none"], ["--sail"]])
def test_wrong_flags_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        quality.main(flags)
    assert stop.value.code == 2


def test_a_flag_that_the_tuned_comparison_would_ignore_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert quality.main(["--samples", "4"]) == 2
    assert "--samples: needs --settings" in capsys.readouterr().err


def test_an_address_without_a_server_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = _write(tmp_path / "settings.yaml", {"plain": None})
    assert quality.main(["--settings", str(settings), "--url", "http://127.0.0.1:9"]) == 2
    assert "--url http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("guidance", "named"),
    [
        ({**PARGS, "reward_model": "judge"}, "steered.guidance.reward_model: 'judge' is the judge"),
        (
            {"method": "pargs", "rewards": [{"model": "helpful"}, {"model": "judge"}]},
            "steered.guidance.rewards.1.model: 'judge' is the judge",
        ),
        ({"method": "best_of_n", "reward_model": "judge", "n": 2}, "steered.guidance.reward_model: 'judge' is the"),
        ({**PARGS, "reward_model": "sail"}, "steered.guidance.reward_model: no reward model 'sail'"),
        ({"method": "mixed", "policy": "sail", "mix": 1.0}, "steered.guidance.policy: no policy 'sail'"),
    ],
)
def test_the_judge_steers_nothing_and_every_model_is_loaded(guidance: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        check_models([Setting("plain"), Setting("steered", guidance)], "judge", ["helpful", "judge"], ["dpo"])
    assert str(refusal.value).startswith(named)


def test_a_judge_that_is_not_loaded_is_refused() -> None:
    with pytest.raises(SettingsError, match="--judge: no reward model 'sail' is loaded; loaded are: helpful"):
        check_models([], "sail", ["helpful"], [])


def test_gold_is_known_for_the_demo_world_s_prompts_only(tmp_path: Path) -> None:
    message = "Hello, my phone came with a bad part. What can you do? Julia"
    rows = [
        {"prompt": f"Customer: {message}\nAgent:"},
        {"messages": [{"role": "user", "content": message}]},
        {"prompt": "Tell me a story."},
        {"messages": [{"role": "user", "content": "Tell me a story."}]},
    ]
    prompts = read_prompt_file(_write(tmp_path / "prompts.jsonl", "\n".join(map(json.dumps, rows))))
    assert [prompt.world for prompt in prompts] == [rows[0]["prompt"], rows[0]["prompt"], None, None]
    assert [prompt.body for prompt in prompts] == rows
    file = Path(quality.__file__).parents[1] / "training" / "world" / "prompts" / "reporting.jsonl"
    assert read_prompt_file(file) == world_prompts("reporting")


@pytest.mark.parametrize(
    ("fields", "plainly"),
    [({}, True), ({"max_tokens": 9, "temperature": 1.0}, True), ({"temperature": 0.0}, False), ({"top_k": 5}, False)],
)
def test_kl_is_told_of_answers_that_are_drawn_from_the_guided_distribution_itself(
    fields: dict[str, Any], plainly: bool
) -> None:
    assert Setting("steered", PARGS, fields).plainly_sampled is plainly
