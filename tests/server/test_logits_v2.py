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
from tests.support.scheduled import Request
from tests.support.scripted import scripted_runtime
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
                    # In front of each row's last token the states of others stand.
                    logits_indices=1 + 2 * torch.arange(len(own)),
                    logits=part,
                )
                batch.input_ids = batch.input_ids.repeat_interleave(2)
                hidden = torch.stack([self.oracle.hidden(texts[n]) for n in own]).repeat_interleave(2, dim=0)
                hidden[::2] = torch.nan
                logits[own] = adapter.runner.sample(hidden, batch, None)  # type: ignore[attr-defined]
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
    rewards = {name: str(models / name) for name in ("first", "second", "every", "atop")}
    policies = {name: str(models / name) for name in ("expert", "other", "tilted")}
    SlowCopy.arrived = False

    def build(*_: Any) -> GuidanceRuntime:
        loaded = load_runtime(tokenizer, rewards, policies, cache_bytes=2**22)
        side = LateSide()
        return GuidanceRuntime(loaded.reward_models, END, loaded.policies, side, copy_when_joined(side))

    monkeypatch.setattr(logits_v2, "build_runtime", build)

    def make(states: Buffers) -> GuidanceLogitsProcessor:
        config = SimpleNamespace(speculative_config=None, model_config=SimpleNamespace(logits_processors=[""]))
        adapter = GuidanceLogitsProcessor(config, states)  # type: ignore[arg-type]
        runner = SimpleNamespace(
            sampler=Sampler(), rejection_sampler=None, structured_outputs_worker=None, sample=print
        )
        runner.sample = lambda hidden, batch, grammar: adapter.guide(batch.logits, batch)
        adapter.attach(runner)
        adapter.runner = runner  # type: ignore[attr-defined]
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
    assert not any(m.describe().get("cache_blocks_in_use") for a in adapters for m in a.runtime.reward_models.values())


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
    adapter.attach(
        SimpleNamespace(sampler=sampler, rejection_sampler=None, structured_outputs_worker=grammars, sample=print)
    )
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


WIDTH = 16
MIXED = {"method": "mixed", "policy": "p", "mix": 1.0}


def policy_of(tokens: list[int]) -> torch.Tensor:
    """Next-token logits that tell which text was read."""
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31))


class RecordingSampler:
    """vLLM's: keeps what it is called with."""

    def __init__(self) -> None:
        self.called: list[tuple[torch.Tensor, Any]] = []
        self.logits_processors: list[Any] = []
        self.penalties_state: Any = None

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> None:
        self.called.append((logits, input_batch))


class Runner:
    """vLLM's model runner over a scripted policy: slots with texts, of which a step schedules some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, processors: list[Any] | None = None) -> None:
        monkeypatch.setattr(logits_v2, "build_runtime", lambda *_: scripted_runtime(policies={"p": policy_of}))
        self.states = Buffers()
        config = SimpleNamespace(
            speculative_config=None, model_config=SimpleNamespace(logits_processors=processors or ["own"])
        )
        self.adapter = GuidanceLogitsProcessor(config, self.states)  # type: ignore[arg-type]
        self.sampler = RecordingSampler()
        self.banned = torch.zeros(WIDTH, dtype=torch.bool)
        self.grammars = SimpleNamespace(
            apply_grammar_bitmask=lambda logits, *_: logits.masked_fill_(self.banned, -torch.inf)
        )
        self.adapter.attach(
            SimpleNamespace(
                sampler=self.sampler,
                rejection_sampler=None,
                structured_outputs_worker=self.grammars,
                sample=print,
            )
        )

    @property
    def released(self) -> list[Any]:
        policy: Any = self.adapter.runtime.policies["p"]
        return policy.released

    def add(
        self, slot: int, name: str, prompt: list[int], output: Any = (), guidance: Any = MIXED, **params: Any
    ) -> bool:
        """A request whose prompt, and the output of before a preemption, is to be read."""
        tokens, forced = [*prompt, *output], params.pop("forced", None)
        self.states.prompt_len.np[slot], self.states.prefill_len.np[slot] = len(prompt), len(tokens)
        self.states.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.states.total_len.gpu[slot] = len(tokens)
        extra = {} if guidance is None else {CONFIG_KEY: {"guidance": guidance, "key": name * 16}}
        if forced is not None:
            extra[CONFIG_KEY]["forced"] = forced
        return self.adapter.add_request(slot, SamplingParams(extra_args=extra, **params))

    def sample(self, slot: int, token: int) -> None:
        """What the device alone knows until the next step."""
        length = int(self.states.total_len.gpu[slot])
        self.states.all_token_ids.gpu[slot, length], self.states.total_len.gpu[slot] = token, length + 1

    def text(self, slot: int) -> list[int]:
        return self.states.all_token_ids.gpu[slot, : int(self.states.total_len.gpu[slot])].tolist()

    def batch(self, slots: list[int], lengths: list[int] | None = None) -> SimpleNamespace:
        texts = [self.text(slot) for slot in slots]
        lengths = lengths or [len(text) for text in texts]
        fed = [text[length - 1] for text, length in zip(texts, lengths, strict=True)]
        return SimpleNamespace(
            idx_mapping_np=np.array(slots),
            idx_mapping=torch.tensor(slots),
            expanded_idx_mapping=torch.tensor(slots),
            expanded_local_pos=torch.zeros(len(slots)),
            seq_lens_cpu_upper_bound=torch.tensor(lengths),
            # Behind each row's last token stands one that no logits are computed for.
            input_ids=torch.tensor([[token, 0] for token in fed], dtype=torch.int32).flatten(),
            positions=torch.tensor([[length - 1, 0] for length in lengths]).flatten(),
            logits_indices=2 * torch.arange(len(slots)),
        )

    def assert_guided(self, slots: list[int], guided: set[int], lengths: list[int] | None = None) -> None:
        """These slots' rows follow the policy behind their own texts; the others are the base's."""
        self.adapter.apply_staged_writes()
        logits, batch = torch.randn(len(slots), WIDTH), self.batch(slots, lengths)
        found = self.adapter.guide(logits.clone(), batch)
        for row, slot in enumerate(slots):
            if slot in guided:
                text = self.text(slot)[: int(batch.seq_lens_cpu_upper_bound[row])]
                torch.testing.assert_close(found[row].log_softmax(-1), policy_of(text).log_softmax(-1))
            else:
                assert torch.equal(found[row], logits[row])


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> Runner:
    return Runner(monkeypatch)


def test_rows_follow_their_slots_in_any_order_and_whoever_is_left_out(runner: Runner, rng: random.Random) -> None:
    for slot, name in ((4, "a"), (0, "b"), (2, "c")):
        runner.add(slot, name, [5, slot + 3])
    runner.add(3, "d", [9], guidance=None)
    for _ in range(8):
        slots = rng.sample([0, 2, 3, 4], rng.randint(1, 4))
        runner.assert_guided(slots, {0, 2, 4})
        for slot in slots:
            runner.sample(slot, rng.randrange(WIDTH))
    for slot, name in ((4, "a"), (0, "b"), (2, "c")):
        output = runner.text(slot)[2:]
        report = runner.adapter.runtime.finish((name * 16, None), output)
        assert report is not None
        assert (report.tokens, report.guided_tokens) == (len(output), len(output))


def test_a_row_is_not_guided_before_its_prompt_is_read(runner: Runner) -> None:
    runner.add(1, "a", [5, 6, 7, 8])
    runner.add(2, "b", [9, 3])
    runner.assert_guided([1, 2], {2}, [3, 2])
    runner.assert_guided([1, 2], {1, 2}, [4, 2])


def test_a_position_may_be_scored_again(runner: Runner) -> None:
    runner.add(1, "a", [5, 6])
    for token in (7, 8, 9):
        runner.assert_guided([1], {1})
        runner.assert_guided([1], {1})
        runner.sample(1, token)
    report = runner.adapter.runtime.finish(("a" * 16, None), [7, 8, 9])
    assert report is not None
    assert (report.tokens, report.guided_tokens) == (3, 3)


def test_a_slot_that_another_takes_gives_back_what_the_host_knows_of_its_text(runner: Runner) -> None:
    runner.add(1, "a", [5, 6])
    for token in (END, 8):
        runner.assert_guided([1], {1})
        runner.sample(1, token)
    runner.adapter.apply_staged_writes()
    assert not runner.add(1, "b", [4])
    assert runner.released == [(("a" * 16, None), [5, 6, END])], "the last token is the device's alone"
    runner.assert_guided([1], {1})
    runner.add(1, "c", [3], guidance=None)
    runner.assert_guided([1], set())
    assert runner.released[1:] == [(("b" * 16, None), [4])]


def test_a_request_that_comes_back_in_another_slot_is_guided_there_alone(runner: Runner) -> None:
    runner.add(1, "a", [5, 6])
    for token in (7, 8):
        runner.assert_guided([1], {1})
        runner.sample(1, token)
    runner.add(4, "a", [5, 6], output=[7, 8])
    runner.assert_guided([4, 1], {4})
    runner.add(1, "b", [9])
    assert runner.released == [], "its cache is its own still"
    report = runner.adapter.runtime.finish(("a" * 16, None), [7, 8, 9])
    assert report is not None
    assert (report.tokens, report.guided_tokens) == (3, 3)


def test_only_rows_of_the_last_step_are_read_ahead(runner: Runner) -> None:
    runner.add(1, "a", [5, 6])
    runner.add(2, "b", [9], guidance=None)
    policy: Any = runner.adapter.runtime.policies["p"]
    read, asked = policy.read, []
    policy.read = lambda prefixes, last: asked.append([len(p) for p in prefixes]) or read(prefixes, last)
    runner.assert_guided([1], {1})
    runner.sample(1, 7)
    assert asked == [[2]]
    runner.assert_guided([2], set())
    assert asked == [[2], [3]], "ahead, for nothing"
    runner.assert_guided([2], set())
    runner.assert_guided([1], {1})
    assert asked == [[2], [3], [3]]
    runner.add(1, "c", [8], guidance=None)
    runner.assert_guided([1], set())
    assert asked == [[2], [3], [3]], "another request has its slot"


def test_a_slot_whose_request_was_reported_on_is_no_longer_guided(runner: Runner) -> None:
    runner.add(1, "a", [5, 6])
    runner.assert_guided([1], {1})
    runner.adapter.runtime.finish(("a" * 16, None), [7])
    runner.sample(1, 7)
    logits = torch.randn(1, WIDTH).bfloat16()
    assert runner.adapter.guide(logits, runner.batch([1])) is logits


def test_what_is_not_guided_is_handed_on_as_it_is(runner: Runner) -> None:
    runner.add(0, "a", [5, 6], guidance=None)
    logits = torch.randn(2, WIDTH).bfloat16()
    assert runner.adapter.guide(logits, runner.batch([0])) is logits
    runner.add(1, "b", [5, 6])
    own = logits.clone()
    guided = runner.adapter.guide(logits, runner.batch([0, 1]))
    assert guided.dtype == torch.float32
    assert torch.equal(logits, own), "of another precision: not in place"
    assert torch.equal(guided[0], own[0].float())


def test_the_sampler_gets_guided_logits_and_stays_what_it_is(runner: Runner) -> None:
    runner.add(1, "a", [5, 6])
    batch: Any = runner.batch([1])
    runner.sampler(torch.randn(1, WIDTH), batch)
    ((logits, given),) = runner.sampler.called
    assert given is batch
    torch.testing.assert_close(logits[0].log_softmax(-1), policy_of([5, 6]).log_softmax(-1))
    assert isinstance(runner.sampler, RecordingSampler)


def test_a_step_behind_a_grammar_uses_the_logits_from_before_it_once(runner: Runner) -> None:
    runner.add(1, "a", [5, 6])
    runner.add(2, "b", [9], guidance=None)
    runner.banned[3:] = True
    masked = torch.randn(2, WIDTH)
    own = masked.clone()
    runner.grammars.apply_grammar_bitmask(masked)
    guided = runner.adapter.guide(masked, runner.batch([1, 2]))
    assert torch.equal(guided.isneginf(), runner.banned.expand(2, -1))
    assert torch.equal(guided[1, :3], own[1, :3])
    runner.sample(1, 7)
    runner.assert_guided([1, 2], {1})


def test_steps_in_which_nobody_is_guided_keep_no_copy(runner: Runner) -> None:
    runner.add(1, "a", [5, 6], guidance=None)
    runner.grammars.apply_grammar_bitmask(torch.randn(1, WIDTH))
    assert runner.adapter._unmasked is None
    runner.add(2, "b", [5, 6])
    runner.grammars.apply_grammar_bitmask(torch.randn(1, WIDTH))
    assert runner.adapter._unmasked is not None
    runner.adapter.runtime.finish(("b" * 16, None), [])
    runner.grammars.apply_grammar_bitmask(torch.randn(1, WIDTH))
    assert runner.adapter._unmasked is None


class Banning:
    """Another logits processor."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.contexts: list[Any] = []

    def apply(self, logits: torch.Tensor, context: Any) -> torch.Tensor:
        self.contexts.append(context)
        return logits.index_fill_(1, torch.tensor([self.token]), -torch.inf)


@pytest.mark.parametrize(
    ("processors", "params", "seen"),
    [
        (None, {}, False),
        (None, {"logit_bias": {3: -100.0}}, True),
        (["own", "another's"], {}, True),
    ],
    ids=["nothing", "bias", "operator"],
)
def test_the_runtime_is_shown_what_clients_and_operators_make_of_logits(
    monkeypatch: pytest.MonkeyPatch, rng: random.Random, processors: Any, params: dict[str, Any], seen: bool
) -> None:
    runner, shown = Runner(monkeypatch, processors), []
    step = runner.adapter.runtime.step
    monkeypatch.setattr(runner.adapter.runtime, "step", lambda *given: (shown.append(given[3]), step(*given)))
    monkeypatch.setattr(runner.adapter, "apply", lambda *_: pytest.fail("what it forces is no bias"))
    banning, penalties = Banning(3), Banning(4)
    runner.sampler.logits_processors = [runner.adapter, penalties, banning]
    runner.sampler.penalties_state = penalties
    runner.add(1, "a", [5, 6], guidance=None)
    runner.add(2, "b", [7, 8], **params)
    logits = torch.randn(2, WIDTH)
    own = logits.clone()
    guided = runner.adapter.guide(logits, runner.batch([2, 1]))
    assert torch.equal(guided[1], own[1]), "it is shown a copy"
    if not seen:
        assert shown == [None]
        return
    expected = own.clone()
    expected[:, 3] = -torch.inf
    assert torch.equal(shown[0], expected)
    (context,) = banning.contexts
    assert (context.input_ids.tolist(), context.pos.tolist()) == ([8, 6], [1, 1])
    assert context.idx_mapping.tolist() == context.idx_mapping_np.tolist() == [2, 1]
    assert context.seq_lens_upper_bound_np.tolist() == [2, 2]


def test_a_text_that_is_scored_is_forced_token_by_token_and_left_alone_behind_its_end(runner: Runner) -> None:
    text = [7, 3]
    assert runner.add(1, "a", [5, 6], forced=text), "its rows are changed behind the sampler's other processors"
    assert not runner.add(2, "b", [5, 6])
    for token in (*text, None):
        batch: Any = runner.batch([2, 1])
        context: Any = SimpleNamespace(
            idx_mapping_np=batch.idx_mapping_np, seq_lens_upper_bound_np=batch.seq_lens_cpu_upper_bound.numpy()
        )
        logits = torch.randn(2, WIDTH)
        forced = runner.adapter.apply(logits.clone(), context)
        assert torch.equal(forced[0], logits[0])
        if token is None:
            assert torch.equal(forced[1], logits[1])
        else:
            assert forced[1].exp().nonzero().flatten().tolist() == [token]
            runner.sample(1, token)


def test_requests_before_the_adapter_is_attached_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_v2, "build_runtime", lambda *_: scripted_runtime(policies={"p": policy_of}))
    config = SimpleNamespace(speculative_config=None, model_config=SimpleNamespace(logits_processors=None))
    adapter = GuidanceLogitsProcessor(config, Buffers())  # type: ignore[arg-type]
    assert not adapter.add_request(0, SamplingParams())
    with pytest.raises(RuntimeError, match="call steersman_prepare on the workers"):
        adapter.add_request(0, SamplingParams(extra_args={CONFIG_KEY: {"guidance": MIXED, "key": "a" * 16}}))
