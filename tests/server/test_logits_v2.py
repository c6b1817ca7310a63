"""The V2 adapter against stand-ins of vLLM's buffers: slots that come, go and move, steps that leave rows out, tokens
that only the device knows, models read ahead on a stream that runs as late as it may, and sampling that is sharded."""

import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from vllm import SamplingParams

from steersman.guidance.generate import load_runtime
from steersman.guidance.report import merge_reports
from steersman.guidance.runtime import GuidanceRuntime
from steersman.server import logits_v2
from steersman.server.config import CONFIG_KEY
from steersman.server.logits_v2 import GuidanceLogitsProcessor
from tests.support.device import LateSide, SlowCopy, copy_when_joined
from tests.support.oracle import Oracle, load_oracle
from tests.support.random_input import any_guidance, random_prompts
from tests.support.tiny import END, VOCABULARY

SLOTS = 6
LONGEST = 160


class Buffers:
    """vLLM's per-slot state."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.prompt_len = SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32))
        self.prefill_len = SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32))
        self.all_token_ids = SimpleNamespace(gpu=torch.zeros(SLOTS, LONGEST, dtype=torch.int32))
        self.total_len = SimpleNamespace(gpu=torch.zeros(SLOTS, dtype=torch.int32))


class Sampler:
    """vLLM's, which nothing here calls."""


class Request:
    """One answer while it is decoded greedily."""

    def __init__(self, key: str, prompt: list[int], guidance: dict[str, Any] | None, wanted: int) -> None:
        self.key, self.prompt, self.guidance, self.wanted = key, prompt, guidance, wanted
        self.output: list[int] = []
        self.read = 0
        """Tokens of the prefill that the base has read."""

    @property
    def is_done(self) -> bool:
        return len(self.output) == self.wanted or END in self.output


class Engine:
    """Schedules at random, as vLLM never does, over one adapter for each rank."""

    def __init__(self, rng: random.Random, oracle: Oracle, adapters: list[GuidanceLogitsProcessor], states: Buffers):
        self.rng, self.oracle, self.adapters, self.states = rng, oracle, adapters, states
        self.slots: dict[int, Request] = {}
        self.free = list(range(SLOTS))

    def add(self, request: Request) -> None:
        """Into a slot, its output so far among what is to be read."""
        slot = self.free.pop(self.rng.randrange(len(self.free)))
        tokens = [*request.prompt, *request.output]
        self.states.prompt_len.np[slot], self.states.prefill_len.np[slot] = len(request.prompt), len(tokens)
        self.states.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.states.total_len.gpu[slot] = len(tokens)
        self.slots[slot], request.read = request, 0
        extra = {} if request.guidance is None else {CONFIG_KEY: {"guidance": request.guidance, "key": request.key}}
        for adapter in self.adapters:
            adapter.add_request(slot, SamplingParams(extra_args=extra))

    def preempt(self, slot: int) -> Request:
        """Nobody tells the adapter."""
        self.free.append(slot)
        return self.slots.pop(slot)

    def step(self) -> list[Request]:
        """One step over some of the slots in any order; returns the requests that are done."""
        for adapter in self.adapters:
            adapter.apply_staged_writes()
        scheduled = self.rng.sample(sorted(self.slots), self.rng.randint(1, len(self.slots)))
        lengths = []
        for slot in scheduled:
            request, prefill = self.slots[slot], int(self.states.prefill_len.np[slot])
            request.read = min(prefill, request.read + self.rng.randint(1, 40))
            total = int(self.states.total_len.gpu[slot])
            lengths.append(request.read if request.read < prefill else total)
        texts = [[*self.slots[s].prompt, *self.slots[s].output][:n] for s, n in zip(scheduled, lengths, strict=True)]
        logits = torch.stack([self.oracle.logits(text) for text in texts])
        for rank, adapter in enumerate(self.adapters):
            own = [n for n, slot in enumerate(scheduled) if slot % len(self.adapters) == rank]
            if own:
                part = logits[own]
                batch = SimpleNamespace(
                    idx_mapping_np=np.array([scheduled[n] for n in own]),
                    seq_lens_cpu_upper_bound=torch.tensor([lengths[n] for n in own]),
                    input_ids=torch.tensor([texts[n][-1] for n in own], dtype=torch.int32),
                    logits_indices=torch.arange(len(own)),
                )
                logits[own] = adapter.guide(part, batch)
        return self._sample(scheduled, lengths, logits)

    def _sample(self, scheduled: list[int], lengths: list[int], logits: torch.Tensor) -> list[Request]:
        done = []
        for slot, length, row in zip(scheduled, lengths, logits, strict=True):
            request = self.slots[slot]
            if length < self.states.prefill_len.np[slot]:
                continue
            request.output.append(int(row.argmax()))
            self.states.all_token_ids.gpu[slot, length] = request.output[-1]
            self.states.total_len.gpu[slot] = length + 1
            if request.is_done:
                done.append(self.preempt(slot))
        return done


@pytest.fixture
def make_adapter(models: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Buffers], GuidanceLogitsProcessor]:
    """Adapters over runtimes of their own, whose results arrive late."""
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    rewards = {name: str(models / name) for name in ("first", "second", "every")}
    policies = {name: str(models / name) for name in ("expert", "other")}
    SlowCopy.arrived = False

    def build(*_: Any) -> GuidanceRuntime:
        loaded = load_runtime(tokenizer, rewards, policies, cache_bytes=2**22)
        side = LateSide()
        return GuidanceRuntime(loaded.reward_models, END, loaded.policies, side, copy_when_joined(side))

    monkeypatch.setattr(logits_v2, "build_runtime", build)

    def make(states: Buffers) -> GuidanceLogitsProcessor:
        config = SimpleNamespace(speculative_config=None, model_config=SimpleNamespace(logits_processors=[""]))
        adapter = GuidanceLogitsProcessor(config, states)  # type: ignore[arg-type]
        adapter.attach(SimpleNamespace(sampler=Sampler(), structured_outputs_worker=None))
        return adapter

    return make


@pytest.mark.parametrize("ranks", [1, 2])
def test_answers_and_reports_are_the_references_whatever_the_slots_do(
    make_adapter: Callable[[Buffers], GuidanceLogitsProcessor], models: Path, rng: random.Random, ranks: int
) -> None:
    oracle, states = load_oracle(models), Buffers()
    adapters = [make_adapter(states) for _ in range(ranks)]
    engine = Engine(rng, oracle, adapters, states)
    waiting = [
        Request(f"{n:032x}", prompt, _wanted(rng, ranks) if n % 6 else None, rng.randint(3, 14))
        for n, prompt in enumerate(random_prompts(rng, 24, longest=70))
    ]
    requests, preemptions = list(waiting), 0
    while waiting or engine.slots:
        while waiting and engine.free:
            engine.add(waiting.pop())
        SlowCopy.arrived = rng.random() < 0.3
        engine.step()
        if rng.random() < 0.2 and engine.slots:
            waiting.append(engine.preempt(rng.choice(sorted(engine.slots))))
            preemptions += 1
    assert preemptions > 3
    compared = 0
    for request in requests:
        if request.guidance is None:
            continue
        reports = [a.runtime.finish((request.key, None), request.output) for a in adapters]
        report = merge_reports([asdict(report) for report in reports if report is not None])
        assert report["error"] is None
        oracle.assert_greedy(request.prompt, request.guidance, request.output, request.wanted)
        compared += oracle.assert_report(request.prompt, request.guidance, request.output, report)
    assert compared > 10
    assert not any(m.describe()["cache_blocks_in_use"] for a in adapters for m in a.runtime.reward_models.values())


def test_values_are_used_only_when_what_was_read_ahead_is_joined(
    make_adapter: Callable[[Buffers], GuidanceLogitsProcessor], models: Path, rng: random.Random
) -> None:
    """A step reads the tokens that it was fed: what had arrived by then may fail a row, whose cache blocks are scrubbed
    while a model on the second stream still reads them."""
    oracle, states = load_oracle(models), Buffers()
    adapter = make_adapter(states)
    engine = Engine(rng, oracle, [adapter], states)
    requests = [
        Request(f"{n:032x}", prompt, {"method": "mixed", "policy": "expert", "mix": 0.5}, 6)
        for n, prompt in enumerate(random_prompts(rng, 3, longest=30))
    ]
    for request in requests:
        engine.add(request)
    settled = 0
    while engine.slots:
        SlowCopy.arrived = not SlowCopy.arrived
        engine.step()
        settled += 1
    assert settled > 6
    side: Any = adapter.runtime._side
    assert side.forks > 3
    for request in requests:
        assert adapter.runtime.finish((request.key, None), request.output).error is None  # type: ignore[union-attr]


def test_a_grammar_masks_guided_logits_and_hides_nothing_from_the_models(
    make_adapter: Callable[[Buffers], GuidanceLogitsProcessor], models: Path, rng: random.Random
) -> None:
    oracle, states = load_oracle(models), Buffers()
    adapter = make_adapter(states)
    banned = torch.rand(VOCABULARY) < 0.9
    banned[7] = False
    grammars = SimpleNamespace(apply_grammar_bitmask=lambda logits: logits.masked_fill_(banned, -torch.inf))
    sampler: Any = Sampler()
    sampler.logits_processors, sampler.penalties_state = [adapter], None
    adapter.attach(SimpleNamespace(sampler=sampler, structured_outputs_worker=grammars))
    engine = Engine(rng, oracle, [adapter], states)
    prompts = random_prompts(rng, 2, longest=30)
    guidances: list[Any] = [{"method": "mixed", "policy": "expert", "mix": 1.0}, None]
    for prompt, guidance in zip(prompts, guidances, strict=True):
        engine.add(Request(f"{len(engine.slots):032x}", prompt, guidance, 1))
    slots = {request.guidance is not None: slot for slot, request in engine.slots.items()}
    logits = torch.stack([oracle.logits(prompt) for prompt in prompts])
    own = logits.clone()
    grammars.apply_grammar_bitmask(logits)
    batch = SimpleNamespace(
        idx_mapping_np=np.array([slots[True], slots[False]]),
        seq_lens_cpu_upper_bound=torch.tensor([len(prompt) for prompt in prompts]),
        input_ids=torch.tensor([prompt[-1] for prompt in prompts], dtype=torch.int32),
        logits_indices=torch.arange(2),
    )
    guided = adapter.guide(logits, batch)
    expected = torch.stack((oracle.models.policies["expert"](prompts[0]), own[1])).masked_fill(banned, -torch.inf)
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-4)
    report = adapter.runtime.finish((f"{0:032x}", None), [7])
    assert report is not None
    steps = oracle.replay(prompts[0], [7], guidances[0])
    assert report.kl == pytest.approx(float(steps[0].logprobs[7] - steps[0].base_logprobs[7]), abs=1e-4)


def _wanted(rng: random.Random, ranks: int) -> dict[str, Any]:
    """A sharded server refuses budgets."""
    guidance = any_guidance(rng)
    return {name: value for name, value in guidance.items() if ranks == 1 or name != "kl_budget"}


def test_speculative_decoding_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="start without --speculative-config"):
        GuidanceLogitsProcessor(SimpleNamespace(speculative_config=object()), Buffers())  # type: ignore[arg-type]
