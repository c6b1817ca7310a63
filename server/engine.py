"""The engine as the HTTP routes see it: admits guided requests, collects their reports, turns failures into errors."""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import Any

from steersman.guidance.head_models import HeadReward
from steersman.guidance.plan import compile_plan
from steersman.guidance.request import (
    BestOfN,
    Blockwise,
    Guidance,
    GuidanceError,
    SteeredGuidance,
    TooLong,
    UnreadableToken,
    UnscorableText,
    parse_guidance,
)
from steersman.guidance.text_form import Source
from steersman.guidance.tokenizers import find_unreadable
from steersman.server import teacher_forcing
from steersman.server.adapter_drift import AdapterDrift
from steersman.server.admission import Ticket, admit, admit_search
from steersman.server.budget import CacheBudget
from steersman.server.config import CONFIG_KEY, GuidanceEntry
from steersman.server.errors import GuidanceFailed, fault_of, reject
from steersman.server.heads import TEXTS_AT_ONCE, forget_text, new_key, prove_head, run_together, score_by_head
from steersman.server.limits.queue import GuidedQueue
from steersman.server.limits.settings import Limits
from steersman.server.liveness import Workers
from steersman.server.metrics.requests import FollowedRequest, begin_counting, count_answer, followed_request
from steersman.server.registry import SHORTER, LoadedModel, Registry
from steersman.server.reports import Finished, ReportCollector
from steersman.server.search import Search, run_search
from steersman.server.users import ModelUsers
from steersman.server.vllm import (
    EngineClient,
    EngineDeadError,
    LoRARequest,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)

TEXT_TOKENS_PER_CALL = 1024
"""Tokens of text that one call to a worker reads, at least one text: other requests' tokens wait for its end."""
_Text = tuple[Ticket, dict[str, Any], SamplingParams]
"""A text whose tokens are forced: its ticket, the prompt in front of it, and how it is decoded."""

_ENGINE_STOP_S = 20
"""For the engine and its workers to release shared memory and semaphores; what has not ended by then is killed."""


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
        self._texts_of_heads = asyncio.Semaphore(TEXTS_AT_ONCE)
        self._adapter_drift = AdapterDrift(engine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def errored(self) -> bool:
        """Whether the engine has failed; one that was told to stop has not."""
        return not self.stopping and bool(self._engine.errored)

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
            if not isinstance(entry, GuidanceEntry):
                raise GuidanceError(f"vllm_xargs.{CONFIG_KEY}", "is the server's own; guidance stands in `guidance`")
            guidance = parse_guidance(entry["guidance"])
            # A model may have been unloaded since the request came in.
            self.registry.check(guidance)
            if isinstance(guidance, BestOfN | Blockwise):
                teacher_forcing.refuse(guidance, sampling_params, entry)
                search = admit_search(
                    self.registry, self.budget, guidance, entry, prompt, sampling_params, self.tokenizer
                )
                followed = followed_request(guidance.method)
                followed.add_prompt()
                outputs = self._generate_searched(
                    search, followed, entry["key"], prompt, sampling_params, request_id, kwargs
                )
                return self._generate_using([search.model], outputs)
            if (adapter := kwargs.get("lora_request")) is not None:
                self._adapter_drift.check(self.registry.heads_of(guidance), adapter)
            ticket = admit(self.registry, self.budget, entry, prompt, sampling_params)
            scored = self._admit_text(guidance, entry, prompt, sampling_params)
        except GuidanceError as error:
            reject(error)
        followed = followed_request(ticket.method)
        followed.add_prompt()
        if scored is not None:
            followed.add_prompt()
            outputs = self._generate_behind_text(ticket, scored, followed, prompt, sampling_params, request_id, kwargs)
        else:
            outputs = self._generate_guided(ticket, followed, prompt, sampling_params, request_id, kwargs)
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
        self._adapter_drift.forget(name)
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
        self._engine.shutdown(timeout=_ENGINE_STOP_S)

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
            model["adapter_drift"] = self._adapter_drift.describe(model["name"])
        return body

    async def measure_adapter(self, guidance: Guidance, adapter: LoRARequest) -> None:
        """Measures how far the heads that guide a request drift where the base runs with an adapter. Raises
        GuidanceError where one of them does not fit it."""
        heads = self.registry.heads_of(guidance)
        with self.users.using([self.registry.models[name] for name in heads]):
            await self._adapter_drift.measure(heads, adapter)

    async def measure_prompt(
        self, models: Sequence[LoadedModel], prompt: list[int], source: Source | None, field: str
    ) -> dict[str, int]:
        """Tokens of a prompt as each of the text models reads it; nothing for one that the base model cannot read,
        which vLLM refuses.

        prompt: its token ids, where it has no `source`. field: the request's own for it. Raises GuidanceError where a
        model's chat template refuses the prompt.
        """
        if not self._may_fit(prompt, source):
            return {}
        with self.users.using(models):
            names = [model.name for model in models]
            sent = None if source is None else asdict(source)
            reply = await self._ask_worker("steersman_measure", names, prompt, sent)
        for name, reason in reply["unreadable"].items():
            raise GuidanceError(
                field,
                f"{reason}; send others, leave the model out or start the server with --reward-template {name}=raw, "
                "pair or a Jinja file",
            )
        return dict(reply["tokens"])

    def _may_fit(self, prompt: list[int], source: Source | None) -> bool:
        """Whether a prompt can be within the base model's window and vocabulary: others are not sent to a worker, where
        decoding waits for it."""
        config = self._engine.model_config
        if source is None:
            readable = find_unreadable(prompt, config.get_vocab_size()) is None
            return readable and len(prompt) <= config.max_model_len
        return source.characters <= config.max_model_len * self.tokenizer.max_chars_per_token

    async def score_prefixes(
        self, model: LoadedModel, prompt: list[int], response: list[int], source: dict[str, Any] | None = None
    ) -> list[float]:
        """The model's reward after each token of `response`, once its cache has room for the text.

        A model that reads text reads all of it again for each token: one call to the worker, during which no request
        is decoded, scores as many as have TEXT_TOKENS_PER_CALL tokens together.
        """
        if model.kind == HeadReward.kind:
            return await self._score_by_head(model, prompt, response, 0)
        blocks = {model.name: model.blocks_for(len(prompt) + len(response))} if model.cache_blocks else {}
        if self.budget.too_large(blocks) is not None:
            raise GuidanceError("responses", f"are longer than the whole cache of reward model {model.name!r}")
        async with self.budget.reserve(blocks):
            at_once = _texts_at_once(len(prompt) + len(response)) if model.kind == "text" else len(response)
            rewards: list[float] = []
            while (start := len(rewards)) < len(response):
                part = response[: start + at_once]
                reply = await self._ask_worker("steersman_score", model.name, prompt, part, start, source)
                rewards += _checked_rewards(model, reply)
        return rewards

    async def score_answers(
        self, model: LoadedModel, prompt: list[int], responses: list[list[int]], source: dict[str, Any] | None = None
    ) -> tuple[list[float], int]:
        """The model's reward at the end of each response, and the tokens it read; as many at once as fit its cache.

        Raises UnscorableText where one of them cannot be scored.
        """
        if model.kind == HeadReward.kind:
            scored = (self._score_by_head(model, prompt, response, len(response) - 1) for response in responses)
            return [rewards[0] for rewards in await run_together(scored)], 0
        longest = len(prompt) + max(map(len, responses))
        each = model.blocks_for(longest)
        if each and self.budget.too_large({model.name: each}) is not None:
            raise GuidanceError("responses", f"are longer than the whole cache of reward model {model.name!r}")
        at_once = max(1, self.budget.capacity[model.name] // each) if each else _texts_at_once(longest)
        rewards: list[float] = []
        read = 0
        for start in range(0, len(responses), at_once):
            part = responses[start : start + at_once]
            async with self.budget.reserve({model.name: each * len(part)} if each else {}):
                reply = await self._ask_worker("steersman_score_answers", model.name, prompt, part, source)
            if not isinstance(reply, dict | str):
                read += reply[1]
                reply = reply[0]
            rewards += _checked_rewards(model, reply)
        return rewards, read

    async def prove_head(self, name: str) -> dict[str, Any]:
        """As `heads.prove_head`: its probe is prefilled by vLLM's own engine, behind no guidance."""
        return await prove_head(self._engine, name)

    async def _score_by_head(
        self, model: LoadedModel, prompt: list[int], response: list[int], start: int
    ) -> list[float]:
        async with self._texts_of_heads:
            key = new_key()
            try:
                reply = await score_by_head(self._engine, model.name, prompt, response, start, key)
            except BaseException:
                self._in_background(self._forget_text(key))
                raise
        return _checked_rewards(model, reply)

    async def _forget_text(self, key: str) -> None:
        with suppress(EngineDeadError):
            await forget_text(self._engine, key)

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
        request: FollowedRequest,
        key: str,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        kwargs: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        with request.following(fault_of) as followed:
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
        self,
        ticket: Ticket,
        request: FollowedRequest,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        kwargs: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        unfinished = set(range(ticket.choices))
        responses: dict[int, list[int]] = defaultdict(list)
        delta, cut_short = params.output_kind is RequestOutputKind.DELTA, False
        try:
            with request.following(fault_of) as followed:
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
                                cut_short |= choice.finish_reason in ("abort", "error")
                                # Released before anything is awaited: a client that goes now leaves nothing behind.
                                report = self._release(ticket, choice.index, responses[choice.index])
                                finished.append(self._keep_report(ticket, choice.index, report))
                        await asyncio.gather(*finished)
                        followed.finished = not unfinished and not cut_short
                        yield output
        finally:
            # The request is already aborted in the engine; its caches are given back behind that, in order.
            for index in unfinished:
                self._in_background(self._forget(ticket, index))

    def _admit_text(
        self, guidance: SteeredGuidance, entry: dict[str, Any], prompt: Any, params: SamplingParams
    ) -> _Text | None:
        """What scores the prompt, where its log-probabilities are asked for. Raises GuidanceError."""
        if params.prompt_logprobs is None:
            return None
        if self.registry.speculative:
            teacher_forcing.refuse_drafts(entry)
        teacher_forcing.check_mode(self._engine.model_config.logprobs_mode, entry)
        teacher_forcing.check_source(entry)
        tokens = len(prompt["prompt_token_ids"])
        start = teacher_forcing.choose_start(compile_plan(guidance), entry, tokens)
        if start >= tokens:
            return None
        text, forced = teacher_forcing.force_text(entry, prompt, start, params)
        ticket = admit(self.registry, self.budget, forced.extra_args[CONFIG_KEY], text, forced)
        params.prompt_logprobs = None
        return ticket, text, forced

    async def _generate_behind_text(
        self,
        ticket: Ticket,
        scored: _Text,
        followed: FollowedRequest,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        kwargs: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        text_ticket, text, forced = scored
        logprobs = await teacher_forcing.read_logprobs(
            self._generate_guided(text_ticket, followed, text, forced, f"{request_id}-text", kwargs)
        )
        outputs = teacher_forcing.add_logprobs(
            self._generate_guided(ticket, followed, prompt, params, request_id, kwargs),
            logprobs,
            once=params.output_kind is RequestOutputKind.DELTA,
        )
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    def _release(self, ticket: Ticket, index: int, response: list[int]) -> asyncio.Future[dict[str, Any] | None]:
        return self._collector.collect((ticket.key, ticket.choice_seed(index), response))

    async def _keep_report(self, ticket: Ticket, index: int, collected: asyncio.Future[dict[str, Any] | None]) -> None:
        report = await collected
        if report is None:
            return
        error, fault = report.pop("error"), report.pop("fault")
        if fault == "too_long":
            raise TooLong(ticket.length_field, f"{error}; {SHORTER}")
        if fault == "unreadable":
            raise UnreadableToken("guidance", error)
        if error is not None:
            raise GuidanceFailed(f"guidance failed: {error}")
        if ticket.forced:
            return
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


def _texts_at_once(tokens: int) -> int:
    return max(1, TEXT_TOKENS_PER_CALL // tokens)


def _checked_rewards(model: LoadedModel, reply: Any) -> list[float]:
    """A worker's reply; raises UnscorableText where the text cannot be scored, GuidanceFailed where the model
    failed."""
    if isinstance(reply, dict):
        raise UnscorableText("responses", reply["unscorable"])
    if isinstance(reply, str) or not all(map(math.isfinite, reply)):
        reason = reply if isinstance(reply, str) else "its reward is not a finite number"
        raise GuidanceFailed(f"reward model {model.name!r} could not score the text: {reason}")
    return list(reply)
