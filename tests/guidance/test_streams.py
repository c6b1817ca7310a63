"""Streams have one holder each, and few are drawn however often models come and go."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance import auxiliary, streams
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.graphs import CudaCapture
from steersman.guidance.overlap import CudaSideStream
from steersman.guidance.reward_loading import load_reward_model
from steersman.guidance.streams import StreamsExhausted, hold_stream
from steersman.server import background
from tests.support import gpu_runtime
from tests.support.fake_cuda import DEVICE, FakeCuda

POOL = 32


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(streams, "_pools", {})
    fake = FakeCuda(POOL)
    fake.install(monkeypatch)
    return fake


def test_no_stream_has_two_holders_however_many_are_drawn_elsewhere(cuda: FakeCuda) -> None:
    held, side = [], CudaSideStream(DEVICE)
    for n in range(POOL - 1):
        held.append(hold_stream(DEVICE))
        for _ in range(n % 5):
            cuda.draw()
    with side.fork():
        beside = cuda.current.cuda_stream
    assert len({beside, *(h.stream.cuda_stream for h in held)}) == POOL


def test_where_every_stream_has_a_holder_the_error_says_what_to_do(cuda: FakeCuda) -> None:
    held = [hold_stream(DEVICE) for _ in range(POOL)]
    with pytest.raises(StreamsExhausted, match=r"32 CUDA streams are in use and none is left: unload a model"):
        hold_stream(DEVICE)
    held.pop()
    assert hold_stream(DEVICE).stream.cuda_stream == POOL


def test_a_stream_that_is_given_back_is_lent_before_another_is_drawn(cuda: FakeCuda) -> None:
    kept = hold_stream(DEVICE)
    lent = {hold_stream(DEVICE).stream.cuda_stream for _ in range(1000)}
    assert lent == {2}
    assert kept.stream.cuda_stream == cuda.draw().cuda_stream - 2 == 1


def test_a_stream_that_was_drawn_again_while_it_was_free_has_one_holder(cuda: FakeCuda) -> None:
    first = hold_stream(DEVICE)
    pool = streams._pools[DEVICE]
    pool._given_back.append(first.stream)
    assert hold_stream(DEVICE).stream.cuda_stream != first.stream.cuda_stream


def test_torch_s_capture_stream_and_the_current_one_are_left_alone(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", cuda.draw())
    current = cuda.draw()
    with cuda.stream(current):
        held = [hold_stream(DEVICE) for _ in range(POOL - 2)]
        with pytest.raises(StreamsExhausted):
            hold_stream(DEVICE)
    assert {h.stream.cuda_stream for h in held} == set(range(3, POOL + 1))


def test_every_size_is_warmed_up_and_captured_on_the_models_own_stream(cuda: FakeCuda) -> None:
    warmed: list[int] = []

    def work() -> torch.Tensor:
        warmed.append(cuda.current.cuda_stream)
        return torch.zeros(1)

    side, captures = CudaSideStream(DEVICE), [CudaCapture(DEVICE) for _ in range(3)]
    for capture in captures:
        for _ in range(8):
            capture(work)
    assert cuda.captured_on == [stream for stream in (2, 3, 4) for _ in range(8)]
    assert warmed == [stream for stream in (2, 3, 4) for _ in range(16)]
    with side.fork():
        assert cuda.current.cuda_stream == 1


def test_a_model_that_is_built_in_the_background_keeps_the_stream_of_its_loading(cuda: FakeCuda) -> None:
    with background._own_stream(DEVICE):
        loading = cuda.current.cuda_stream
        capture = CudaCapture(DEVICE)
    capture(lambda: torch.zeros(1))
    assert cuda.captured_on == [loading]
    assert hold_stream(DEVICE).stream.cuda_stream != loading


@pytest.mark.skipif(gpu_runtime.DEVICE.type == "cuda", reason="acts as a GPU on the CPU")
def test_a_model_that_finds_no_stream_is_refused(cuda: FakeCuda, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [hold_stream(DEVICE) for _ in range(POOL)]
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    with gpu_runtime.acting_as_gpu():
        monkeypatch.setattr(auxiliary, "make_capture", lambda _: CudaCapture(DEVICE))
        with pytest.raises(ModelRefused, match=f"reward model 'first': {len(held)} CUDA streams are in use"):
            load_reward_model("first", str(models / "first"), tokenizer, cache_bytes=2**22)
