"""What the benchmarks leave behind on a GPU: no memory of theirs, no stream, no eager version shown as captured."""

import torch

from steersman.benchmarks.kernels import measure_device, time_calls


def test_measuring_the_device_keeps_no_memory_of_it() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    device = measure_device()
    assert 1e11 < device.bytes_per_second < 2e13
    assert torch.cuda.memory_reserved() - before < 2**26


def test_a_version_that_cannot_be_captured_is_timed_eagerly_and_leaves_the_stream() -> None:
    current = torch.cuda.current_stream()
    sets = [(torch.rand(2**20, device="cuda"),) for _ in range(4)]
    _, captured = time_calls(lambda values: (values[values > 0.5],), sets)
    assert not captured
    assert torch.cuda.current_stream() == current
    microseconds, captured = time_calls(lambda values: (values * 2,), sets)
    assert captured
    assert microseconds > 0
