"""Compiles the sampling step's kernels before the first guided request: within a step they would hold every stream up
for seconds each."""

import time

import torch

from steersman.kernels.dispatch import compile_cpu_kernels, has_kernels
from steersman.server.logs import tell

_SECONDS_BETWEEN_LINES = 5.0


def compile_sampling_kernels(vocabulary: int, device: torch.device) -> None:
    """Compiles every launch of the sampling step over logits [B, vocabulary], with a line of progress now and then.

    What was compiled on this machine before is found in Triton's or Numba's cache.
    """
    if not has_kernels(device):
        compile_cpu_kernels()
        return
    from steersman.kernels.production import distinct_launches, sampling_launches

    launches = list(distinct_launches(sampling_launches(vocabulary)).values())
    began = shown = time.monotonic()
    for done, launch in enumerate(launches, start=1):
        launch.compile()
        now = time.monotonic()
        if done == len(launches) or now - shown > _SECONDS_BETWEEN_LINES:
            tell(f"kernels of the sampling step: {done} of {len(launches)} compiled, {now - began:.0f} s")
            shown = now
