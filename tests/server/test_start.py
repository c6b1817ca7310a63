"""Starts that cannot end well are refused with one line that names the culprit and the way out."""

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from steersman.guidance.head_files import REWARD, save_head
from tests.conftest import ONE_PROCESS
from tests.support.heads import random_checkpoint
from tests.support.quantised import save_int8
from tests.support.server import test_environment
from tests.support.tiny import VOCABULARY, build_tokenizer, save_base, save_reward


@dataclass(frozen=True)
class Refused:
    """Arguments of `steersman serve`, {} standing for the models' folder, and what the line must say."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]


def _reward(*values: str, words: tuple[str, ...]) -> Refused:
    flags = [flag for value in values for flag in ("--reward-model", value)]
    return Refused(("{}/base", *flags), words)


def _policy(*values: str, words: tuple[str, ...]) -> Refused:
    return Refused(("{}/base", *(flag for value in values for flag in ("--policy", value))), words)


def _presets(name: str, words: tuple[str, ...]) -> Refused:
    return Refused(("{}/base", "--guidance-presets", f"{{}}/{name}"), words)


BEFORE_START = {
    "missing path": _reward("helpful={}/absent", words=("'helpful'", "absent", "does not exist")),
    "not a checkpoint": _reward("helpful={}", words=("'helpful'", "config.json is missing")),
    "a causal model": _reward("helpful={}/base", words=("'helpful'", "LlamaForCausalLM", "ForSequenceClassification")),
    "two outputs": _reward("helpful={}/pair", words=("'helpful'", "2 outputs", "has one")),
    "another tokenizer": _reward("helpful={}/foreign", words=("'helpful'", "another tokenizer", "train it")),
    "pickled weights": _reward("helpful={}/pickled", words=("'helpful'", "safetensors", "save_pretrained")),
    "no path": _reward("helpful", words=("--reward-model helpful", "NAME=PATH")),
    "no name": _reward("={}/first", words=("--reward-model =", "NAME=PATH")),
    "a name twice": _reward("helpful={}/first", "helpful={}/second", words=("helpful", "twice")),
    "missing base": Refused(("{}/absent", "--reward-model", "helpful={}/first"), ("base model", "absent")),
    "no cache": Refused(("{}/base", "--guidance-cache", "0"), ("--guidance-cache 0", "positive")),
    "a cache beyond all memory": Refused(
        ("{}/base", "--reward-model", "first={}/first", "--guidance-cache", "1000000"),
        ("--guidance-cache 1e+06", "GiB of the host's memory are free", "give less than"),
    ),
    "an endless cache": Refused(("{}/base", "--guidance-cache", "inf"), ("--guidance-cache inf", "positive")),
    "negative cache": Refused(("{}/base", "--guidance-cache", "-1"), ("--guidance-cache -1", "positive")),
}
BEFORE_START |= {
    "pickled policy": _policy("expert={}/pickled", words=("policy 'expert'", "safetensors", "save_pretrained")),
    "pickled base": Refused(("{}/pickled",), ("base model", "safetensors", "save_pretrained")),
    "no candidates": Refused(("{}/base", "--max-top-k", "0"), ("--max-top-k 0", "from 1 to 64")),
    "more candidates than may be": Refused(("{}/base", "--max-top-k", "65"), ("--max-top-k 65", "from 1 to 64")),
    "no time": Refused(("{}/base", "--request-timeout", "0"), ("--request-timeout 0", "positive")),
    "a user with the admin key": Refused(
        ("{}/base", "--api-key", "one", "--admin-api-key", "one"), ("--admin-api-key", "of its own")
    ),
    "a preset over a cap": Refused(
        ("{}/base", *("--reward-model", "first={}/first", "--guidance-presets", "{}/wide.yaml", "--max-top-k", "20")),
        ("wide", "guidance.top_k", "at most 20"),
    ),
    "engines behind one process": Refused(("{}/base", "--data-parallel-size", "2"), ("--data-parallel-size", "router")),
    "missing policy": _policy("expert={}/absent", words=("policy 'expert'", "absent", "does not exist")),
    "a reward model as policy": _policy("expert={}/first", words=("policy 'expert'", "ForCausalLM")),
    "a policy of another vocabulary": _policy("expert={}/stranger", words=("'expert'", "another vocabulary", "family")),
    "a reward model of fewer tokens": _reward("helpful={}/cut", words=("'helpful'", "319 token ids", "needs 320")),
    "a policy of fewer tokens": _policy(
        "expert={}/cut-policy", words=("policy 'expert'", "319 token ids", "needs 320")
    ),
    "a policy called base": _policy("base={}/expert", words=("--policy base", "another")),
    "a policy's name twice": _policy("a={}/expert", "a={}/other", words=("--policy a", "twice")),
    "one name for two kinds": Refused(
        ("{}/base", "--reward-model", "a={}/first", "--policy", "a={}/expert"), ("--policy a", "names must differ")
    ),
    "missing presets": _presets("absent.yaml", words=("absent.yaml",)),
    "presets that are a list": _presets("list.yaml", words=("list.yaml", "mapping")),
    "a preset with a bad name": _presets("name.yaml", words=("a:b", "is not a name")),
    "a preset with a bad value": _presets("value.yaml", words=("strong", "guidance.beta", "greater than or equal")),
    "a preset with an unknown model": _presets("model.yaml", words=("strong", "'absent'", "none")),
}

_CUT = ("model.safetensors is cut off", "bytes are there", "again")
BEFORE_START |= {
    "a base cut off": Refused(("{}/base-cut",), ("base model", *_CUT)),
    "a reward model cut off": _reward("helpful={}/first-cut", words=("reward model 'helpful'", *_CUT)),
    "a policy cut off": _policy("expert={}/expert-cut", words=("policy 'expert'", *_CUT)),
    "an adapter cut off": _policy(
        "expert={}/adapter-cut", words=("policy 'expert'", "adapter_model.safetensors is cut off", "bytes are there")
    ),
    "empty weights": _reward("helpful={}/first-empty", words=("'helpful'", "model.safetensors is empty", "again")),
    "a pointer to weights": _reward("helpful={}/first-pointer", words=("'helpful'", "Git LFS pointer", "git lfs pull")),
}

BEFORE_START |= {
    "a path too long": _reward(f"helpful=/{'x' * 4000}", words=("'helpful'", "cannot be read", "too long")),
    "a policy's path too long": _policy(f"expert=/{'x' * 4000}", words=("'expert'", "cannot be read", "too long")),
    "a root too long": Refused(
        ("{}/base", "--admin-api-key", "k", "--admin-model-root", "x" * 4000), ("--admin-model-root", "not a folder")
    ),
    "presets that are no text": _presets("bytes.yaml", words=("--guidance-presets", "bytes.yaml", "decode")),
}

BEFORE_START |= {
    "a head as policy": _policy("expert={}/atop", words=("policy 'expert'", "reward model", "--reward-model")),
    "a policy's head as reward model": _reward("helpful={}/tilted", words=("'helpful'", "a policy", "--policy")),
    "a head cut off": _reward("helpful={}/atop-cut", words=("'helpful'", "head.safetensors is cut off", "again")),
    "a head of fewer tokens": _reward("helpful={}/atop-few", words=("'helpful'", "319 token ids", "needs 320")),
}

BEFORE_START |= {
    "an adapter over a quantised base": Refused(
        ("{}/base-int8", "--policy", "expert={}/adapter"),
        ("policy 'expert'", "quantised (compressed-tensors)", "merge it"),
    ),
}

PRESETS = {
    "list.yaml": "- {method: pargs, reward_model: first}",
    "name.yaml": "'a:b': {method: pargs, reward_model: first}",
    "value.yaml": "strong: {method: pargs, reward_model: first, beta: -1}",
    "wide.yaml": "wide: {method: pargs, reward_model: first, top_k: 21}",
    "model.yaml": "strong: {method: pargs, reward_model: absent}",
}


@pytest.fixture(scope="module")
def checkpoints(models: Path) -> Path:
    """The shared models, and beside them checkpoints that must be refused."""
    save_reward(models / "pair", seed=6)
    _change_labels(models / "pair")
    _save_foreign(models / "foreign")
    _save_pickled(models / "pickled")
    save_reward(models / "cut", vocab_size=VOCABULARY - 1)
    save_base(models / "cut-policy", vocab_size=VOCABULARY - 1)
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 16}
    save_reward(models / "neo", seed=7, kind="GPTNeo", num_layers=2, num_heads=2, **kinds)
    build_tokenizer(vocabulary=300).save_pretrained(save_base(models / "stranger", seed=10))
    (models / "atop-few").mkdir()
    save_int8(models / "base-int8", models / "base")
    save_head(models / "atop-few", random_checkpoint(random.Random(22), REWARD, VOCABULARY - 1))
    for source in ("base", "first", "expert", "adapter", "atop"):
        _copy(models, source, "cut", lambda whole: whole[: len(whole) * 2 // 3])
    _copy(models, "first", "empty", lambda _: b"")
    _copy(
        models,
        "first",
        "pointer",
        lambda whole: f"version https://git-lfs.github.com/spec/v1\nsize {len(whole)}\n".encode(),
    )
    (models / "bytes.yaml").write_bytes(b"\xff\xfe\x80")
    for name, content in PRESETS.items():
        (models / name).write_text(content)
    return models


@pytest.mark.parametrize("name", BEFORE_START)
def test_refusals_before_the_engine_starts(
    checkpoints: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from steersman.server import serve

    async def never(*_: object) -> None:
        raise AssertionError("the engine would have been started")

    monkeypatch.setattr(serve, "serve", never)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused = BEFORE_START[name]
    assert serve.main(_arguments(refused, checkpoints)) == 2
    _check_line(capsys.readouterr().err, refused.words)


def test_an_engine_that_dies_while_the_server_starts_is_told_in_one_line(
    checkpoints: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where vLLM has no kernel for the base's precision: proving a head is the first that is asked of the engine."""
    from steersman.server import serve, vllm

    async def dies(*_: object) -> None:
        raise vllm.EngineDeadError

    monkeypatch.setattr(serve, "_serve", dies)
    assert serve.main([str(checkpoints / "base")]) == 1
    _check_line(capsys.readouterr().err, ("the server stopped", "the engine has died", "above"))


def test_a_refusal_by_the_command(checkpoints: Path) -> None:
    outcome = _run(_arguments(BEFORE_START["pickled weights"], checkpoints))
    assert outcome.returncode == 2, outcome.stderr
    assert "Traceback" not in outcome.stdout + outcome.stderr
    _check_line(outcome.stderr, BEFORE_START["pickled weights"].words)


def test_a_model_whose_cached_rewards_would_be_wrong_is_refused_by_the_worker(checkpoints: Path) -> None:
    flags = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--guidance-cache", "0.05")
    where = ("--distributed-executor-backend", ONE_PROCESS)
    outcome = _run([str(checkpoints / "base"), *flags, *where, "--reward-model", f"neo={checkpoints / 'neo'}"])
    assert outcome.returncode in (1, 2), outcome.stderr
    assert "Traceback" not in outcome.stdout + outcome.stderr
    _check_line(outcome.stderr, ("'neo'", "gpt_neo"))


def _arguments(refused: Refused, folder: Path) -> list[str]:
    return [argument.replace("{}", str(folder)) for argument in refused.arguments]


def _run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "steersman.cli", "serve", *arguments, "--port", "0"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=test_environment())


def _check_line(stderr: str, words: Sequence[str]) -> None:
    lines = [line for line in stderr.splitlines() if line.startswith("steersman: ")]
    assert len(lines) == 1, stderr
    assert all(word in lines[0] for word in words), lines[0]


def _copy(models: Path, source: str, suffix: str, change: Callable[[bytes], bytes]) -> None:
    """A copy of a checkpoint, its weights changed."""
    folder = Path(shutil.copytree(models / source, models / f"{source}-{suffix}", dirs_exist_ok=True))
    for file in folder.glob("*.safetensors"):
        file.write_bytes(change(file.read_bytes()))


def _change_labels(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder, num_labels=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def _save_foreign(folder: Path) -> None:
    save_reward(folder, seed=8)
    build_tokenizer(vocabulary=300).save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.steersman = {"kind": "reward"}
    config.save_pretrained(folder)


def _save_pickled(folder: Path) -> None:
    save_reward(folder, seed=9)
    weights = folder / "model.safetensors"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    weights.unlink()
