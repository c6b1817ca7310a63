"""The worker's side door: what the API process asks of the runtime between two steps."""

import math
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any, TypedDict, TypeVar

import torch

from steersman.guidance.auxiliary import TextUnreadable, Unscorable
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.head_models import HeadModel
from steersman.guidance.report import Report
from steersman.guidance.work import Failure
from steersman.server.background import BackgroundTask, ModelLoad, free_apart
from steersman.server.liveness import Address, own_address
from steersman.server.loading import WorkerRuntime, read_source
from steersman.server.reading import Wanted
from steersman.server.reports import Finished

_REPORT = tuple(field.name for field in fields(Report))
_Compared = TypeVar("_Compared", dict[str, Any], float)
_Scored = TypeVar("_Scored", list[float], tuple[list[float], int])


class Measured(TypedDict):
    """What text models make of a prompt, by name."""

    tokens: dict[str, int]
    unreadable: dict[str, str]
    """Why it has no form that the model reads."""


class GuidanceWorkerExtension:
    """Mixed into vLLM's worker class; every method name carries a prefix because it shares the worker's namespace."""

    model_runner: Any
    _steersman_load: ModelLoad | None = None
    _steersman_freeing: BackgroundTask | None = None

    def steersman_prepare(self) -> Address:
        """Called once before the first request: attaches the adapter to the model runner around it. Returns the address
        of this process."""
        processor = self._steersman_processor()
        if processor is not None:
            processor.attach(self.model_runner)
        return own_address()

    def steersman_describe(self) -> dict[str, Any] | None:
        """What is loaded; None on a worker that does not sample (not the last pipeline stage)."""
        runtime = self._steersman_runtime()
        if runtime is None:
            return None
        return {
            "refusal": runtime.refusal,
            "sharded": getattr(self.model_runner, "batch_sharder", None) is not None,
            "speculative": self.model_runner.speculative_config is not None,
            "work": asdict(runtime.work),
            "reward_models": [model.describe() for model in runtime.reward_models.values()],
            "policies": [policy.describe() for policy in runtime.policies.values()],
        }

    def steersman_finish(self, finished: list[Finished]) -> list[dict[str, Any] | None] | None:
        """Releases choices and reports on their tokens; None for a choice that this worker knows nothing of."""
        runtime = self._steersman_runtime()
        if runtime is None:
            return None
        reports = [runtime.finish((key, seed), response) for key, seed, response in finished]
        runtime.show_metrics()
        # dataclasses.asdict would copy each trace.
        return [None if report is None else {name: getattr(report, name) for name in _REPORT} for report in reports]

    def steersman_score(
        self, name: str, prompt: list[int], response: list[int], start: int, source: dict[str, Any] | None
    ) -> list[float] | dict[str, str] | str | None:
        """A reward model's value after each token of `response` from index `start` on, or why it could not be had;
        a dictionary where the text itself is why."""
        runtime = self._steersman_runtime()
        if runtime is None:
            return None
        return _scored(runtime, name, lambda: runtime.score_text(name, prompt, response, start, read_source(source)))

    def steersman_score_answers(
        self, name: str, prompt: list[int], responses: list[list[int]], source: dict[str, Any] | None
    ) -> tuple[list[float], int] | dict[str, str] | str | None:
        """A reward model's value at the end of each response and the tokens it read, or why it could not be had;
        a dictionary where the text itself is why."""
        runtime = self._steersman_runtime()
        if runtime is None:
            return None
        return _scored(runtime, name, lambda: runtime.score_answers(name, prompt, responses, read_source(source)))

    def steersman_score_hidden(
        self, name: str, key: str, tokens: list[int]
    ) -> list[float] | dict[str, str] | str | None:
        """A reward head's outputs for `tokens`, each behind the position of the text `key` whose hidden state was kept
        for it, or why they could not be had; None on a worker that knows nothing of the text."""
        runtime = self._steersman_runtime()
        if runtime is None or key not in runtime.hidden_states:
            return None
        return _scored(runtime, name, lambda: runtime.score_hidden(name, key, tokens))

    def steersman_forget_hidden(self, key: str) -> None:
        """Forgets what was kept of a text."""
        runtime = self._steersman_runtime()
        if runtime is not None:
            runtime.hidden_states.forget(key)

    def steersman_probe(self, name: str) -> list[list[int]] | None:
        """The texts that a head is proven with; empty for another kind of model."""
        runtime = self._steersman_runtime()
        if runtime is None:
            return None
        head = runtime.models.heads.get(name)
        return [] if head is None else head.probe.texts

    def steersman_prove(self, name: str, keys: list[str]) -> dict[str, Any] | str | None:
        """What a head is described by when it was compared with the base model, by the hidden states that were kept at
        the ends of its probe's texts, or why it does not fit."""
        return self._steersman_compare(name, keys, _prove)

    def steersman_measure_drift(self, name: str, keys: list[str]) -> float | str | None:
        """How far a head's outputs for such hidden states are from those in training, as a share of their spread, or
        why it could not be measured."""
        return self._steersman_compare(name, keys, lambda head, hidden: head.measure_drift(hidden).share)

    def _steersman_compare(
        self, name: str, keys: list[str], compare: Callable[[HeadModel, torch.Tensor], _Compared]
    ) -> _Compared | str | None:
        runtime = self._steersman_runtime()
        if runtime is None:
            return None
        if name not in runtime.models.heads:
            return f"no head {name!r} is loaded"
        if not all(key in runtime.hidden_states for key in keys):
            return f"{name!r} cannot be compared: the base's hidden states were not handed over"
        try:
            return compare(runtime.models.heads[name], torch.cat([runtime.hidden_states.take(key) for key in keys]))
        except (ModelRefused, RuntimeError) as refusal:
            return str(refusal)

    def steersman_measure(self, names: list[str], prompt: list[int], source: dict[str, Any] | None) -> Measured | None:
        """A prompt as each of the named text models reads it."""
        runtime = self._steersman_runtime()
        if runtime is None:
            return None
        tokens: dict[str, int] = {}
        unreadable: dict[str, str] = {}
        for name in names:
            try:
                tokens[name] = runtime.measure(name, prompt, read_source(source))
            except TextUnreadable as error:
                unreadable[name] = str(error)
        return {"tokens": tokens, "unreadable": unreadable}

    def steersman_begin_load(self, kind: str, name: str, path: str, cache_bytes: int | None) -> None:
        """Begins to load a model beside the steps; see `steersman_advance_load`."""
        runtime, config = self._steersman_runtime(), self.model_runner.model_config
        if runtime is None:
            return
        destination = runtime.destination
        if cache_bytes is not None:
            destination = replace(destination, cache_bytes=cache_bytes)
        dtype = str(destination.dtype).removeprefix("torch.")
        wanted = Wanted(
            *(kind, name, path, config.model, config.tokenizer, dtype, config.trust_remote_code),
            served=destination.base,
        )
        self._steersman_load = ModelLoad(wanted, destination)

    def steersman_advance_load(self) -> bool | str | None:
        """Whether the model is loaded, or why it cannot be; asked again and again until it is."""
        if self._steersman_load is None:
            return None
        try:
            return self._steersman_load.advance()
        except (ModelRefused, RuntimeError) as error:
            return str(error)

    def steersman_end_load(self, keep: bool) -> dict[str, Any] | None:
        """Puts the loaded model where requests find it and describes it; without `keep` it is forgotten."""
        load, self._steersman_load = self._steersman_load, None
        runtime = self._steersman_runtime()
        if runtime is None or load is None or load.model is None:
            return None
        if keep:
            runtime.add(load.model)
            runtime.show_metrics()
            return load.model.describe()
        held, load.model = [load.model], None
        self._steersman_freeing = free_apart(held)
        return None

    def steersman_unload(self, name: str) -> None:
        """Takes out a model that no request uses any more; `steersman_is_free` says when its memory has gone."""
        runtime = self._steersman_runtime()
        if runtime is not None:
            self._steersman_freeing = free_apart([runtime.remove(name)])
            runtime.show_metrics()

    def steersman_is_free(self) -> bool:
        """Whether the memory of models that were taken out is given back."""
        return self._steersman_freeing is None or not self._steersman_freeing.running

    def _steersman_runtime(self) -> WorkerRuntime | None:
        processor = self._steersman_processor()
        return None if processor is None else processor.runtime

    def _steersman_processor(self) -> Any:
        # vLLM's two interfaces cannot be imported side by side everywhere; only the one in use is looked at.
        if hasattr(self.model_runner, "input_batch"):
            from steersman.server.logits_v1 import GuidanceLogitsProcessor as ProcessorV1

            processors = self.model_runner.input_batch.logitsprocs.all
            return next((p for p in processors if isinstance(p, ProcessorV1)), None)
        from steersman.server.logits_v2 import GuidanceLogitsProcessor as ProcessorV2

        sampler = getattr(self.model_runner, "sampler", None)
        processors = () if sampler is None else sampler.logits_processors
        return next((p for p in processors if isinstance(p, ProcessorV2)), None)


def _prove(head: HeadModel, hidden: torch.Tensor) -> dict[str, Any]:
    head.prove(hidden)
    return head.describe()


def _scored(runtime: WorkerRuntime, name: str, score: Callable[[], _Scored]) -> _Scored | dict[str, str] | str:
    """What `score` returns, or why it failed, in a dictionary where the text itself is why; a model that spoils a text
    is counted as one that spoils an answer."""
    try:
        scored = score()
        rewards = scored[0] if isinstance(scored, tuple) else scored
        if not all(map(math.isfinite, rewards)):
            runtime.work.count_failure(Failure(name, "not_finite", "its reward is not a finite number"))
        return scored
    except Unscorable as error:
        return {"unscorable": str(error)}
    except Exception as error:
        runtime.work.count_failure(Failure(name, "raised", str(error)))
        return str(error)
    finally:
        runtime.show_metrics()
