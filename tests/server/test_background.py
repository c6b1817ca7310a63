"""A worker's models on their way in and out: read by another process, built by another thread, forgotten whole."""

import gc
import random
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance.auxiliary import Prefix
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.head_models import ServedBase
from steersman.guidance.reward_loading import load_reward_model
from steersman.server import background
from steersman.server.background import ModelLoad, free_apart
from steersman.server.loading import Destination
from steersman.server.reading import Wanted, read
from tests.support.gpu_runtime import acting_as_gpu
from tests.support.tiny import COMMON, VOCABULARY

BASE = ServedBase(COMMON["hidden_size"], COMMON["num_hidden_layers"], VOCABULARY, COMMON["max_position_embeddings"])


@pytest.fixture
def destination(models: Path) -> Destination:
    return Destination(
        AutoTokenizer.from_pretrained(models / "base"), torch.float32, torch.device("cpu"), 2**22, 4, VOCABULARY, BASE
    )


def _want(models: Path, kind: str, name: str) -> Wanted:
    base = str(models / "base")
    return Wanted(kind, name, str(models / name), base, base, "float32", trust_remote_code=False, served=BASE)


def _finish(load: ModelLoad) -> int:
    """Waits for a load; the turns that it took between steps."""
    turns = 1
    while load.reading:
        time.sleep(0.01)
    while not load.advance():
        turns += 1
    return turns


def test_a_model_read_apart_says_what_one_read_here_does_and_leaves_nothing_behind(
    models: Path, destination: Destination, rng: random.Random
) -> None:
    load = ModelLoad(_want(models, "reward_model", "second"), destination)
    assert _finish(load) == 1
    model: Any = load.model
    prompt, response = ([rng.randrange(2, VOCABULARY) for _ in range(n)] for n in (9, 14))
    here = load_reward_model("second", str(models / "second"), destination.tokenizer, cache_bytes=2**22)
    assert model.score_text(prompt, response) == here.score_text(prompt, response)
    held = [weakref.ref(part) for part in (model, model.model.model, *model.model.cache.keys)]
    with _without_collection():
        del load
        freeing = free_apart([model])
        del model
        while freeing.running:
            time.sleep(0.01)
        assert [part() for part in held] == [None] * len(held)


def test_between_steps_a_gpu_captures_one_graph_a_turn(
    models: Path, destination: Destination, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "read_apart", read)
    with acting_as_gpu():
        load = ModelLoad(_want(models, "policy", "expert"), destination)
        turns = _finish(load)
        model: Any = load.model
        assert turns == 1 + len(model.model.sizes) > 1
        prompt = [rng.randrange(2, VOCABULARY) for _ in range(20)]
        said, _ = model.read([Prefix("one", prompt, [])])
    with torch.inference_mode():
        model.model.model.set_attn_implementation("eager")
        plain = model.model.model(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(said[0], plain, atol=1e-3, rtol=1e-3)


def test_what_does_not_fit_is_refused_before_it_is_read(models: Path, destination: Destination) -> None:
    load = ModelLoad(_want(models, "reward_model", "first"), replace(destination, cache_bytes=2**50))
    with pytest.raises(ModelRefused, match=r"'first' takes 10485\d\d\.\d\d GiB of the host's memory.*cache_gib"):
        _finish(load)


def test_a_reader_that_dies_is_a_refusal(models: Path, destination: Destination) -> None:
    wanted = replace(_want(models, "reward_model", "first"), dtype="float33")
    with pytest.raises(ModelRefused, match=r"reward model 'first': reading .*first failed.*see the server's log"):
        _finish(ModelLoad(wanted, destination))


def test_a_refusal_is_repeated_to_whoever_comes_later(
    models: Path, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several workers one may refuse in its last check while another still captures, and is called again."""
    monkeypatch.setattr(background, "read_apart", read)
    with acting_as_gpu():
        load = ModelLoad(_want(models, "reward_model", "first"), destination)
        while load.reading:
            time.sleep(0.01)
        monkeypatch.setattr(load.model, "check", _refuse)
        for _ in range(2):
            with pytest.raises(ModelRefused, match="not as it should be"):
                _finish(load)


def _refuse() -> None:
    raise ModelRefused("not as it should be")


@contextmanager
def _without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
