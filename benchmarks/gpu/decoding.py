"""A decoding loop as Model Runner V2 runs it: what the host knows of a step's tokens it learns at the next one."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import torch

from steersman.benchmarks.gpu.base_step import BaseStep
from steersman.guidance.plan import compile_plan
from steersman.guidance.request import parse_guidance
from steersman.guidance.rows import GuidedRequest, Row
from steersman.guidance.runtime import GuidanceRuntime

_WARM_UP = 3
"""Steps before those that are measured: the first one reads the prompts."""
_UNKNOWN = -1
_keys = count()


@dataclass(frozen=True)
class Measured:
    """One round; milliseconds a step."""

    step_ms: float
    host_ms: tuple[float, float, float]
    """The host's share in beginning models beside the base's step, in the base's step, and in guiding."""


@dataclass(frozen=True)
class Method:
    """A way to decode, and the auxiliary model that it needs; plain decoding needs none."""

    model: str | None
    guidance: dict[str, Any] | None
    beside: bool = True
    """Whether what does not need the base's logits is begun beside the base's step."""


class _Answers:
    """The requests of a batch and what the host knows of their tokens."""

    def __init__(self, runtime: GuidanceRuntime, guidance: Any, prompts: list[list[int]]) -> None:
        plan = compile_plan(parse_guidance(guidance))  # type: ignore[arg-type]
        self.runtime, self.prompts = runtime, prompts
        self.outputs: list[list[int]] = [[] for _ in prompts]
        self.requests: list[GuidedRequest] = [runtime.start(next(_keys), plan, len(prompt)) for prompt in prompts]

    def rows(self) -> list[Row]:
        """Returns the batch's rows, in the order of the prompts."""
        return [Row(n, request, self.prompts[n], self.outputs[n]) for n, request in enumerate(self.requests)]

    def append(self, tokens: torch.Tensor) -> None:
        """Every answer has one token more, which the host learns when it has arrived."""
        place = len(self.outputs[0])
        for output in self.outputs:
            output.append(_UNKNOWN)

        def use(values: list[int]) -> None:
            for output, value in zip(self.outputs, values, strict=True):
                output[place] = value

        self.runtime.read_late(tokens.clone(), use)

    def finish(self, steps: int) -> None:
        """Releases all requests; raises RuntimeError where one was not guided at every step."""
        self.runtime.settle(wait=True)
        pairs = zip(self.requests, self.outputs, strict=True)
        reports = [self.runtime.finish(request.key, output) for request, output in pairs]
        for report in reports:
            if report is None or report.error is not None or report.guided_tokens != steps:
                reason = "no report" if report is None else report.error or f"{report.guided_tokens} steps were guided"
                raise RuntimeError(f"{steps} steps were to be guided: {reason}")


class Decoding:
    """A base model and a runtime that guides it, by methods."""

    def __init__(
        self, base: BaseStep, runtime: GuidanceRuntime, models: Mapping[str, Any], methods: Mapping[str, Method],
        context: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.base, self.models = base, models
        self._runtime, self._methods, self._context, self._device = runtime, methods, context, device

    def weight_bytes(self, method: str) -> int:
        """Of the auxiliary model that a method reads once a step."""
        model = self._methods[method].model
        return 0 if model is None else int(self.models[model].describe()["weight_bytes"])

    @torch.inference_mode()
    def run(self, method: str, sequences: int, steps: int, watched: bool = False) -> Measured:
        """Decodes `steps` tokens of every sequence behind fresh random prompts. watched: a wait of the host for the
        device within guidance raises RuntimeError once the prompts have been read."""
        chosen, vocabulary = self._methods[method], self.base.logits.shape[1]
        prompts = torch.randint(2, vocabulary, (sequences, self._context)).tolist()
        answers = None if chosen.guidance is None else _Answers(self._runtime, chosen.guidance, prompts)
        self.base.tokens.copy_(torch.tensor([prompt[-1] for prompt in prompts]))
        host, began = [0.0, 0.0, 0.0], time.perf_counter()
        for step in range(-_WARM_UP, steps):
            if step == 0:
                synchronise(self._device)
                host, began = [0.0, 0.0, 0.0], time.perf_counter()
            spent = self._step(answers, chosen.beside and step > -_WARM_UP, watched and step >= 0)
            host = [total + part for total, part in zip(host, spent, strict=True)]
        synchronise(self._device)
        wall = time.perf_counter() - began
        if answers is not None:
            answers.finish(steps + _WARM_UP)
        begun, base, guided = (1e3 * part / steps for part in host)
        return Measured(1e3 * wall / steps, (begun, base, guided))

    def _step(self, answers: _Answers | None, beside: bool, watched: bool) -> tuple[float, float, float]:
        """Returns the host's seconds in each part."""
        marks = [time.perf_counter()]
        if answers is not None and beside:
            with _watching(watched):
                self._runtime.read_ahead(answers.rows(), self.base.tokens.clone)
        marks.append(time.perf_counter())
        self.base.step()
        marks.append(time.perf_counter())
        logits = self.base.logits
        if answers is not None:
            with _watching(watched):
                self._runtime.step(logits, answers.rows(), self.base.tokens, hidden=self.base.hidden)
        marks.append(time.perf_counter())
        # Gumbel-max, which draws from the softmax without a wait.
        self.base.tokens.copy_((logits - torch.empty_like(logits).exponential_().log_()).argmax(dim=-1))
        if answers is not None:
            answers.append(self.base.tokens)
        begun, base, guided = (after - before for before, after in pairwise(marks))
        return begun, base, guided


def synchronise(device: torch.device) -> None:
    """Waits for the device where there is one to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _watching(watched: bool) -> Iterator[None]:
    if not watched:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
