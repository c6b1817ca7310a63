"""A capture that fails leaves torch as it was, and a model whose graphs cannot be captured runs without any."""

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance import auxiliary, streams
from steersman.guidance.auxiliary import Prefix
from steersman.guidance.cached import make_ready
from steersman.guidance.graphs import Captured, CudaCapture
from steersman.guidance.reward_loading import build_reward_model, read_reward_checkpoint
from tests.support.device import capture_by_recording
from tests.support.fake_cuda import DEVICE, FakeCuda
from tests.support.gpu_runtime import DEVICE as MODELS_DEVICE
from tests.support.gpu_runtime import acting_as_gpu
from tests.support.tiny import VOCABULARY


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(streams, "_pools", {})
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def _fail_in_capture(cuda: FakeCuda) -> Callable[[], torch.Tensor]:
    def work() -> torch.Tensor:
        if cuda.recording and cuda.failing == "work":
            raise ValueError("the work failed")
        return torch.zeros(1)

    return work


@pytest.mark.parametrize(
    ("failing", "reason"),
    [("begin", "beginning failed"), ("work", "the work failed"), ("end", "ending failed")],
)
def test_a_capture_that_fails_leaves_nothing_behind(cuda: FakeCuda, failing: str, reason: str) -> None:
    before = cuda.draw()
    capture = CudaCapture(DEVICE)
    cuda.failing = failing
    with cuda.stream(before):
        with pytest.raises((RuntimeError, ValueError), match=f"^{reason}$"):
            capture(_fail_in_capture(cuda))
        assert cuda.current is before
    assert not cuda.recording, "the allocator would give the graphs' pool to everything"
    assert not any(cuda.uses.values()), "the pool's memory would stay in use"
    assert not cuda.generator.state, "nothing could be sampled any more"
    cuda.failing = ""
    capture(_fail_in_capture(cuda))


def test_work_that_fails_before_the_capture_is_joined(cuda: FakeCuda) -> None:
    before = cuda.draw()
    with cuda.stream(before), pytest.raises(ZeroDivisionError):
        CudaCapture(DEVICE)(lambda: torch.zeros(1 // 0))
    assert cuda.waits == [(2, 1), (1, 2)]
    assert cuda.current is cuda.default


class _FailingCapture:
    """Captures by recording until it fails, at the `last` graph."""

    def __init__(self, last: int) -> None:
        self.outputs: list[weakref.ref[torch.Tensor]] = []
        self._last = last

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        if len(self.outputs) == self._last:
            raise RuntimeError("operation not permitted when stream is capturing")
        captured = capture_by_recording(work)
        self.outputs.append(weakref.ref(captured.output))
        return captured


@pytest.mark.skipif(MODELS_DEVICE.type == "cuda", reason="acts as a GPU on the CPU")
@pytest.mark.parametrize("last", [0, 1])
def test_a_model_whose_capture_fails_runs_without_graphs_and_keeps_none(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, last: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    checkpoint = read_reward_checkpoint("first", str(models / "first"), tokenizer)
    capture = _FailingCapture(last)
    # Of its own: what else runs in the process may have silenced the project's loggers.
    logger = logging.Logger("auxiliary")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(auxiliary, "logger", logger)
    with acting_as_gpu():
        monkeypatch.setattr(auxiliary, "make_capture", lambda _: capture)
        model: Any = build_reward_model("first", checkpoint, tokenizer, "cpu", 2**22, 4)
        make_ready(model)
        assert "'first' is run without CUDA graphs, which is slower: operation not permitted" in caplog.text
        gc.collect()
        assert [output() for output in capture.outputs] == [None] * last
        prompt = list(range(2, 30))
        rewards, _ = model.score([Prefix("one", prompt, [])], torch.tensor([[5, VOCABULARY - 9]]), None)
    texts = torch.tensor([[*prompt, 5], [*prompt, VOCABULARY - 9]])
    with torch.inference_mode():
        model.model.model.set_attn_implementation("eager")
        plain = model.model.model(texts).logits[:, 0]
    torch.testing.assert_close(rewards[0], plain, atol=1e-3, rtol=1e-3)
