"""A head's file: what was saved is read again, and what is no head is refused in one line with the way out."""

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.head_files import (
    HEAD_FILE,
    POLICY,
    REWARD,
    BaseFacts,
    base_facts,
    is_head,
    read_head,
    save_head,
)
from tests.support.heads import random_checkpoint

LABEL = "reward model 'helpful'"


@pytest.mark.parametrize("role", [REWARD, POLICY])
def test_what_is_saved_is_read_again(tmp_path: Path, rng: random.Random, role: str) -> None:
    saved = random_checkpoint(rng, role)
    assert not is_head(tmp_path)
    save_head(tmp_path, saved)
    assert is_head(tmp_path)
    read = read_head(LABEL, tmp_path, role)
    assert (read.role, read.base, read.facts, read.probe.texts) == (role, saved.base, saved.facts, saved.probe.texts)
    assert torch.equal(read.probe.hidden, saved.probe.hidden)
    assert read.head.state_dict().keys() == saved.head.state_dict().keys()
    for name, tensor in read.head.state_dict().items():
        assert torch.equal(tensor, saved.head.state_dict()[name])


def test_hidden_states_in_half_precision_are_kept_exactly(tmp_path: Path, rng: random.Random) -> None:
    saved = random_checkpoint(rng, REWARD)
    half = saved.probe.hidden.bfloat16()
    save_head(tmp_path, replace(saved, probe=replace(saved.probe, hidden=half)))
    assert torch.equal(read_head(LABEL, tmp_path, REWARD).probe.hidden, half.float())


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_who_may_read_the_file_is_decided_by_the_umask(tmp_path: Path, rng: random.Random, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_head(tmp_path, random_checkpoint(rng, REWARD))
    finally:
        os.umask(before)
    assert (tmp_path / HEAD_FILE).stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_base_is_described_by_its_configuration(models: Path) -> None:
    config = AutoConfig.from_pretrained(models / "base")
    assert base_facts(config, 320) == BaseFacts("llama", 64, 2, 320)


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda whole: whole[: len(whole) * 2 // 3], "cut off"),
    "empty": (lambda whole: b"", "is empty"),
    "a pointer": (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "longer": (lambda whole: whole + b"x", "damaged"),
    "text": (lambda whole: b"a head, honestly", "no safetensors file"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, rng: random.Random, name: str) -> None:
    change, words = DAMAGED[name]
    save_head(tmp_path, random_checkpoint(rng, REWARD))
    file = tmp_path / HEAD_FILE
    file.write_bytes(change(file.read_bytes()))
    assert words in _refusal(tmp_path)


def _with_metadata(**changes: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    return lambda tensors, metadata: metadata.update(changes)


def _with_base(**changes: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    return lambda tensors, metadata: metadata["base"].update(changes)


def _with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def apply(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def _without_tensor(name: str) -> Any:
    return lambda tensors, metadata: tensors.pop(name)


def _empty(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("probe.texts", "probe.hidden"):
        tensors[name] = tensors[name][:0].contiguous()


def _spoil(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = torch.nan
    return tensor


FOREIGN: dict[str, tuple[Any, str]] = {
    "no metadata": (lambda tensors, metadata: metadata.clear(), "metadata lack format 1"),
    "another format": (_with_metadata(format=2), "metadata lack format 1"),
    "no base": (lambda tensors, metadata: metadata.pop("base"), "base"),
    "a base of other facts": (_with_base(colour="red"), "colour"),
    "no facts": (lambda tensors, metadata: metadata.pop("facts"), "facts"),
    "a base of another width": (_with_base(hidden_size=999), "do not fit the base that it names"),
    "a base of another vocabulary": (_with_base(vocabulary=999), "do not fit the base that it names"),
    "no role": (_with_metadata(role="oracle"), "role is 'oracle'"),
    "no probe": (_without_tensor("probe.texts"), "probe.texts"),
    "no hidden states": (_without_tensor("probe.hidden"), "probe.hidden"),
    "hidden states of another width": (_with_tensor("probe.hidden", lambda t: t[:, :-1]), "probe does not fit"),
    "fewer hidden states than texts": (_with_tensor("probe.hidden", lambda t: t[:-1]), "probe does not fit"),
    "hidden states that are no numbers": (_with_tensor("probe.hidden", _spoil), "finite"),
    "an empty text": (_with_tensor("probe.texts", lambda t: t.index_fill(0, torch.tensor(0), -1)), "probe is empty"),
    "no text at all": (lambda tensors, _: _empty(tensors), "probe is empty"),
    "a token below 0": (_with_tensor("probe.texts", lambda t: t.masked_fill(t >= 0, -2)), "its probe"),
    "a text of unknown tokens": (_with_tensor("probe.texts", lambda t: t.masked_fill(t >= 0, 10_000)), "its probe"),
    "texts that are no lists": (_with_tensor("probe.texts", lambda t: t[0]), "probe"),
    "weights of another width": (_with_tensor("inner.weight", lambda t: t[:, :-1]), "not fit"),
    "biases of another length": (_with_tensor("inner.bias", lambda t: t[:-1]), "inner.bias is"),
    "no output bias": (_without_tensor("bias"), "bias"),
    "no tokens": (_without_tensor("tokens"), "tokens"),
    "a tensor too many": (lambda tensors, _: tensors.update(more=torch.zeros(1)), "more"),
    "weights that are no numbers": (_with_tensor("tokens", _spoil), "finite"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_something_else_is_refused(tmp_path: Path, rng: random.Random, name: str) -> None:
    change, words = FOREIGN[name]
    save_head(tmp_path, random_checkpoint(rng, REWARD))
    _change(tmp_path / HEAD_FILE, change)
    message = _refusal(tmp_path)
    assert words in message
    assert "steersman train reward --objective head" in message


def test_another_librarys_checkpoint_under_the_name_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.randn(3, 3)}, tmp_path / HEAD_FILE)
    assert "is not a head of steersman's trainers" in _refusal(tmp_path)
    save_file({"weight": torch.randn(3, 3)}, tmp_path / HEAD_FILE, {"steersman": "{not json"})
    assert "is not a head of steersman's trainers" in _refusal(tmp_path)


@pytest.mark.parametrize(("saved", "wanted", "option"), [(REWARD, POLICY, "--reward-model"), (POLICY, REWARD, "--pol")])
def test_a_head_of_the_other_role_names_the_flag_that_it_belongs_to(
    tmp_path: Path, rng: random.Random, saved: str, wanted: str, option: str
) -> None:
    save_head(tmp_path, random_checkpoint(rng, saved))
    assert f"load it with {option}" in _refusal(tmp_path, wanted)


def _refusal(folder: Path, role: str = REWARD) -> str:
    """The one line of a refusal, which names the model and the file or folder."""
    with pytest.raises(ModelRefused) as refused:
        read_head(LABEL, folder, role)
    message = str(refused.value)
    assert message.startswith(f"{LABEL}: {folder}")
    assert "\n" not in message, message
    assert re.search(r"; \S", message), "the way out"
    return message


def _change(file: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> None:
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["steersman"])
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors, metadata)
    save_file(tensors, file, {"steersman": json.dumps(metadata)} if metadata else None)
