"""The V1 adapter against stand-ins of vLLM's batch: rows that come, go, move and swap, prompts read in pieces,
grammars, other processors and texts that are only scored."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from steersman.guidance.runtime import GuidanceRuntime
from steersman.server import logits_v1
from steersman.server.config import CONFIG_KEY
from steersman.server.logits_v1 import GuidanceLogitsProcessor
from tests.support.scripted import scripted_runtime

WIDTH = 16
MIXED = {"method": "mixed", "policy": "p", "mix": 1.0}
ONE_WAY, SWAP = MoveDirectionality.UNIDIRECTIONAL, MoveDirectionality.SWAP


def policy_of(tokens: list[int]) -> torch.Tensor:
    """Next-token logits that tell which text was read."""
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31))


class Batch:
    """vLLM's runner and its batch: `partial` are the rows whose prompt is not read to its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, processors: list[Any] | None = None) -> None:
        self.partial = torch.zeros(8, dtype=torch.bool)
        monkeypatch.setattr(logits_v1, "build_runtime", lambda *_: scripted_runtime(policies={"p": policy_of}))
        monkeypatch.setattr(logits_v1, "partial_rows", lambda _: lambda: self.partial)
        self.kept_alive: list[Any] = []
        monkeypatch.setattr(logits_v1, "keep_seeded_requests_alive", self.kept_alive.append)
        config: Any = SimpleNamespace(model_config=SimpleNamespace(logits_processors=processors or ["own"]))
        self.adapter = GuidanceLogitsProcessor(config, torch.device("cpu"), False)
        self.sampled: list[torch.Tensor] = []
        self.runner = SimpleNamespace(
            sampler=SimpleNamespace(forward=lambda logits, _: self.sampled.append(logits)),
            sample_tokens=lambda _: None,
            execute_model_state=None,
        )
        self.adapter.attach(self.runner)
        self.texts: dict[str, tuple[list[int], list[int]]] = {}

    @property
    def runtime(self) -> GuidanceRuntime:
        return self.adapter.runtime

    def added(
        self, index: int, name: str, prompt: list[int], guidance: Any = MIXED, *, forced: Any = None, **params: Any
    ) -> Any:
        """A row as vLLM tells of it."""
        self.texts[name] = (prompt, [])
        extra = {} if guidance is None else {CONFIG_KEY: {"guidance": guidance, "key": name * 16}}
        if forced is not None:
            extra[CONFIG_KEY]["forced"] = forced
        return index, SamplingParams(extra_args=extra, **params), prompt, self.texts[name][1]

    def update(self, size: int, removed: Any = (), added: Any = (), moved: Any = ()) -> None:
        self.adapter.update_state(BatchUpdate(size, list(removed), list(added), list(moved)))

    def assert_guided(self, places: dict[int, str], size: int) -> None:
        """These rows follow the policy behind their own texts; the others are the base's."""
        logits = torch.randn(size, WIDTH)
        guided = self.adapter.guide(logits.clone(), metadata())
        for index in range(size):
            if index in places:
                prompt, output = self.texts[places[index]]
                expected = policy_of([*prompt, *output])
                torch.testing.assert_close(guided[index].log_softmax(-1), expected.log_softmax(-1))
            else:
                assert torch.equal(guided[index], logits[index])


def forwarded(logits: torch.Tensor | None, hidden: torch.Tensor | None = None, sampled: Any = None) -> SimpleNamespace:
    """What the runner keeps of a forward: hidden states of all its tokens, and of the rows that are sampled."""
    return SimpleNamespace(logits=logits, hidden_states=hidden, sample_hidden_states=sampled)


def metadata(**given: Any) -> SimpleNamespace:
    nothing: dict[str, Any] = {"allowed_token_ids_mask": None, "bad_words_token_ids": {}, "output_token_ids": []}
    return SimpleNamespace(**nothing | {"logitsprocs": SimpleNamespace(non_argmax_invariant=[])} | given)


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> Batch:
    return Batch(monkeypatch)


def test_a_swap_exchanges_two_rows_whichever_of_them_is_guided(batch: Batch) -> None:
    added = [batch.added(0, "a", [5, 6]), batch.added(1, "b", [7, 8]), batch.added(2, "c", [9], None)]
    batch.update(3, added=added)
    batch.assert_guided({0: "a", 1: "b"}, 3)
    batch.update(3, moved=[(0, 1, SWAP)])
    batch.assert_guided({1: "a", 0: "b"}, 3)
    batch.update(3, moved=[(0, 2, SWAP)])
    batch.assert_guided({1: "a", 2: "b"}, 3)
    batch.update(3, moved=[(0, 1, SWAP)])
    batch.assert_guided({0: "a", 2: "b"}, 3)
    batch.update(3, moved=[(1, 2, SWAP)])
    batch.assert_guided({0: "a", 1: "b"}, 3)
    batch.update(3, removed=[2])
    batch.assert_guided({0: "a", 1: "b"}, 3)
    policy: Any = batch.runtime.policies["p"]
    assert policy.released == [], "nobody has left"


def test_a_row_that_moves_takes_the_place_of_one_that_has_left(batch: Batch) -> None:
    batch.update(3, added=[batch.added(n, name, [5, n + 3]) for n, name in enumerate("abc")])
    batch.update(2, removed=[0], moved=[(2, 0, ONE_WAY)])
    batch.assert_guided({0: "c", 1: "b"}, 3)
    policy: Any = batch.runtime.policies["p"]
    assert policy.released == [(("a" * 16, None), [5, 3])], "its cache is for others that begin alike"


def test_a_row_in_anothers_place_drops_it_though_nobody_lists_it_as_removed(batch: Batch) -> None:
    batch.update(2, added=[batch.added(0, "a", [5, 6]), batch.added(1, "b", [7, 8])])
    batch.texts["a"][1].append(9)
    batch.update(2, added=[batch.added(0, "c", [3])])
    batch.assert_guided({0: "c", 1: "b"}, 2)
    batch.update(1, moved=[(1, 0, ONE_WAY)])
    batch.assert_guided({0: "b"}, 2)
    policy: Any = batch.runtime.policies["p"]
    assert policy.released == [(("a" * 16, None), [5, 6, 9]), (("c" * 16, None), [3])]


def test_a_plain_row_that_moves_onto_a_guided_one_ends_it(batch: Batch) -> None:
    batch.update(2, added=[batch.added(0, "a", [5, 6]), batch.added(1, "b", [7], None)])
    batch.update(1, moved=[(1, 0, ONE_WAY)])
    batch.assert_guided({}, 2)


def test_outputs_are_followed_without_being_told(batch: Batch) -> None:
    batch.update(1, added=[batch.added(0, "a", [5, 6])])
    for token in (7, 8, 9):
        batch.assert_guided({0: "a"}, 1)
        batch.texts["a"][1].append(token)
        batch.adapter.update_state(None)
    report = batch.runtime.finish(("a" * 16, None), [7, 8, 9])
    assert report is not None
    assert report.guided_tokens == 3


def test_a_row_is_not_guided_before_its_prompt_is_read(batch: Batch) -> None:
    batch.update(3, added=[batch.added(n, name, [5, n + 3]) for n, name in enumerate("abc")])
    batch.partial[1] = True
    batch.assert_guided({0: "a", 2: "c"}, 3)
    batch.partial[:] = True
    batch.assert_guided({}, 3)
    batch.partial[:] = False
    batch.assert_guided({0: "a", 1: "b", 2: "c"}, 3)


def test_what_is_not_guided_is_handed_on_as_it_is(batch: Batch) -> None:
    logits = torch.randn(2, WIDTH).bfloat16()
    assert batch.adapter.guide(logits, metadata()) is logits
    batch.update(2, added=[batch.added(0, "a", [5, 6])])
    own = logits.clone()
    guided = batch.adapter.guide(logits, metadata())
    assert guided.dtype == torch.float32
    assert torch.equal(logits, own), "of another precision: not in place"
    assert torch.equal(guided[1], own[1].float())


def test_the_sampler_gets_guided_logits(batch: Batch) -> None:
    batch.update(1, added=[batch.added(0, "a", [5, 6])])
    batch.runner.sampler.forward(torch.randn(1, WIDTH), metadata())
    torch.testing.assert_close(batch.sampled[0][0].log_softmax(-1), policy_of([5, 6]).log_softmax(-1))
    assert not batch.adapter.is_argmax_invariant()
    assert batch.kept_alive == [batch.runner], "a seeded request outlives a prompt that is read in pieces"


def test_a_grammar_masks_guided_logits_and_hides_nothing_from_the_models(batch: Batch) -> None:
    batch.update(2, added=[batch.added(0, "a", [5, 6])])
    logits = torch.randn(2, WIDTH)
    own, banned = logits.clone(), torch.rand(2, WIDTH) < 0.7
    banned[:, 4] = False
    batch.runner.execute_model_state = forwarded(logits)
    batch.runner.sample_tokens("a grammar's output")
    guided = batch.adapter.guide(logits.masked_fill(banned, -torch.inf), metadata())
    assert torch.equal(guided.isneginf(), banned)
    assert torch.equal(guided[1][~banned[1]], own[1][~banned[1]])
    expected = policy_of([5, 6])[~banned[0]]
    torch.testing.assert_close(guided[0][~banned[0]].log_softmax(-1), expected.log_softmax(-1))
    report = batch.runtime.finish(("a" * 16, None), [4])
    assert report is not None
    kl = policy_of([5, 6]).log_softmax(-1)[4] - own[0].log_softmax(-1)[4]
    assert report.kl == pytest.approx(float(kl), abs=1e-4)


@pytest.mark.parametrize("output", [None, "a grammar's output"])
def test_what_a_grammar_left_of_one_step_is_not_used_in_the_next(batch: Batch, output: str | None) -> None:
    batch.update(2, added=[batch.added(0, "a", [5, 6])])
    stale = torch.randn(2, WIDTH)
    batch.runner.execute_model_state = forwarded(stale)
    batch.runner.sample_tokens("a grammar's output")
    if output is None:
        batch.runner.sample_tokens(None)
    else:
        batch.adapter.guide(stale.clone(), metadata())
    batch.texts["a"][1].append(7)
    logits = torch.full((2, WIDTH), -torch.inf)
    logits[:, 3:5] = torch.randn(2, 2)
    own = logits.clone()
    guided = batch.adapter.guide(logits, metadata())
    assert bool(guided[0, 5:].isneginf().all())
    assert torch.equal(guided[1], own[1])


def test_steps_without_logits_a_grammar_or_guided_rows_keep_no_copy(batch: Batch) -> None:
    batch.runner.execute_model_state = forwarded(torch.randn(1, WIDTH))
    batch.runner.sample_tokens("a grammar's output")
    assert batch.adapter._unmasked is None
    batch.update(1, added=[batch.added(0, "a", [5, 6])])
    batch.runner.sample_tokens(None)
    assert batch.adapter._unmasked is None
    for state in (None, SimpleNamespace(logits=None)):
        batch.runner.execute_model_state = state
        batch.runner.sample_tokens("a grammar's output")
        assert batch.adapter._unmasked is None


class Banning:
    """Another logits processor."""

    def __init__(self, token: int) -> None:
        self.token = token

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill_(1, torch.tensor([self.token]), -torch.inf)


@pytest.mark.parametrize(
    ("processors", "params", "seen"),
    [
        (None, {}, False),
        (None, {"logit_bias": {3: -100.0}}, True),
        (None, {"allowed_token_ids": [4, 5]}, True),
        (None, {"min_tokens": 2}, True),
        (["own", "another's"], {}, True),
    ],
    ids=["nothing", "bias", "allowed", "minimum", "operator"],
)
def test_the_runtime_is_shown_what_clients_and_operators_make_of_logits(
    monkeypatch: pytest.MonkeyPatch, rng: random.Random, processors: Any, params: dict[str, Any], seen: bool
) -> None:
    batch, shown = Batch(monkeypatch, processors), []
    step = batch.runtime.step
    monkeypatch.setattr(
        batch.runtime, "step", lambda *a, biased, hidden: (shown.append(biased), step(*a, biased=biased))
    )
    batch.update(2, added=[batch.added(0, "a", [5, 6], None), batch.added(1, "b", [5, 6], **params)])
    banned = torch.zeros(2, WIDTH, dtype=torch.bool)
    banned[:, 2] = True
    logits = torch.randn(2, WIDTH)
    procs = SimpleNamespace(non_argmax_invariant=[batch.adapter, Banning(3)])
    given = metadata(
        allowed_token_ids_mask=banned, logitsprocs=procs, bad_words_token_ids={1: [[9]]}, output_token_ids=[[], []]
    )
    own = logits.clone()
    batch.adapter.guide(logits, given)
    if not seen:
        assert shown == [None]
        return
    expected = own.clone()
    expected[:, 2:4] = -torch.inf
    expected[1, 9] = -torch.inf
    assert torch.equal(shown[0], expected)
    batch.update(2, removed=[1])
    assert batch.adapter._changed == set()
    batch.update(2, added=[batch.added(1, "c", [5, 6])])
    batch.adapter.guide(own, given)
    assert (shown[1] is None) == (processors is None), "it left with its request"


def test_a_text_that_is_scored_is_forced_token_by_token_and_left_alone_behind_its_end(batch: Batch) -> None:
    text = [7, 3]
    batch.update(2, added=[batch.added(0, "a", [5, 6], forced=text), batch.added(1, "b", [5, 6])])
    for token in text:
        logits = torch.randn(2, WIDTH)
        forced = batch.adapter.apply(logits.clone())
        assert forced[0].exp().nonzero().flatten().tolist() == [token]
        assert torch.equal(forced[1], logits[1])
        batch.texts["a"][1].append(token)
    logits = torch.randn(2, WIDTH)
    assert torch.equal(batch.adapter.apply(logits.clone()), logits)
    batch.update(2, removed=[0])
    assert batch.adapter._forced == {}


def test_rows_before_the_adapter_is_attached_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_v1, "build_runtime", lambda *_: scripted_runtime(policies={"p": policy_of}))
    config: Any = SimpleNamespace(model_config=SimpleNamespace(logits_processors=None))
    adapter = GuidanceLogitsProcessor(config, torch.device("cpu"), False)
    params = SamplingParams(extra_args={CONFIG_KEY: {"guidance": MIXED, "key": "a" * 16}})
    with pytest.raises(RuntimeError, match="call steersman_prepare on the workers"):
        adapter.update_state(BatchUpdate(1, [], [(0, params, [5], [])], []))
    adapter.update_state(BatchUpdate(1, [], [(0, SamplingParams(), [5], [])], []))


class Texts:
    """Rows that are scored by their hidden states: [3] for each token, made of the text and the position."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        batch.runner.query_start_loc = SimpleNamespace(np=torch.zeros(9, dtype=torch.int32).numpy())
        batch.runner.input_batch = SimpleNamespace(num_computed_tokens_cpu=torch.zeros(8, dtype=torch.int32).numpy())
        self.hidden: dict[str, torch.Tensor] = {}

    def added(self, index: int, key: str, length: int, start: int) -> Any:
        self.hidden[key] = torch.randn(length, 3)
        extra = {CONFIG_KEY: {"key": key, "span": [start, length]}}
        return index, SamplingParams(extra_args=extra), [5] * length, []

    def step(self, rows: list[tuple[str, int, int]]) -> None:
        """One forward: of each row the tokens of its text from one position to before another."""
        parts = [self.hidden[key][begin:end] for key, begin, end in rows]
        place = 0
        for index, (_, begin, end) in enumerate(rows):
            self.batch.runner.input_batch.num_computed_tokens_cpu[index] = begin
            place += end - begin
            self.batch.runner.query_start_loc.np[index + 1] = place
        memory = torch.cat(parts)
        self.batch.runner.execute_model_state = forwarded(torch.randn(len(rows), WIDTH), memory, memory[:0])
        self.batch.runner.sample_tokens(None)
        memory.fill_(torch.nan)

    def assert_kept(self, key: str, start: int) -> None:
        assert torch.equal(self.batch.runtime.hidden_states.take(key), self.hidden[key][start:])


def test_hidden_states_of_texts_are_kept_over_pieces_moves_and_preemptions(batch: Batch) -> None:
    texts = Texts(batch)
    batch.update(3, added=[texts.added(0, "a", 9, 2), batch.added(1, "plain", [5], None), texts.added(2, "b", 6, 5)])
    texts.hidden["plain"] = torch.randn(20, 3)
    texts.step([("a", 0, 4), ("plain", 0, 1), ("b", 0, 3)])
    batch.update(3, moved=[(0, 2, SWAP)])
    texts.step([("b", 3, 6), ("plain", 1, 2), ("a", 4, 5)])
    texts.assert_kept("b", 5)
    batch.update(2, removed=[0], moved=[(2, 0, ONE_WAY)])
    texts.step([("a", 5, 9), ("plain", 2, 3)])
    texts.assert_kept("a", 2)
    batch.update(1, removed=[0], moved=[(1, 0, ONE_WAY)])
    first = texts.hidden["a"]
    batch.update(2, added=[texts.added(1, "a", 9, 2)])
    assert not torch.equal(first, texts.hidden["a"]), "it is computed anew behind its preemption"
    texts.step([("plain", 3, 4), ("a", 0, 9)])
    texts.assert_kept("a", 2)


def test_the_runtime_is_handed_the_hidden_states_of_the_rows_that_are_sampled(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Any] = []
    monkeypatch.setattr(batch.runtime, "step", lambda *a, biased, hidden: handed.append(hidden))
    batch.update(1, added=[batch.added(0, "a", [5, 6])])
    sampled = torch.randn(1, 3)
    batch.runner.execute_model_state = forwarded(torch.randn(1, WIDTH), torch.randn(4, 3), sampled)
    batch.runner.sample_tokens(None)
    batch.adapter.guide(torch.randn(1, WIDTH), metadata())
    batch.runner.execute_model_state = None
    batch.runner.sample_tokens(None)
    batch.adapter.guide(torch.randn(1, WIDTH), metadata())
    assert handed[0] is sampled
    assert handed[1] is None, "what one step computed is not used in the next"
