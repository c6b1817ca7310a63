"""A worker's model on its way in or out while the worker goes on decoding.

A call to a worker runs between two steps and holds the next one up. So a checkpoint is read by another process, built
and checked by another thread, on a stream of its own, and calls only ask how far it is. What the device can do for
nobody else meanwhile, capturing CUDA graphs, is done by those calls, one graph each.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from steersman.guidance.asking import AnyPolicy, AnyReward
from steersman.guidance.checkpoints import ModelRefused, first_line
from steersman.guidance.head_files import HeadCheckpoint, is_head
from steersman.guidance.policies import build_policy
from steersman.guidance.reward_loading import build_reward_model
from steersman.guidance.streams import hold_stream
from steersman.server.compilation import compile_sampling_kernels
from steersman.server.loading import Destination
from steersman.server.memory import require_room, weight_bytes
from steersman.server.reading import POLICY, Wanted, read_apart

logger = logging.getLogger(__name__)

_SWITCH_SECONDS = 1e-4
"""After which a thread that waits for Python gets it. A step lets go of it hundreds of times, and would wait as often
for Python's own 5 ms."""
_DONE = object()


class BackgroundTask:
    """Work of a thread that nobody waits for when the process ends."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.failure: str | None = None
        self._thread = Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it has not come to its end."""
        return self._thread.is_alive()

    def _run(self, work: Callable[[], None]) -> None:
        # Only the reason is kept: the exception would hold on to whatever lay in memory when it was raised.
        try:
            work()
        except ModelRefused as refusal:
            self.failure = str(refusal)
        except torch.OutOfMemoryError as error:
            self.failure = f"the device's memory is full: {first_line(error)}"
        except Exception as error:
            logger.exception("loading a model failed")
            self.failure = f"{type(error).__name__}: {first_line(error)}"


class ModelLoad:
    """A model that is being loaded."""

    def __init__(self, wanted: Wanted, destination: Destination) -> None:
        self.model: AnyPolicy | AnyReward | None = None
        self._turns: Iterator[None] | None = None
        self._failure: str | None = None
        self._task = BackgroundTask(lambda: self._load(wanted, destination))

    @property
    def reading(self) -> bool:
        """Whether it is still read, built and checked, of which nothing needs a call."""
        return self._task.running

    def advance(self) -> bool:
        """Whether it is loaded; called between steps, and does a short turn of what can be done only there. Raises
        ModelRefused, and does so at every later call: other workers may not have come as far."""
        if self.reading:
            return False
        self._failure = self._failure or self._task.failure
        if self._failure is not None:
            raise ModelRefused(self._failure)
        assert self.model is not None
        if self._turns is None:
            self._turns = self._finish(self.model)
        try:
            return next(self._turns, _DONE) is _DONE
        except (ModelRefused, RuntimeError) as error:
            self._failure = str(error)
            raise

    def _finish(self, model: AnyPolicy | AnyReward) -> Iterator[None]:
        captured = False
        for _ in model.capture():
            captured = True
            yield
        if captured:
            model.check()

    def _load(self, wanted: Wanted, to: Destination) -> None:
        _leave_the_steps_core()
        cache = 0 if is_head(wanted.path) else to.cache_bytes
        require_room(wanted.label, to.device, weight_bytes(Path(wanted.path), to.dtype), cache, read=False)
        checkpoint = read_apart(wanted)
        with _yielding(), _own_stream(to.device):
            compile_sampling_kernels(to.vocabulary, to.device)
            self.model = _build(wanted, checkpoint, to)
            self.model.warm_up()
            self.model.check()


def free_apart(held: list[Any]) -> BackgroundTask:
    """Lets go of what `held` holds, and gives the memory back to the device. The caller keeps nothing else of it."""

    def free() -> None:
        # No cycle holds a model; a collection of the whole process's objects would keep Python to itself.
        held.clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    return BackgroundTask(free)


def _build(wanted: Wanted, checkpoint: Any, to: Destination) -> AnyPolicy | AnyReward:
    model = checkpoint if wanted.kind == POLICY else checkpoint.model
    module, cache = (model.head, 0) if isinstance(model, HeadCheckpoint) else (model, to.cache_bytes)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    require_room(wanted.label, to.device, weights, cache, read=True)
    if to.device.type == "cpu":
        # Out of the memory in which it was handed over, which is freed as a whole only.
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()
    if wanted.kind == POLICY:
        return build_policy(wanted.name, model, to.device, to.cache_bytes, to.max_rows, to.base)
    return build_reward_model(*(wanted.name, checkpoint, to.tokenizer, to.device, to.cache_bytes, to.max_rows, to.base))


def _leave_the_steps_core() -> None:
    """On a CPU vLLM binds the thread that decodes to a core, which threads and processes begun by it would share."""
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    # vLLM takes `torch.set_num_threads` away; this sets the calling thread's own number.
    torch._C.set_num_threads(1)


@contextmanager
def _yielding() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """A model that is built inside keeps the stream."""
    if device.type != "cuda":
        yield
        return
    held = hold_stream(device)
    with torch.cuda.stream(held.stream):
        yield
        held.stream.synchronize()
