"""The engine as the HTTP routes see it: admits guided requests, collects their reports, turns failures into errors."""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any

from steersman.guidance.request import BestOfN, Blockwise, GuidanceError, parse_guidance
from steersman.server.admission import Ticket, admit, admit_search
from steersman.server.budget import CacheBudget
from steersman.server.config import CONFIG_KEY
from steersman.server.errors import GuidanceFailed, reject
from steersman.server.limits.queue import GuidedQueue
from steersman.server.limits.settings import Limits
from steersman.server.liveness import Workers
from steersman.server.metrics.requests import begin_counting, count_answer, count_error, following
from steersman.server.registry import LoadedModel, Registry
from steersman.server.reports import Finished, ReportCollector
from steersman.server.search import Search, run_search
from steersman.server.users import ModelUsers
from steersman.server.vllm import EngineClient, EngineDeadError, RequestOutput, RequestOutputKind, SamplingParams


class GuidedEngine:
    """Wraps vLLM's engine client; everything but `generate` and `check_health` is vLLM's own."""

    def __init__(self, engine: EngineClient, registry: Registry, limits: Limits, workers: Workers) -> None:
        self._engine = engine
        self._workers = workers
        self.stopping = False
        """Whether the server was told to stop, so that an engine that is gone is no failure."""
        self.registry = registry
        begin_counting(registry.reward_models, registry.policies)
        self.limits = limits
        self.users = ModelUsers()
        self.budget = CacheBudget({m.name: m.cache_blocks for m in registry.models.values() if m.cache_blocks})
        at_once = limits.guided_requests or engine.vllm_config.scheduler_config.max_num_seqs
        self.queue = GuidedQueue(at_once, limits.waiting_requests, lambda: self.budget.waiting)
        self._reports: dict[str, dict[int, dict[str, Any]]] = {}
        self._collector = ReportCollector(self._finish, sharded=registry.sharded)
        self._cleaning: set[asyncio.Task[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def check_health(self) -> None:
        """Raises EngineDeadError as soon as a worker has died, before vLLM has given its group up."""
        if self._workers.lost() is not None:
            raise EngineDeadError
        await self._engine.check_health()

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Checks a guided request before anything is sent, so that even a stream is refused with HTTP 400."""
        entry = (sampling_params.extra_args or {}).get(CONFIG_KEY)
        if entry is None:
            return self._engine.generate(prompt, sampling_params, request_id, **kwargs)
        try:
            guidance = parse_guidance(entry["guidance"])
            # A model may have been unloaded since the request came in.
            self.registry.check(guidance)
            if isinstance(guidance, BestOfN | Blockwise):
                search = admit_search(self.registry, self.budget, guidance, entry, prompt, sampling_params)
                outputs = self._generate_searched(search, entry["key"], prompt, sampling_params, request_id, kwargs)
                return self._generate_using([search.model], outputs)
            ticket = admit(self.registry, self.budget, entry, prompt, sampling_params)
        except GuidanceError as error:
            reject(error)
        outputs = self._generate_guided(ticket, prompt, sampling_params, request_id, kwargs)
        return self._generate_using(ticket.models, outputs)

    def add_model(self, model: LoadedModel) -> None:
        """From now on requests may name a model that the workers have loaded."""
        self.users.open(model.name)
        if model.cache_blocks:
            self.budget.add(model.name, model.cache_blocks)
        self.registry = self.registry.with_model(model)
        begin_counting(self.registry.reward_models, self.registry.policies)

    async def retire_model(self, name: str) -> None:
        """From now on no request may name the model; returns when those that do have ended."""
        self.registry = self.registry.without_model(name)
        await self.users.close(name)
        self.budget.remove(name)

    def drain_by(self, drain: Callable[[float], Coroutine[Any, Any, None]]) -> None:
        """drain: waits until no request is in flight, at most so many seconds, in the event loop of this call."""
        self._drain, self._loop = drain, asyncio.get_running_loop()

    def shutdown(self, timeout: float | None = None) -> None:
        """Called from another thread when the server is told to stop. The engine must outlive the last request, whose
        report is asked of it: once it is told to stop itself it answers no such question."""
        self.stopping = True
        asyncio.run_coroutine_threadsafe(self._drain(timeout or 0), self._loop).result()
        if self._engine.output_handler is not None:
            # It would take the end of the engine's process for a failure, and say so.
            self._loop.call_soon_threadsafe(self._engine.output_handler.cancel)
        self._engine.shutdown(timeout=0)

    async def describe(self) -> dict[str, Any]:
        """The body of `GET /v1/guidance`: the registry's facts with the worker's cache use and work so far."""
        body = self.registry.describe()
        body["limits"] |= self.limits.describe(self.queue.at_once)
        replies = await self._engine.collective_rpc("steersman_describe")
        reply = next(reply for reply in replies if reply is not None)
        current = {model["name"]: model for model in (*reply["reward_models"], *reply["policies"])}
        body["work"] = reply["work"]
        for model in (*body["reward_models"], *body["policies"]):
            model["cache_blocks_in_use"] = current.get(model["name"], {}).get("cache_blocks_in_use")
        return body

    async def score(self, model: LoadedModel, prompt: list[int], response: list[int]) -> list[float]:
        """The model's reward after each token of `response`, once its cache has room for the text."""
        blocks = {model.name: model.blocks_for(len(prompt) + len(response))} if model.cache_blocks else {}
        if self.budget.too_large(blocks) is not None:
            raise GuidanceError("responses", f"are longer than the whole cache of reward model {model.name!r}")
        async with self.budget.reserve(blocks):
            reply = await self._ask_worker("steersman_score", model.name, prompt, response)
        return _checked_rewards(model, reply, reply)

    async def score_answers(
        self, model: LoadedModel, prompt: list[int], responses: list[list[int]]
    ) -> tuple[list[float], int]:
        """The model's reward at the end of each response, and the tokens it read; as many at once as fit its cache."""
        each = model.blocks_for(len(prompt) + max(map(len, responses)))
        at_once = max(1, self.budget.capacity[model.name] // each) if each else len(responses)
        rewards: list[float] = []
        read = 0
        for start in range(0, len(responses), at_once):
            part = responses[start : start + at_once]
            async with self.budget.reserve({model.name: each * len(part)} if each else {}):
                reply = await self._ask_worker("steersman_score_answers", model.name, prompt, part)
            rewards += _checked_rewards(model, reply, reply[0])
            read += reply[1]
        return rewards, read

    async def _ask_worker(self, method: str, *args: Any) -> Any:
        replies = await self._engine.collective_rpc(method, args=args)
        return next((reply for reply in replies if reply is not None), None)

    def take_reports(self, key: str) -> dict[int, dict[str, Any]]:
        """Reports by choice of a finished request; they are kept until they are taken."""
        return self._reports.pop(key, {})

    def peek_report(self, key: str, index: int) -> dict[str, Any] | None:
        """The report of one choice of a request that may still be streaming."""
        return self.peek_reports(key).get(index)

    def peek_reports(self, key: str) -> dict[int, dict[str, Any]]:
        """Reports so far by choice of a request that may still be streaming."""
        return self._reports.get(key, {})

    async def _generate_using(
        self, models: Sequence[LoadedModel], outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        try:
            with self.users.using(models):
                async with aclosing(outputs):
                    async for output in outputs:
                        yield output
        except GuidanceError as error:
            reject(error)

    async def _generate_searched(
        self,
        search: Search,
        key: str,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        kwargs: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        with following(search.guidance.method) as followed:
            followed.admit()
            async with aclosing(run_search(self, search, prompt, params, request_id, kwargs)) as outputs:
                async for output, report in outputs:
                    if report is not None:
                        self._reports[key] = {0: report}
                        count_answer(report)
                        followed.finished = True
                    yield output

    def generate_plain(
        self, prompt: Any, params: SamplingParams, request_id: str, kwargs: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        """vLLM's own generate."""
        return self._engine.generate(prompt, params, request_id, **kwargs)

    @property
    def tokenizer(self) -> Any:
        """The base model's."""
        return self._engine.renderer.tokenizer

    async def _generate_guided(
        self, ticket: Ticket, prompt: Any, params: SamplingParams, request_id: str, kwargs: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        unfinished = set(range(ticket.choices))
        responses: dict[int, list[int]] = defaultdict(list)
        delta = params.output_kind is RequestOutputKind.DELTA
        try:
            with following(ticket.method) as followed:
                async with (
                    self.budget.reserve(ticket.blocks),
                    aclosing(self._engine.generate(prompt, params, request_id, **kwargs)) as outputs,
                ):
                    followed.admit()
                    async for output in outputs:
                        finished = []
                        for choice in output.outputs:
                            if delta:
                                responses[choice.index].extend(choice.token_ids)
                            else:
                                responses[choice.index] = list(choice.token_ids)
                            if choice.finish_reason is not None and choice.index in unfinished:
                                unfinished.discard(choice.index)
                                # Released before anything is awaited: a client that goes now leaves nothing behind.
                                report = self._release(ticket, choice.index, responses[choice.index])
                                finished.append(self._keep_report(ticket, choice.index, report))
                        await asyncio.gather(*finished)
                        followed.finished = not unfinished
                        yield output
        except EngineDeadError:
            count_error("engine")
            raise
        finally:
            # The request is already aborted in the engine; its caches are given back behind that, in order.
            for index in unfinished:
                self._in_background(self._forget(ticket, index))

    def _release(self, ticket: Ticket, index: int, response: list[int]) -> asyncio.Future[dict[str, Any] | None]:
        return self._collector.collect((ticket.key, ticket.choice_seed(index), response))

    async def _keep_report(self, ticket: Ticket, index: int, collected: asyncio.Future[dict[str, Any] | None]) -> None:
        report = await collected
        if report is None:
            return
        error = report.pop("error")
        if error is not None:
            count_error("guidance")
            raise GuidanceFailed(f"guidance failed: {error}")
        count_answer(report)
        self._name_tokens(report)
        self._reports.setdefault(ticket.key, {})[index] = report

    async def _finish(self, finished: list[Finished]) -> list[list[dict[str, Any] | None] | None]:
        replies: list[list[dict[str, Any] | None] | None] = await self._engine.collective_rpc(
            "steersman_finish", args=(finished,)
        )
        return replies

    def _name_tokens(self, report: dict[str, Any]) -> None:
        """Adds their texts to the tokens of a trace; a report without one has no such field."""
        trace = report.pop("trace")
        if report["kl_spent"] is None:
            del report["kl_spent"]
        if trace is None:
            return
        tokenizer = self.tokenizer
        for step in trace:
            for entry in (step, *step["candidates"]):
                entry["token"] = tokenizer.decode([entry["token_id"]])
        report["trace"] = trace

    async def _forget(self, ticket: Ticket, index: int) -> None:
        with suppress(EngineDeadError):
            await self._release(ticket, index, [])

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)


def _checked_rewards(model: LoadedModel, reply: Any, rewards: Any) -> list[float]:
    if isinstance(reply, str) or not all(map(math.isfinite, rewards)):
        reason = reply if isinstance(reply, str) else "its reward is not a finite number"
        raise GuidanceFailed(f"reward model {model.name!r} could not score the text: {reason}")
    return list(rewards)
