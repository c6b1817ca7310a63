"""Streams for real: torch draws them from a pool of 32, and each has one holder."""

import torch

from steersman.guidance.streams import hold_stream


def test_streams_have_one_holder_each_and_are_lent_again() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    held = [hold_stream(device) for _ in range(12)]
    handles = {h.stream.cuda_stream for h in held}
    assert len(handles) == len(held)
    lent = {hold_stream(device).stream.cuda_stream for _ in range(100)}
    assert not lent & handles
