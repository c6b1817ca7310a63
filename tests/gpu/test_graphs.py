"""Captures for real: one that fails leaves nothing behind, and a model's graphs outlive every other model."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance.auxiliary import Prefix
from steersman.guidance.cached import make_ready
from steersman.guidance.graphs import CudaCapture
from steersman.guidance.reward_loading import build_reward_model, load_reward_model, read_reward_checkpoint
from tests.support.gpu_runtime import DEVICE
from tests.support.tiny import VOCABULARY


def test_a_model_that_goes_leaves_the_graphs_of_the_others_as_they_were(models: Path) -> None:
    """cuBLAS keeps a workspace for each stream, which graphs write to: it must not go with another model's memory."""
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    options: dict[str, Any] = {"device": DEVICE, "cache_bytes": 2**22, "max_rows": 4}
    names = ("first", "second")
    gone, kept = (load_reward_model(name, str(models / name), tokenizer, **options) for name in names)
    prompt, candidates = list(range(2, 40)), torch.randint(2, VOCABULARY, (1, 10), device=DEVICE)
    before, _ = kept.score([Prefix("before", prompt, [])], candidates, None)
    kept.release("before")
    del gone
    gc.collect()
    torch.cuda.empty_cache()
    # Whatever was given back is written over.
    over = [torch.full((2**22,), torch.nan, device=DEVICE) for _ in range(64)]
    after, _ = kept.score([Prefix("after", prompt, [])], candidates, None)
    assert torch.equal(before, after), len(over)


@pytest.mark.parametrize("failing", ["work", "a read", "a stream that is not joined"])
def test_a_capture_that_fails_leaves_nothing_behind(failing: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    values, other = torch.ones(2**20, device=device), torch.cuda.Stream(device)
    capture = CudaCapture(device)

    def work() -> torch.Tensor:
        doubled = values * 2
        if torch.cuda.is_current_stream_capturing():
            if failing == "work":
                raise ValueError("the work failed")
            if failing == "a read":
                doubled.sum().item()
            else:
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    doubled += 1
        return doubled

    before = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(device)
    with torch.cuda.stream(before):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            capture(work)
        assert torch.cuda.current_stream(device) == before
    if failing == "work":
        assert str(raised.value) == "the work failed"
    del raised, before
    gc.collect()
    torch.rand(8, device=device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) <= held + 2**21, "the pool was not given back"
    replayed = capture(lambda: values * 3)
    replayed.replay()
    assert torch.equal(replayed.output, values * 3)


def test_a_model_whose_capture_fails_runs_without_graphs(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    checkpoint = read_reward_checkpoint("first", str(models / "first"), tokenizer)
    model: Any = build_reward_model("first", checkpoint, tokenizer, DEVICE, 2**22, 4)
    causal, before = model.model, torch.cuda.current_stream()
    forward, captured = causal._forward_candidates, []

    def fail_late(*arguments: Any) -> torch.Tensor:
        outputs: torch.Tensor = forward(*arguments)
        if torch.cuda.is_current_stream_capturing():
            captured.append(outputs.shape)
            if len(captured) == 3:
                outputs.sum().item()
        return outputs

    monkeypatch.setattr(causal, "_forward_candidates", fail_late)
    make_ready(model)
    assert "'first' is run without CUDA graphs" in caplog.text
    assert len(captured) == 3
    assert torch.cuda.current_stream() == before
    assert not causal.sizes
    torch.rand(8, device=DEVICE)
