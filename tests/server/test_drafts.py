"""Speculative decoding over stand-ins of vLLM's buffers and drafter: drafts of any length, accepted or rejected, by
requests that come, go, are preempted and left out, while the host learns positions and tokens late."""

import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams

from steersman.guidance.generate import load_runtime
from steersman.guidance.runtime import GuidanceRuntime
from steersman.server import logits_v2
from steersman.server.config import CONFIG_KEY
from steersman.server.logits_v2 import GuidanceLogitsProcessor
from tests.support.device import LateSide, SlowCopy, copy_when_joined
from tests.support.distribution import changed, check_draws
from tests.support.oracle import Oracle, load_oracle
from tests.support.random_input import random_prompts
from tests.support.scheduled import Request
from tests.support.tiny import END, VOCABULARY

_Text = tuple[int, ...]
LONGEST = 120
MOST_DRAFTED = 3

BY_HEAD = {"method": "pargs", "reward_model": "atop", "beta": 1.2, "top_k": 6}
METHODS: list[dict[str, Any]] = [
    BY_HEAD,
    {**BY_HEAD, "top_k": None},
    {**BY_HEAD, "policies": {"base": 0.4, "tilted": 0.6}, "trace": True},
    {"method": "mixed", "policy": "tilted", "mix": 0.7, "trace": True},
    {"method": "product", "policies": {"base": 1.4, "tilted": -0.5}},
    {"method": "length_control", "policy": "tilted", "length": 4},
    {**BY_HEAD, "gate": {"first_tokens": 3}},
    {**BY_HEAD, "gate": {"entropy_above": 3.0}},
    {"method": "kl_threshold", "policy": "tilted", "threshold": 0.4},
    {"method": "kl_threshold", "policy": "tilted", "threshold": 0.4, "estimator": "monte_carlo", "samples": 20},
]


DRAWS = 3_000
CASES = {
    "policy head": changed({"method": "mixed", "policy": "tilted", "mix": 0.8}, mix=0.5),
    "gated head": changed(
        {**BY_HEAD, "beta": 0.25, "top_k": 10, "gate": {"first_tokens": 1}}, gate={"first_tokens": 2}
    ),
}


class Sampler:
    """vLLM's, in a step without drafts: keeps the logits that it is called with."""

    logits: torch.Tensor
    rest: tuple[Any, ...]

    def __call__(self, logits: torch.Tensor, input_batch: Any, *rest: Any) -> None:
        self.logits, self.rest = logits, rest


class RejectionSampler(Sampler):
    """vLLM's, in a step with drafts: is called with the drafter's logits too."""


Draft = Callable[[list[int]], torch.Tensor]
"""A text's tokens → the drafter's probabilities [V] of the next one."""


class Engine:
    """Drafts and verifies as vLLM does, and schedules as it never does. Slots are reused, and their buffers keep what
    was there before."""

    draft: Draft

    def __init__(self, rng: random.Random, base: Any, slots: int, greedy: bool) -> None:
        self.rng, self.greedy = rng, greedy
        self.device = torch.device("cpu")
        self.prompt_len = SimpleNamespace(np=np.zeros(slots, dtype=np.int32))
        self.prefill_len = SimpleNamespace(np=np.zeros(slots, dtype=np.int32))
        self.all_token_ids = SimpleNamespace(gpu=torch.randint(VOCABULARY, (slots, LONGEST), dtype=torch.int32))
        self.total_len = SimpleNamespace(gpu=torch.zeros(slots, dtype=torch.int32))
        self.slots: dict[int, Request] = {}
        self.free = list(range(slots))
        self.base = base
        self.known: dict[_Text, tuple[torch.Tensor, torch.Tensor]] = {}
        """The base's logits [V] and hidden state [D] behind texts."""
        self.accepted = self.rejected = 0
        config = SimpleNamespace(speculative_config=object(), model_config=SimpleNamespace(logits_processors=[""]))
        self.adapter = GuidanceLogitsProcessor(config, self)  # type: ignore[arg-type]
        self.samplers = (Sampler(), RejectionSampler())
        self.runner = SimpleNamespace(
            sampler=self.samplers[0],
            rejection_sampler=self.samplers[1],
            structured_outputs_worker=None,
            sample=self.sample,
        )
        self.adapter.attach(self.runner)

    def sample(self, hidden: torch.Tensor, batch: Any, grammar: Any) -> torch.Tensor:
        """What the runner does between the forward and the sampler's verdict: returns the logits it is given."""
        drafted = len(batch.logits) > len(batch.idx_mapping_np)
        sampler = self.samplers[drafted]
        sampler(batch.logits, batch, *(("the drafter's logits", None) if drafted else ()))
        assert sampler.rest == (("the drafter's logits", None) if drafted else ())
        return sampler.logits

    def add(self, request: Request) -> None:
        """Into a slot, its output so far among what is to be read."""
        slot = self.free.pop(self.rng.randrange(len(self.free)))
        tokens = [*request.prompt, *request.output]
        self.prompt_len.np[slot], self.prefill_len.np[slot] = len(request.prompt), len(tokens)
        self.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.total_len.gpu[slot] = len(tokens)
        self.slots[slot], request.read = request, 0
        extra = {} if request.guidance is None else {CONFIG_KEY: {"guidance": request.guidance, "key": request.key}}
        self.adapter.add_request(slot, SamplingParams(extra_args=extra))

    def release(self, slot: int) -> Request:
        """Nobody tells the adapter."""
        self.free.append(slot)
        return self.slots.pop(slot)

    def step(self, scheduled: list[int] | None = None) -> list[Request]:
        """One step over some of the slots in any order; returns the requests that are done."""
        self.adapter.apply_staged_writes()
        scheduled = scheduled or self.rng.sample(sorted(self.slots), self.rng.randint(1, len(self.slots)))
        texts, drafts, lengths = [], [], []
        for slot in scheduled:
            text, prefill = self._text(slot), int(self.prefill_len.np[slot])
            request = self.slots[slot]
            request.read = min(prefill, request.read + self.rng.randint(1, 60))
            decodes = request.read == prefill and len(text) > prefill
            drafts.append(self._draft(text) if decodes else [])
            texts.append(text if decodes else text[: request.read])
            # What was rejected in the step before is not taken off on the host yet.
            lengths.append(len(texts[-1]) + len(drafts[-1]) + (self.rng.randint(0, 3) if decodes else 0))
        planned = zip(texts, drafts, strict=True)
        rows = [(*text, *tokens[:n]) for text, tokens in planned for n in range(1 + len(tokens))]
        logits, hidden = self.forward(rows)
        guided = self.runner.sample(_spread(hidden), self._batch(scheduled, drafts, lengths, rows, logits), None)
        done, first = [], 0
        for slot, text, tokens in zip(scheduled, texts, drafts, strict=True):
            if len(text) >= self.prefill_len.np[slot]:
                self._verify(slot, text, tokens, guided[first : first + 1 + len(tokens)])
                if self.slots[slot].is_done:
                    done.append(self.release(slot))
            first += 1 + len(tokens)
        return done

    def forward(self, texts: list[_Text]) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's logits [texts, V] and hidden states [texts, D], those of one length by one full forward."""
        lengths: dict[int, list[_Text]] = {}
        for text in dict.fromkeys(texts):
            if text not in self.known:
                lengths.setdefault(len(text), []).append(text)
        for group in lengths.values():
            with torch.inference_mode():
                found = self.base(input_ids=torch.tensor(group), output_hidden_states=True)
            self.known |= zip(group, zip(found.logits[:, -1], found.hidden_states[-1][:, -1], strict=True), strict=True)
        logits, hidden = zip(*map(self.known.__getitem__, texts), strict=True)
        return torch.stack(logits), torch.stack(hidden)

    def _text(self, slot: int) -> list[int]:
        return self.all_token_ids.gpu[slot, : int(self.total_len.gpu[slot])].tolist()

    def _draft(self, text: list[int]) -> list[int]:
        drafted: list[int] = []
        for _ in range(self.rng.randint(0, MOST_DRAFTED)):
            drafted.append(int(self.draft([*text, *drafted]).multinomial(1)))
        return drafted

    def _batch(
        self,
        slots: list[int],
        drafts: list[list[int]],
        lengths: list[int],
        rows: list[_Text],
        logits: torch.Tensor,
    ) -> SimpleNamespace:
        ends = np.cumsum([0, *(1 + len(tokens) for tokens in drafts)])
        return SimpleNamespace(
            idx_mapping_np=np.array(slots),
            cu_num_logits_np=ends,
            seq_lens_cpu_upper_bound=torch.tensor(lengths),
            # In front of each row's token stands one that no logits are computed for.
            input_ids=_spread(torch.tensor([row[-1] for row in rows], dtype=torch.int32)),
            positions=_spread(torch.tensor([len(row) - 1 for row in rows])),
            logits_indices=1 + 2 * torch.arange(len(rows)),
            logits=logits,
        )

    def _verify(self, slot: int, text: list[int], drafted: list[int], guided: torch.Tensor) -> None:
        chosen = []
        for n, logits in enumerate(guided):
            target = logits.softmax(-1)
            if self.greedy:
                target = torch.zeros_like(target).index_fill_(0, target.argmax(), 1.0)
            if n == len(drafted):
                chosen.append(int(target.multinomial(1)))
                break
            proposed = self.draft([*text, *drafted[:n]])
            token = drafted[n]
            if self.rng.random() < float(target[token] / proposed[token]):
                chosen.append(token)
                self.accepted += 1
                continue
            self.rejected += 1
            chosen.append(int((target - proposed).clamp(min=0.0).multinomial(1)))
            break
        request = self.slots[slot]
        before = len(request.output)
        request.take(chosen)
        added = torch.tensor(request.output[before:], dtype=torch.int32)
        self.all_token_ids.gpu[slot, len(text) : len(text) + len(added)] = added
        self.total_len.gpu[slot] = len(text) + len(added)


def _spread(values: torch.Tensor) -> torch.Tensor:
    """Each row behind one of another's: of NaN, or of token and position 0."""
    spread = values.repeat_interleave(2, dim=0)
    spread[::2] = torch.nan if values.is_floating_point() else 0
    return spread


@pytest.fixture(scope="module")
def oracle(models: Path) -> Oracle:
    return load_oracle(models)


@pytest.fixture(scope="module")
def base(models: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def runtime_of_heads(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are built over runtimes of heads alone, whose results arrive late."""
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    loaded = load_runtime(tokenizer, {"atop": str(models / "atop")}, {"tilted": str(models / "tilted")})
    side = LateSide()
    SlowCopy.arrived = False
    runtime = GuidanceRuntime(loaded.reward_models, END, loaded.policies, side, copy_when_joined(side))
    monkeypatch.setattr(logits_v2, "build_runtime", lambda *_: runtime)


def _often_best(engine: Engine) -> Draft:
    """One-hot drafts that greedy decoding accepts now and then: the best token under one of three methods, or any."""
    chosen: dict[_Text, torch.Tensor] = {}

    def draft(tokens: list[int]) -> torch.Tensor:
        if tuple(tokens) not in chosen:
            logits, hidden = engine.forward([tuple(tokens)])
            heads = {name: model.head for name, model in engine.adapter.runtime.models.heads.items()}
            outputs = {name: head.every(head.features(hidden)) for name, head in heads.items()}
            likely = [logits + change for change in (0.7 * outputs["tilted"], 1.2 * outputs["atop"], 0.0)]
            token = engine.rng.choice([*(int(row.argmax()) for row in likely), engine.rng.randrange(2, VOCABULARY)])
            chosen[tuple(tokens)] = torch.zeros(VOCABULARY).index_fill_(0, torch.tensor(token), 1.0)
        return chosen[tuple(tokens)]

    return draft


def test_greedy_answers_and_reports_are_the_references_whatever_was_drafted(
    oracle: Oracle, base: Any, rng: random.Random
) -> None:
    engine = Engine(rng, base, 5, greedy=True)
    engine.draft = _often_best(engine)
    guidances = [*METHODS, None]
    prompts = random_prompts(rng, len(guidances), longest=50)
    waiting = [
        Request(f"{n:032x}", prompt, guidance, rng.randint(6, 14))
        for n, (prompt, guidance) in enumerate(zip(prompts, guidances, strict=True))
    ]
    rng.shuffle(waiting)
    requests, preempted = list(waiting), 0
    while waiting or engine.slots:
        while waiting and engine.free:
            engine.add(waiting.pop())
        SlowCopy.arrived = rng.random() < 0.3
        engine.step()
        if engine.slots and rng.random() < (0.5 if preempted < 3 else 0.1):
            waiting.append(engine.release(rng.choice(sorted(engine.slots))))
            preempted += 1
    assert min(engine.accepted, engine.rejected) > 5
    compared = 0
    for request in requests:
        if request.guidance is None:
            continue
        report = engine.adapter.runtime.finish((request.key, None), request.output)
        assert report is not None
        assert report.error is None
        oracle.assert_greedy(request.prompt, request.guidance, request.output, request.wanted)
        compared += oracle.assert_report(request.prompt, request.guidance, request.output, asdict(report))
        assert report.saved_policy_tokens == report.saved_reward_model_tokens == 0, "heads read nothing"
        if report.trace is not None:
            assert [entry["token_id"] for entry in report.trace] == request.output
            for entry in report.trace:
                (shown,) = [c for c in entry["candidates"] if c["token_id"] == entry["token_id"]]
                assert shown["score"] - shown["logprob"] == pytest.approx(entry["kl"], abs=1e-4)
    assert compared > 5


@pytest.mark.parametrize("name", CASES)
def test_drawn_answers_follow_the_exact_distribution(oracle: Oracle, base: Any, rng: random.Random, name: str) -> None:
    """The drafter proposes likely tokens of the base and of a head, in proportions of its own."""
    prompt = [rng.randrange(2, 300) for _ in range(2)]
    guidance, right, wrong = CASES[name](oracle, prompt, 2)
    engine, drafted = Engine(rng, base, 500, greedy=False), dict[_Text, torch.Tensor]()

    def draft(tokens: list[int]) -> torch.Tensor:
        if tuple(tokens) not in drafted:
            logits, hidden = engine.forward([tuple(tokens)])
            head = engine.adapter.runtime.models.heads["tilted"].head
            tilted = logits + 0.8 * head.every(head.features(hidden))
            likely = torch.cat([row[0].topk(2).indices for row in (logits, tilted)])
            drafted[tuple(tokens)] = torch.zeros(VOCABULARY).index_add_(0, likely, torch.full((4,), 0.25))
        return drafted[tuple(tokens)]

    engine.draft = draft
    draws: list[list[int]] = []
    SlowCopy.arrived = True
    while len(draws) < DRAWS:
        for slot in range(500):
            engine.add(Request(f"{len(draws) + slot:032x}", prompt, guidance, 2))
        while engine.slots:
            for request in engine.step(sorted(engine.slots)):
                draws.append(request.output)
                engine.adapter.runtime.finish((request.key, None), request.output)
    assert min(engine.accepted, engine.rejected) > DRAWS / 50
    check_draws(draws, right, wrong)
