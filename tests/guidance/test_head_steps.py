"""Steps that heads guide: rewards and log-probabilities of the hidden states of the very rows, and a row that cannot be
guided ends alone."""

import math
import random
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch

from steersman.guidance.head_files import POLICY, REWARD
from steersman.guidance.head_models import HeadModel
from steersman.guidance.heads import FrozenHead
from steersman.guidance.hidden_states import Span
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from tests.support.device import SlowCopy, forbid_host_reads
from tests.support.gpu_runtime import acting_as_gpu, count_launches
from tests.support.heads import head_table, random_head
from tests.support.scripted import END, begin_rows, scripted_runtime

WIDTH, STATE = 24, 17
SINGLE = {"method": "pargs", "reward_model": "r", "beta": 0.7, "top_k": 5}
WHOLE = {**SINGLE, "top_k": None}
MIXED = {"method": "mixed", "policy": "p", "mix": 0.6}
BUDGET = {**MIXED, "kl_budget": 50.0}
OVER = {**SINGLE, "policies": {"base": 0.3, "p": 0.7}}
GUIDANCES: dict[str, dict[str, Any]] = {
    "candidates": SINGLE, "every token": WHOLE, "a policy": MIXED, "a budget": BUDGET, "rewards over a policy": OVER,
}  # fmt: skip


class Heads:
    """A runtime with the reward head `r`, the policy head `p` and a scripted reward model `other`."""

    def __init__(self, rng: random.Random) -> None:
        self.runtime: GuidanceRuntime = scripted_runtime({"other": torch.randn(WIDTH)})
        self.models: dict[str, HeadModel] = {}
        for name, role in (("r", REWARD), ("p", POLICY)):
            self.models[name] = random_head(rng, name, role, WIDTH, hidden_size=STATE)
            self.runtime.add(self.models[name])  # type: ignore[arg-type]

    def hidden(self, rows: int) -> torch.Tensor:
        """Random states, which both heads read."""
        return torch.randn(rows, STATE)

    def expected(self, logits: torch.Tensor, hidden: torch.Tensor, guidance: dict[str, Any]) -> torch.Tensor:
        """Guided log-probabilities [V] of a row, in float64."""
        base = logits.double().log_softmax(-1)
        outputs = {n: head_table(m.head, hidden.unsqueeze(0))[0] for n, m in self.models.items()}
        policy = (base + outputs["p"]).log_softmax(-1)
        mixture = guidance.get("policies", {"base": 1.0})
        if guidance["method"] == "mixed":
            mixture = {"base": 1 - guidance["mix"], "p": guidance["mix"]}
        scores = mixture.get("base", 0.0) * base + mixture.get("p", 0.0) * policy
        if "reward_model" in guidance:
            scores = scores + guidance["beta"] * outputs["r"]
            if guidance["top_k"] is not None:
                kept = base.topk(guidance["top_k"]).indices
                scores = torch.full_like(scores, -torch.inf).index_copy(0, kept, scores[kept])
        return scores.log_softmax(-1)


@pytest.fixture
def heads(rng: random.Random) -> Heads:
    """Freshly drawn."""
    return Heads(rng)


def step(heads: Heads, guidances: list[dict[str, Any]], hidden: torch.Tensor | None, logits: torch.Tensor) -> list[Any]:
    rows = begin_rows(heads.runtime, guidances)
    heads.runtime.step(logits, rows, hidden=hidden)
    return rows


@pytest.mark.parametrize("name", GUIDANCES)
def test_every_row_is_guided_by_its_own_hidden_state(heads: Heads, name: str) -> None:
    logits, hidden = torch.randn(4, WIDTH), heads.hidden(4)
    guided = logits.clone()
    step(heads, [GUIDANCES[name]] * 4, hidden, guided)
    for n in range(4):
        expected = heads.expected(logits[n], hidden[n], GUIDANCES[name])
        torch.testing.assert_close(guided[n].double().log_softmax(-1), expected, rtol=0, atol=1e-5)


def test_rows_of_all_kinds_in_any_order_are_guided_together(heads: Heads, rng: random.Random) -> None:
    logits, hidden = torch.randn(8, WIDTH), heads.hidden(8)
    guidances = [rng.choice(list(GUIDANCES.values())) for _ in range(8)]
    rows = begin_rows(heads.runtime, guidances)
    order = rng.sample(range(8), 6)
    guided = logits.clone()
    heads.runtime.step(guided, [rows[n] for n in order], hidden=hidden)
    for n in range(8):
        if n not in order:
            assert torch.equal(guided[n], logits[n])
            continue
        expected = heads.expected(logits[n], hidden[n], guidances[n])
        torch.testing.assert_close(guided[n].double().log_softmax(-1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hidden_states_come_in_any_precision(heads: Heads, dtype: torch.dtype) -> None:
    logits, hidden = torch.randn(2, WIDTH), heads.hidden(2).to(dtype)
    guided = logits.clone()
    step(heads, [SINGLE, MIXED], hidden, guided)
    for n, guidance in enumerate((SINGLE, MIXED)):
        expected = heads.expected(logits[n], hidden[n], guidance)
        torch.testing.assert_close(guided[n].double().log_softmax(-1), expected, rtol=0, atol=1e-5)


def test_heads_read_no_tokens(heads: Heads) -> None:
    rows = step(heads, list(GUIDANCES.values()), heads.hidden(5), torch.randn(5, WIDTH))
    for row in rows:
        assert (row.request.reward_model_tokens, row.request.policy_tokens) == (0, 0)
    assert not any(heads.runtime.work.tokens["step"].values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", GUIDANCES)
def test_a_hidden_state_that_is_not_finite_ends_its_row_alone_and_names_the_head(
    heads: Heads, rng: random.Random, name: str, value: float
) -> None:
    logits, hidden = torch.randn(3, WIDTH), heads.hidden(3)
    bad = rng.randrange(3)
    hidden[bad, rng.randrange(17)] = value
    guided = logits.clone()
    rows = step(heads, [GUIDANCES[name]] * 3, hidden, guided)
    for n, row in enumerate(rows):
        if n != bad:
            assert row.request.error is None
            expected = heads.expected(logits[n], hidden[n], GUIDANCES[name])
            torch.testing.assert_close(guided[n].double().log_softmax(-1), expected, rtol=0, atol=1e-5)
            continue
        assert row.request.error is not None
        head = "policy 'p'" if "policy" in name or "budget" in name else "reward model 'r'"
        assert head in row.request.error
        assert "finite number" in row.request.error
        assert row.request.fault == "not_finite"
        assert guided[n].exp().nonzero().flatten().tolist() == [END], "the failed row ends"
    failed = heads.runtime.work.failures["not_finite"]
    assert sum(failed.values()) == 1


@pytest.mark.parametrize("name", GUIDANCES)
def test_without_hidden_states_a_row_ends_with_the_reason_and_neighbours_go_on(heads: Heads, name: str) -> None:
    logits, other = torch.randn(3, WIDTH), {"method": "pargs", "reward_model": "other", "top_k": 4}
    guided = logits.clone()
    rows = step(heads, [other, GUIDANCES[name], other], None, guided)
    assert [row.request.error is None for row in rows] == [True, False, True]
    assert "needs the base's hidden states" in str(rows[1].request.error)
    assert rows[1].request.fault == "raised"
    assert guided[1].exp().nonzero().flatten().tolist() == [END]
    again = logits.clone()
    step(heads, [other], None, again[:1])
    torch.testing.assert_close(guided[0], again[0])
    assert int(guided[2].isfinite().sum()) == 4


def test_a_gate_on_a_policy_heads_divergence_opens_by_its_own_row(heads: Heads) -> None:
    logits, hidden = torch.randn(6, WIDTH), heads.hidden(6)
    base = logits.double().log_softmax(-1)
    policy = (base + head_table(heads.models["p"].head, hidden)).log_softmax(-1)
    kl = (policy.exp() * (policy - base)).sum(-1)
    threshold = float(kl.sort().values[2:4].mean())
    guided = logits.clone()
    step(heads, [{"method": "kl_threshold", "policy": "p", "threshold": threshold}] * 6, hidden, guided)
    for n in range(6):
        expected = policy[n] if kl[n] > threshold else base[n]
        torch.testing.assert_close(guided[n].double().log_softmax(-1), expected, rtol=0, atol=1e-5)


def _fail_to_hold_every_output(*_: object) -> None:
    raise AssertionError("the outputs for all tokens are held at once")


@pytest.mark.parametrize("gated", [False, True])
def test_on_a_device_with_kernels_a_policy_head_takes_two_launches_and_the_host_waits_for_none(
    heads: Heads, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows there are, and whatever their strengths; a gate is decided by the second one."""
    guidances = [{**MIXED, "mix": mix} for mix in (0.2, 1.0, 0.7)]
    if gated:
        guidances[1] = {"method": "kl_threshold", "policy": "p", "threshold": 1e-6}
    logits, hidden = torch.randn(3, WIDTH), heads.hidden(3)
    logits[2, 7:] = -torch.inf
    guided, last = logits.clone(), torch.tensor([2, 3, 4])
    runtime = GuidanceRuntime(heads.runtime.reward_models, END, heads.runtime.policies, copy=SlowCopy)
    rows = begin_rows(runtime, guidances)
    monkeypatch.setattr(FrozenHead, "every", _fail_to_hold_every_output)
    with acting_as_gpu(), count_launches() as launches, forbid_host_reads():
        runtime.step(guided, rows, last, hidden=hidden)
    assert launches == {"_project": 1, "_settle": 1}
    for n, mix in enumerate((0.2, 1.0, 0.7)):
        expected = heads.expected(logits[n], hidden[n], {**MIXED, "mix": mix})
        torch.testing.assert_close(guided[n].double().log_softmax(-1), expected, rtol=0, atol=1e-5)


def _weighted(names: list[str]) -> dict[str, Any]:
    rewards = [{"model": name, "weight": weight} for name, weight in zip(names, (0.5, -0.3), strict=False)]
    return {"method": "pargs", "rewards": rewards, "top_k": 5, "beta": 0.8}


def _expected_among(logits: torch.Tensor, k: int, guidance: dict[str, Any], outputs: list[torch.Tensor]) -> Any:
    """Guided log-probabilities [V] of a row whose rewards have these outputs [V], over its k best tokens; the outputs
    of a head that has fewer tokens mask the others."""
    bonus = torch.zeros(len(logits), dtype=torch.float64)
    for term, own in zip(guidance["rewards"], outputs, strict=True):
        bonus += guidance["beta"] * term["weight"] * own
        bonus.masked_fill_(own.isneginf(), -torch.inf)
    kept = logits.topk(k).indices
    scores = logits.double() + bonus
    return torch.full_like(scores, -torch.inf).index_copy(0, kept, scores[kept]).log_softmax(-1)


@pytest.mark.parametrize("terms", [1, 2])
def test_on_a_device_with_kernels_reward_heads_take_two_launches_and_the_host_waits_for_none(
    heads: Heads, rng: random.Random, terms: int
) -> None:
    """Beside f(h), however many rows and heads there are; rows may be any, and have fewer candidates than others."""
    extra = random_head(rng, "more", REWARD, WIDTH, hidden_size=STATE)
    guidance = _weighted(["r", "more"][:terms])
    logits, hidden = torch.randn(4, WIDTH), heads.hidden(4)
    models = {**heads.runtime.reward_models, "more": extra}
    runtime = GuidanceRuntime(models, END, {}, copy=SlowCopy)  # type: ignore[arg-type]
    rows = begin_rows(runtime, [guidance, guidance, {**guidance, "top_k": 3}, guidance])
    asked = [rows[n] for n in (3, 0, 2)]
    guided, last = logits.clone(), torch.tensor([2, 3, 4, 5])
    with acting_as_gpu(), count_launches() as launches, forbid_host_reads():
        runtime.step(guided, asked, last, hidden=hidden)
    assert launches == {"_scan_best": 1, "_head_rerank": 1}
    assert torch.equal(guided[1], logits[1])
    tables = [head_table(model.head, hidden) for model in (heads.models["r"], extra)][:terms]
    for n, k in ((0, 5), (2, 3), (3, 5)):
        expected = _expected_among(logits[n], k, guidance, [table[n] for table in tables])
        torch.testing.assert_close(guided[n].double().log_softmax(-1), expected, rtol=0, atol=1e-5)


def test_on_a_device_with_kernels_reports_hold_the_rows_of_every_step(heads: Heads, rng: random.Random) -> None:
    """Beside those of heads also steps that go another way: a client masks tokens."""
    runtime = GuidanceRuntime(heads.runtime.reward_models, END, {}, copy=SlowCopy)
    guidance = _weighted(["r"])
    rows = begin_rows(runtime, [{**guidance, "trace": True}, {**guidance, "top_k": 3}])
    kl = [0.0, 0.0]
    with acting_as_gpu():
        for position in range(4):
            logits, hidden = torch.randn(2, WIDTH), heads.hidden(2)
            biased = logits.clone()
            if position == 2:
                biased[:, 5:9] = -torch.inf
            guided, last = logits.clone(), torch.tensor([2, 3])
            runtime.step(guided, rows, last, biased if position == 2 else None, hidden)
            table = head_table(heads.models["r"].head, hidden)
            for n, k in enumerate((5, 3)):
                expected = _expected_among(biased[n], k, guidance, [table[n]])
                torch.testing.assert_close(guided[n].double().log_softmax(-1), expected, rtol=0, atol=1e-5)
                token = int(torch.multinomial(expected.exp(), 1))
                rows[n].output.append(token)  # type: ignore[attr-defined]
                kl[n] += float(expected[token] - biased[n].double().log_softmax(-1)[token])
        reports = [runtime.finish(row.request.key, row.output) for row in rows]
    for n, report in enumerate(reports):
        assert report is not None
        assert report.guided_tokens == 4
        assert report.kl == pytest.approx(kl[n], abs=1e-4)
        assert report.rewards["r"] == pytest.approx(float(table[n, rows[n].output[-1]]), abs=1e-4)
    trace = reports[0].trace  # type: ignore[union-attr]
    assert trace is not None
    assert [len(position["candidates"]) for position in trace] == [5] * 4


def test_on_a_device_with_kernels_a_head_that_has_fewer_tokens_than_the_bases_logits_masks_the_rest(
    heads: Heads,
) -> None:
    """A row that has no other candidate is the base's until that is learned, and so is one without a number."""
    runtime = GuidanceRuntime(heads.runtime.reward_models, END, {}, copy=SlowCopy)
    guidance = {**_weighted(["r"]), "top_k": 4}
    rows = begin_rows(runtime, [guidance] * 4)
    logits, hidden, last = torch.randn(4, WIDTH + 4), heads.hidden(4), torch.tensor([2, 3, 4, 5])
    logits[0, WIDTH + 1 :] += 50
    logits[1, WIDTH:] += 50
    hidden[2, 3] = math.nan
    guided = logits.clone()
    SlowCopy.arrived = False
    with acting_as_gpu(), count_launches() as launches, forbid_host_reads():
        runtime.step(guided, rows, last, hidden=hidden)
    assert launches == {"_scan_best": 1, "_head_rerank": 1}
    table = torch.full((4, WIDTH + 4), -torch.inf, dtype=torch.float64)
    table[:, :WIDTH] = head_table(heads.models["r"].head, hidden)
    for n in (0, 3):
        expected = _expected_among(logits[n], 4, guidance, [table[n]])
        torch.testing.assert_close(guided[n].double().log_softmax(-1), expected, rtol=0, atol=1e-5)
    assert torch.equal(guided[1:3], logits[1:3])
    assert [row.request.error for row in rows] == [None] * 4
    runtime.settle(wait=True)
    assert [row.request.fault for row in rows] == [None, "unreadable", "not_finite", None]
    assert "raise top_k" in str(rows[1].request.error)
    assert "not a finite number" in str(rows[2].request.error)


def test_an_answers_values_are_the_heads_behind_each_position(heads: Heads, rng: random.Random) -> None:
    hidden, tokens = heads.hidden(6), [rng.randrange(WIDTH) for _ in range(4)]
    runtime = heads.runtime
    with pytest.raises(KeyError):
        runtime.score_hidden("r", "unknown", tokens)
    runtime.hidden_states.expect(Span("key", 2, 6))
    runtime.hidden_states.keep("key", 0, hidden[:4])
    runtime.hidden_states.keep("key", 4, hidden[4:])
    values = runtime.score_hidden("r", "key", tokens)
    expected = head_table(heads.models["r"].head, hidden[2:]).gather(1, torch.tensor(tokens).unsqueeze(1))[:, 0]
    assert values == pytest.approx(expected.tolist(), abs=1e-5)


def test_reports_of_long_answers_are_the_sums_over_their_own_rows(heads: Heads) -> None:
    """Rows stay for many steps, two change places, one is replaced and one leaves for good: what lies together
    must not mix them up."""
    rows = begin_rows(heads.runtime, [SINGLE, {**SINGLE, "top_k": 3}, MIXED])
    everybody, kl = list(rows), defaultdict(float)
    for position in range(80):
        if position == 40:
            # The same plan as the first row's, so that only the rows tell the two apart.
            rows = [rows[0], Row(1, heads.runtime.start("new", rows[0].request.plan, 1), [1], []), rows[2]]
            everybody.append(rows[1])
        if position == 50:
            rows = [replace(rows[1], index=0), replace(rows[0], index=1), rows[2]]
        if position == 60:
            rows = rows[1:]
        logits, hidden = torch.randn(3, WIDTH), heads.hidden(3)
        guided = logits.clone()
        heads.runtime.step(guided, rows, hidden=hidden)
        for row in rows:
            guidance = {"pargs": {**SINGLE, "top_k": row.request.plan.formula.top_k}, "mixed": MIXED}
            base, state = logits[row.index], hidden[row.index]
            logprobs = heads.expected(base, state, guidance[row.request.plan.method])
            torch.testing.assert_close(guided[row.index].double().log_softmax(-1), logprobs, rtol=0, atol=1e-4)
            token = int(torch.multinomial(logprobs.exp(), 1))
            row.output.append(token)  # type: ignore[attr-defined]
            kl[row.request.key] += float(logprobs[token] - base.double().log_softmax(-1)[token])
    for row in everybody:
        report = heads.runtime.finish(row.request.key, row.output)
        assert report is not None
        assert report.tokens == report.guided_tokens == len(row.output)
        assert report.kl == pytest.approx(kl[row.request.key], abs=1e-3)


def test_a_row_whose_request_is_finished_is_the_bases_from_the_next_step_on(heads: Heads) -> None:
    rows = begin_rows(heads.runtime, [SINGLE, MIXED])
    for finished in (False, True):
        logits, hidden = torch.randn(2, WIDTH), heads.hidden(2)
        guided = logits.clone()
        heads.runtime.step(guided, rows, hidden=hidden)
        assert [torch.equal(own, base) for own, base in zip(guided, logits, strict=True)] == [finished, False]
        for row in rows:
            row.output.append(int(guided[row.index].argmax()))  # type: ignore[attr-defined]
        if not finished:
            assert heads.runtime.finish(rows[0].request.key, rows[0].output) is not None


def test_a_policy_head_with_fewer_tokens_than_the_bases_logits_gives_the_rest_no_probability(heads: Heads) -> None:
    """The base's logits may be padded behind its tokens."""
    logits, hidden = torch.randn(3, WIDTH + 4), heads.hidden(3)
    guided = logits.clone()
    step(heads, [MIXED] * 3, hidden, guided)
    assert bool(guided[:, WIDTH:].isneginf().all())
    for n in range(3):
        expected = heads.expected(logits[n, :WIDTH], hidden[n], MIXED)
        torch.testing.assert_close(guided[n, :WIDTH].double().log_softmax(-1), expected, rtol=0, atol=1e-5)
