"""Answers of a running server: asked for under settings, measured one by one, summed up by setting."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from steersman.benchmarks.settings import Prompt, Setting, SettingsError
from steersman.benchmarks.statistics import Estimate, estimate, self_similarity
from steersman.training.world import gold

_CONCURRENCY = 64
_DEFAULTS = {"max_tokens": 200, "temperature": 1.0}
_SEEDS = 2**31
_STRIDE = 10_007
"""Keeps the samples of a prompt apart: best_of_n draws from seeds that follow the request's own."""


@dataclass(frozen=True)
class Server:
    """A running server: whose answers, and which of its reward models judges them."""

    session: aiohttp.ClientSession
    model: str
    judge: str | None
    reward_models: tuple[str, ...]
    policies: tuple[str, ...]

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The response's body; raises SettingsError with the server's own words for a request that it refuses."""
        async with self.session.post(path, json=body) as response:
            reply = await response.json(content_type=None)
            if response.status == 400:
                raise SettingsError(" ".join(str(reply["error"]["message"]).split()))
            if response.status != 200:
                raise RuntimeError(f"{path} answers {response.status}: {reply}")
            return dict(reply)


@asynccontextmanager
async def connected(url: str, model: str | None = None, judge: str | None = None) -> AsyncIterator[Server]:
    """A connection to a server; without a name, to the first model that it lists."""
    # A connection that has been idle may be closed by the server in the very moment in which it is used again.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        try:
            async with session.get("/v1/models") as response:
                listed = [entry["id"] for entry in (await response.json())["data"]]
            async with session.get("/v1/guidance") as response:
                loaded = await response.json()
        except (aiohttp.ClientError, KeyError, ValueError) as error:
            raise SettingsError(f"--url {url}: is not a Steersman server: {error}") from None
        if model is not None and model not in listed:
            raise SettingsError(f"--model: {model!r} is not served; served are: {', '.join(listed)}")
        rewards, policies = (tuple(m["name"] for m in loaded[kind]) for kind in ("reward_models", "policies"))
        yield Server(session, model or listed[0], judge, rewards, policies)


@dataclass(frozen=True)
class Answer:
    """One answer and what it is worth."""

    text: str
    tokens: int
    finished: bool
    gold: float | None
    """The demo world's true reward; None for prompts of elsewhere."""
    judge: float | None
    kl: float | None
    """Σ log π − log π₀ of its tokens, nats; None where sampling fields make them tokens of another distribution."""
    auxiliary_tokens: int
    """Tokens that reward models and policies read."""
    saved_tokens: int
    """Tokens that gates spared them."""
    token_kl: tuple[float, ...] = ()
    """log π − log π₀ of each token, nats, where the setting asks for a trace."""
    reward: float | None = None
    """What the one reward model that guides gives to the whole answer; None where none guides, or several do, or its
    last token was not scored."""


Answers = list[list[Answer]]
"""The samples of each prompt."""


async def ask(
    server: Server,
    setting: Setting,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    seed: int = 0,
    on_answer: Callable[[], None] = lambda: None,
) -> Answers:
    """`samples` answers to every prompt; the same seeds under every setting, so that settings differ by nothing else.

    Raises SettingsError, beginning with the setting's name, where the server refuses it.
    """
    gate = asyncio.Semaphore(_CONCURRENCY)

    async def one(number: int, prompt: Prompt, sample: int) -> Answer:
        own_seed = (seed * 1_000_003 + sample * _STRIDE + number) % _SEEDS
        async with gate:
            answer = await _answer(server, setting, prompt, own_seed)
        on_answer()
        return answer

    try:
        # A task group, and not gather, so that nothing goes on being asked after a refusal.
        async with asyncio.TaskGroup() as group:
            tasks = [[group.create_task(one(n, p, s)) for s in range(samples)] for n, p in enumerate(prompts)]
    except ExceptionGroup as failures:
        # A refusal, if any, is the caller's to mend; any failure says more than the cancelled requests beside it.
        refusals, others = failures.split(SettingsError)
        if refusals is None:
            raise
        raise SettingsError(f"{setting.name}: {refusals.exceptions[0]}") from others
    return [[task.result() for task in row] for row in tasks]


async def _answer(server: Server, setting: Setting, prompt: Prompt, seed: int) -> Answer:
    body: dict[str, Any] = {"model": server.model, **_DEFAULTS, "seed": seed, **setting.fields, **prompt.body}
    if setting.guidance is not None:
        body["guidance"] = setting.guidance
    chat = prompt.text is None
    reply = await server.post("/v1/chat/completions" if chat else "/v1/completions", body)
    choice = reply["choices"][0]
    text, finished = choice["message"]["content"] or "" if chat else choice["text"], choice["finish_reason"] == "stop"
    return measure(
        *(setting, prompt, text, finished, choice.get("guidance") or {}),
        tokens=reply["usage"]["completion_tokens"],
        judge=await _judge(server, prompt, text, finished and choice.get("stop_reason") is None),
    )


def measure(
    setting: Setting,
    prompt: Prompt,
    text: str,
    finished: bool,
    report: Mapping[str, Any],
    *,
    tokens: int,
    judge: float | None = None,
) -> Answer:
    """One answer under a setting. report: the response's `guidance`, empty without any; tokens: where it has none."""
    rewards = list(report.get("rewards", {}).values())
    return Answer(
        text=text,
        tokens=report.get("tokens", tokens),
        finished=finished,
        gold=None if prompt.world is None else gold.score(prompt.world, text).total,
        judge=judge,
        kl=report.get("kl", 0.0) if setting.plainly_sampled else None,
        auxiliary_tokens=report.get("reward_model_tokens", 0) + report.get("policy_tokens", 0),
        saved_tokens=report.get("saved_reward_model_tokens", 0) + report.get("saved_policy_tokens", 0),
        token_kl=tuple(token["kl"] for token in report.get("trace") or () if "kl" in token),
        reward=rewards[0] if len(rewards) == 1 else None,
    )


async def _judge(server: Server, prompt: Prompt, text: str, ended: bool) -> float | None:
    """The judge's reward; None without a judge, and for an empty answer that did not even end."""
    if server.judge is None or not (text or ended):
        return None
    wanted = {"model": server.judge, **prompt.body, "responses": [text], "end_token": ended}
    return float((await server.post("/v1/rewards", wanted))["data"][0]["reward"])


def by_prompt(answers: Answers, measure: str) -> list[float] | None:
    """Each prompt's mean of `gold`, `judge`, `kl` or another number; None where an answer lacks it."""
    values = [[getattr(answer, measure) for answer in row] for row in answers]
    if any(value is None for row in values for value in row):
        return None
    return [sum(row) / len(row) for row in values]


@dataclass(frozen=True)
class Summary:
    """One setting over all prompts; standard errors over prompts, after the mean over each prompt's samples."""

    name: str
    gold: Estimate | None
    judge: Estimate | None
    kl: Estimate | None
    tokens: Estimate
    finished: float
    distinct: float
    """Different texts over answers."""
    rouge_l: float | None
    """Mean ROUGE-L F1 between the samples of a prompt: the lower, the more diverse. None for one sample each."""
    auxiliary_tokens: float
    """Tokens that reward models and policies read for each generated token."""
    saved_tokens: float
    """Tokens that gates spared them for each generated token."""

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        return {k: v.dump() if isinstance(v, Estimate) else v for k, v in self.__dict__.items()}


def summarise(name: str, answers: Answers) -> Summary:
    """What answers under one setting come to."""
    flat = [answer for row in answers for answer in row]
    generated = sum(answer.tokens for answer in flat)

    def mean(measure: str) -> Estimate | None:
        values = by_prompt(answers, measure)
        return None if values is None else estimate(values)

    return Summary(
        name=name,
        gold=mean("gold"),
        judge=mean("judge"),
        kl=mean("kl"),
        tokens=estimate([float(answer.tokens) for answer in flat]),
        finished=sum(answer.finished for answer in flat) / len(flat),
        distinct=len({answer.text for answer in flat}) / len(flat),
        rouge_l=_diversity(answers),
        auxiliary_tokens=sum(answer.auxiliary_tokens for answer in flat) / max(1, generated),
        saved_tokens=sum(answer.saved_tokens for answer in flat) / max(1, generated),
    )


def _diversity(answers: Answers) -> float | None:
    if len(answers[0]) < 2:
        return None
    return sum(self_similarity([answer.text for answer in row]) for row in answers) / len(answers)
