"""A runtime on the GPU, or on a CPU that it takes for one: kernels interpreted, forwards replayed."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance import auxiliary, candidates, report, runtime, vocabulary
from steersman.guidance.generate import load_runtime
from steersman.guidance.runtime import GuidanceRuntime
from steersman.kernels import dispatch
from steersman.kernels.launch import Launch
from tests.support.device import capture_by_recording

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REPLAYED = {0, 10}
"""Numbers of candidates with a graph; the others run without."""


@contextmanager
def acting_as_gpu() -> Iterator[None]:
    """Inside, kernels are launched and forwards captured whatever the device."""
    if DEVICE.type == "cuda":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for module in (dispatch, auxiliary, candidates, report, runtime, vocabulary):
            patch.setattr(module, "has_kernels", lambda _: True)
        patch.setattr(auxiliary, "make_capture", lambda _: capture_by_recording)
        patch.setattr(
            auxiliary, "choose_sizes", lambda _, ks: [(rows, k) for k in ks if k in REPLAYED for rows in (3, 1)]
        )
        yield


def load_gpu_runtime(models: Path) -> GuidanceRuntime:
    """Reward models `first`, `second` (causal), `every` (a vocabulary head) and `atop` (a head), policies `expert`,
    `other` and `tilted` (a head)."""
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    rewards = {name: str(models / name) for name in ("first", "second", "every", "atop")}
    policies = {name: str(models / name) for name in ("expert", "other", "tilted")}
    return load_runtime(tokenizer, rewards, policies, cache_bytes=2**22, device=DEVICE)


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Launches by kernel, those of a replay included."""
    counter: Counter[str] = Counter()
    run = Launch.run

    def counted(launch: Launch) -> None:
        counter[launch.kernel.fn.__name__] += 1
        run(launch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "run", counted)
        yield counter
