"""What only shows with several workers: one that refuses undoes the others, and an engine that fails leaves no name."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steersman.server.engine import GuidedEngine
from steersman.server.lifecycle import MAX_MODELS, ChangeRefused, ModelLifecycle
from steersman.server.limits.settings import Limits
from steersman.server.liveness import Workers as WorkerProcesses
from steersman.server.registry import Registry

DESCRIBED = {"name": "later", "kind": "causal", "window": 512, "cache_blocks": 40, "block_size": 16, "cache_bytes": 1}


class Workers:
    """An engine's workers, as they answer one call after the other."""

    def __init__(self, advance: Iterator[list[Any]], engines: int = 1) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=engines))
        self._advance = advance

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """Every worker's reply; the last one does not sample."""
        self.calls.append((method, *args))
        if method == "steersman_advance_load":
            return [*next(self._advance), None]
        if method == "steersman_end_load":
            return [DESCRIBED, DESCRIBED, None] if args[0] else [None, None, None]
        return [True, True, True] if method == "steersman_is_free" else [None, None, None]


@pytest.fixture
def begin(models: Path) -> Callable[..., tuple[ModelLifecycle, GuidedEngine, Workers]]:
    def build(*replies: list[Any], engines: int = 1) -> tuple[ModelLifecycle, GuidedEngine, Workers]:
        workers = Workers(iter(replies), engines)
        engine = GuidedEngine(workers, Registry({}), Limits(guided_requests=8), WorkerProcesses(()))  # type: ignore[arg-type]
        return ModelLifecycle(engine, {}, {}, models), engine, workers

    return build


Begin = Callable[..., tuple[ModelLifecycle, GuidedEngine, Workers]]


def test_a_model_is_there_once_every_worker_has_it(begin: Begin) -> None:
    lifecycle, engine, workers = begin([False, False], [True, False], [True, True])

    async def run() -> None:
        task = lifecycle.begin_load("reward_model", "later", "first", 0.5)
        assert not engine.registry.models
        assert (await task).state == "ready"
        assert engine.registry.models["later"].window == 512
        assert engine.budget.free == {"later": 40}
        await lifecycle.begin_unload("later")

    asyncio.run(run())
    assert workers.calls[0][:3] == ("steersman_begin_load", "reward_model", "later")
    assert workers.calls[0][4] == 2**29
    assert ("steersman_end_load", True) in workers.calls
    assert (engine.registry.models, engine.budget.free) == ({}, {})
    assert lifecycle.describe()["data"] == []


def test_paths_that_cannot_be_read_and_weights_that_are_not_whole_are_refused_by_name(
    begin: Begin, models: Path, tmp_path: Path
) -> None:
    lifecycle, _, _ = begin()
    loop = models / f"loop-{tmp_path.name}"
    loop.symlink_to(loop)
    cut = Path(shutil.copytree(models / "first", models / f"half-{tmp_path.name}"))
    weights = cut / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    for path, words in (
        (loop.name, "cannot be read"),
        ("x" * 4000, "cannot be read"),
        ("a\0b", "cannot be read"),
        (cut.name, f"{weights} is cut off"),
    ):
        with pytest.raises(ChangeRefused, match=words) as refused:
            lifecycle.begin_load("reward_model", "later", path, None)
        assert (refused.value.status, refused.value.field) == (400, "path")
        assert repr(path)[1:100].strip("'") in str(refused.value)
    loop.unlink()


def test_unloading_waits_for_those_who_use_the_model(begin: Begin) -> None:
    lifecycle, engine, workers = begin([True, True])

    async def run() -> None:
        await _load(lifecycle)
        with engine.users.using([engine.registry.models["later"]]):
            unloading = lifecycle.begin_unload("later")
            await asyncio.sleep(0)
            assert not engine.registry.models
            assert engine.budget.free == {"later": 40}
            shown = lifecycle.describe()["data"][0]
            assert (shown["state"], shown["requests"]) == ("unloading", 1)
            with pytest.raises(ChangeRefused, match="'later' is unloading") as refused:
                lifecycle.begin_unload("later")
            assert refused.value.status == 409
            assert ("steersman_unload", "later") not in workers.calls
        await unloading
        assert ("steersman_unload", "later") in workers.calls
        assert engine.budget.free == {}

    asyncio.run(run())


def test_where_one_worker_refuses_all_forget(begin: Begin) -> None:
    lifecycle, engine, workers = begin([False, "no room"], [True, "no room"])
    entry = asyncio.run(_load(lifecycle))
    assert (entry.state, entry.error) == ("failed", "no room")
    assert ("steersman_end_load", False) in workers.calls
    assert not engine.registry.models
    assert [model["state"] for model in lifecycle.describe()["data"]] == ["failed"]


def test_a_name_is_free_again_after_a_failure(begin: Begin) -> None:
    lifecycle, _, _ = begin(["no room", "no room"], [True, True])

    async def run() -> None:
        await _load(lifecycle)
        assert (await _load(lifecycle)).state == "ready"

    asyncio.run(run())
    assert [model["state"] for model in lifecycle.describe()["data"]] == ["ready"]


def test_an_engine_that_fails_leaves_no_name_behind(begin: Begin) -> None:
    lifecycle, engine, _ = begin()
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(_load(lifecycle))
    assert not engine.registry.models
    assert [model["state"] for model in lifecycle.describe()["data"]] == ["failed"]


def test_there_is_a_most_of_models(begin: Begin) -> None:
    lifecycle, _, _ = begin(*([[True, True]] * MAX_MODELS))

    async def run() -> None:
        for number in range(MAX_MODELS):
            await _load(lifecycle, f"later-{number}")
        with pytest.raises(ChangeRefused, match="unload one first"):
            lifecycle.begin_load("policy", "one-more", "expert", None)

    asyncio.run(run())


def test_several_engines_are_refused(begin: Begin) -> None:
    lifecycle, _, _ = begin(engines=2)
    with pytest.raises(ChangeRefused, match="--data-parallel-size"):
        lifecycle.begin_load("reward_model", "later", "first", None)


class HeadWorkers(Workers):
    """Their model is a head; they answer its probe with `proof`, or raise it."""

    def __init__(self, proof: Any) -> None:
        super().__init__(iter([[True, True]]))
        self.proof = proof
        self.spans: list[Any] = []

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """See Workers.collective_rpc."""
        replies = await super().collective_rpc(method, args)
        if method == "steersman_end_load":
            return [{**HEAD, "drift": None}] * 2
        if method == "steersman_probe":
            return [[[5, 6], [7]]] * 2
        if method != "steersman_prove":
            return replies
        if isinstance(self.proof, Exception):
            raise self.proof
        return [self.proof] * 2

    async def generate(
        self, prompt: Any, params: Any, request_id: str, lora_request: object = None
    ) -> AsyncIterator[Any]:
        """vLLM's own: a probe is no guided request."""
        self.spans.append((prompt["prompt_token_ids"], params.extra_args["steersman"]["span"]))
        yield None


HEAD = {"name": "later", "kind": "head", "window": 256, "drift": 0.004}


def _lifecycle_of(workers: Workers, models: Path) -> tuple[ModelLifecycle, GuidedEngine]:
    engine = GuidedEngine(workers, Registry({}), Limits(guided_requests=8), WorkerProcesses(()))  # type: ignore[arg-type]
    return ModelLifecycle(engine, {}, {}, models), engine


def test_a_head_is_there_once_it_is_proven_on_the_base(models: Path) -> None:
    workers = HeadWorkers(HEAD)
    lifecycle, engine = _lifecycle_of(workers, models)
    assert asyncio.run(_load(lifecycle)).state == "ready"
    assert engine.registry.models["later"].drift == 0.004
    assert (engine.budget.free, sorted(workers.spans)) == ({}, [([5, 6], [1, 2]), ([7], [0, 1])])
    (proof,) = [call for call in workers.calls if call[0] == "steersman_prove"]
    assert len(set(proof[2])) == 2, "each text under a key of its own"


@pytest.mark.parametrize("proof", ["off by 0.7", RuntimeError("a worker has failed")], ids=str)
def test_a_head_that_is_not_proven_leaves_the_workers(models: Path, proof: Any) -> None:
    workers = HeadWorkers(proof)
    lifecycle, engine = _lifecycle_of(workers, models)

    async def run() -> None:
        task = lifecycle.begin_load("reward_model", "later", "first", None)
        await asyncio.wait([task])
        task.exception()

    asyncio.run(run())
    (shown,) = lifecycle.describe()["data"]
    assert (shown["state"], shown["error"]) == ("failed", str(proof))
    assert ("steersman_unload", "later") in workers.calls
    assert not engine.registry.models


async def _load(lifecycle: ModelLifecycle, name: str = "later") -> Any:
    return await lifecycle.begin_load("reward_model", name, "first", None)
