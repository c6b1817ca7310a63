"""Kernels of the sampling step are compiled before the first guided request, with progress, where there is a GPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steersman.guidance.head_models import ServedBase
from steersman.kernels.launch import Launch
from steersman.kernels.production import sampling_launches
from steersman.server import background, compilation
from steersman.server.background import ModelLoad
from steersman.server.config import CONFIG_KEY, ServerConfig
from steersman.server.loading import Destination, build_runtime, load_tokenizer
from steersman.server.reading import Wanted, read
from tests.support.tiny import COMMON, VOCABULARY

CPU = torch.device("cpu")
BASE = ServedBase(COMMON["hidden_size"], COMMON["num_hidden_layers"], VOCABULARY, COMMON["max_position_embeddings"])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Variants that were compiled, in order, on a CPU that is taken for a GPU."""
    variants: list[tuple[Any, ...]] = []
    monkeypatch.setattr(compilation, "has_kernels", lambda _: True)
    monkeypatch.setattr(Launch, "compile", lambda launch: variants.append(launch.variant))
    return variants


def _config(models: Path, rewards: dict[str, str]) -> Any:
    """Of vLLM, as far as a worker's runtime is built from it."""
    model = SimpleNamespace(
        model=str(models / "base"), tokenizer=str(models / "base"), trust_remote_code=False, dtype=torch.float32,
        get_vocab_size=lambda: VOCABULARY, get_hidden_size=lambda: BASE.hidden_size, max_model_len=BASE.window,
        hf_text_config=SimpleNamespace(num_hidden_layers=BASE.layers), quantization=None,
    )  # fmt: skip
    parallel = SimpleNamespace(rank=1, tensor_parallel_size=2, enable_batch_sharded_sampling=False)
    return SimpleNamespace(
        additional_config={CONFIG_KEY: ServerConfig(rewards, {}, 0.01).dump()}, model_config=model,
        scheduler_config=SimpleNamespace(max_num_seqs=4), parallel_config=parallel,
    )  # fmt: skip


def test_a_server_with_models_compiles_each_variant_once_when_it_starts(
    models: Path, compiled: list[tuple[Any, ...]]
) -> None:
    build_runtime(_config(models, {"first": str(models / "first")}), CPU)
    assert set(compiled) == {launch.variant for launch in sampling_launches(VOCABULARY).values()}
    assert len(compiled) == len(set(compiled))


def test_a_server_without_models_compiles_nothing(models: Path, compiled: list[tuple[Any, ...]]) -> None:
    build_runtime(_config(models, {}), CPU)
    assert compiled == []


def test_the_first_model_that_is_loaded_later_brings_its_kernels(
    models: Path, compiled: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "read_apart", read)
    base = str(models / "base")
    wanted = Wanted(
        "reward_model", "first", str(models / "first"), base, base, "float32", trust_remote_code=False, served=BASE
    )
    load = ModelLoad(wanted, Destination(load_tokenizer(base), torch.float32, CPU, 2**22, 4, VOCABULARY, BASE))
    load._task._thread.join()
    assert load.advance()
    assert set(compiled) == {launch.variant for launch in sampling_launches(VOCABULARY).values()}


def test_progress_is_told_now_and_then_and_at_the_end(
    compiled: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(compilation, "tell", lines.append)
    monkeypatch.setattr(compilation.time, "monotonic", lambda: next(clock))
    compilation.compile_sampling_kernels(VOCABULARY, CPU)
    count = len(compiled)
    assert 2 < len(lines) < count, "not a line for each"
    assert lines[-1].startswith(f"kernels of the sampling step: {count} of {count} compiled")


def test_a_cpu_has_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "compile", lambda _: 1 / 0)
    compilation.compile_sampling_kernels(VOCABULARY, CPU)
