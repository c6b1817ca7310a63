"""Whether a guided request may run, and the ticket that it runs with."""

from typing import Any

import pytest
from vllm import SamplingParams

from steersman.guidance.request import GuidanceError, TooLong, parse_guidance
from steersman.server.admission import Ticket, admit, admit_search
from steersman.server.budget import CacheBudget
from steersman.server.registry import LoadedModel, Registry

REWARD = LoadedModel("a", "causal", window=100, cache_blocks=8, block_size=16, vocabulary=50)
TEXT = LoadedModel("text", "text", window=100)
POLICY = LoadedModel("p", "policy", window=60, cache_blocks=4, block_size=16, vocabulary=40)
REGISTRY = Registry({"a": REWARD, "text": TEXT}, {"p": POLICY})
PARGS = {"method": "pargs", "reward_model": "a"}
MIXED = {"method": "mixed", "policy": "p", "mix": 0.5}


def budget() -> CacheBudget:
    return CacheBudget({"a": 8, "p": 4})


def ticket_of(
    guidance: Any, prompt: list[int], field: str | None = "max_tokens", sent: Any = None, **params: Any
) -> tuple[Ticket, Any]:
    """sent: what the request's entry holds besides."""
    sampling = SamplingParams(**{"max_tokens": 10, **params})
    entry = {"guidance": guidance, "key": "k", "max_tokens_field": field, "constraint_field": None, **(sent or {})}
    return admit(REGISTRY, budget(), entry, {"prompt_token_ids": prompt}, sampling), sampling


def test_a_ticket_holds_the_blocks_of_the_longest_answer_of_every_choice() -> None:
    ticket, _ = ticket_of(PARGS, [5] * 6)
    assert (ticket.key, ticket.method, ticket.choices, ticket.seed) == ("k", "pargs", 1, None)
    assert (ticket.models, ticket.blocks, ticket.forced) == ([REWARD], {"a": 1}, False)
    ticket, _ = ticket_of({**PARGS, "policies": {"base": 0.5, "p": 0.5}}, [5] * 7, n=2)
    assert ticket.blocks == {"a": 4, "p": 4}, "17 tokens take two blocks"
    ticket, _ = ticket_of({**PARGS, "gate": {"first_tokens": 2}}, [5] * 14, max_tokens=40)
    assert ticket.blocks == {"a": 1}, "nothing is read behind the gate"
    ticket, _ = ticket_of({"method": "pargs", "reward_model": "text"}, [5])
    assert ticket.blocks == {}, "a text model has no cache"


def test_every_choice_has_a_seed_of_its_own_where_there_are_several() -> None:
    ticket, params = ticket_of(PARGS, [5], n=3)
    assert ticket.seed == params.seed
    assert 0 <= params.seed < 2**31
    assert [ticket.choice_seed(n) for n in range(3)] == [params.seed, params.seed + 1, params.seed + 2]
    assert ticket_of(PARGS, [5], n=3)[1].seed != params.seed
    ticket, params = ticket_of(PARGS, [5], n=3, seed=7)
    assert (params.seed, ticket.choice_seed(2)) == (7, 9)
    ticket, params = ticket_of(PARGS, [5], seed=7)
    assert (params.seed, ticket.choice_seed(0)) == (7, 7)
    ticket, params = ticket_of(PARGS, [5])
    assert (params.seed, ticket.choice_seed(0)) == (None, None)


def test_an_answer_is_cut_to_what_the_models_read_where_its_length_is_nobodys_wish() -> None:
    assert ticket_of(PARGS, [5] * 95, field=None)[1].max_tokens == 5
    assert ticket_of({**PARGS, "end_token": True}, [5] * 95, field=None)[1].max_tokens == 4
    assert ticket_of({**PARGS, "gate": {"first_tokens": 5}}, [5] * 95)[1].max_tokens == 10
    assert ticket_of(PARGS, [5] * 90)[1].max_tokens == 10
    with pytest.raises(
        GuidanceError, match=r"10 with a prompt of 95 tokens exceeds the 100 tokens .*; ask for at most 5"
    ):
        ticket_of(PARGS, [5] * 95)
    with pytest.raises(GuidanceError, match="exceeds the 60 tokens that policy 'p' reads"):
        ticket_of({**PARGS, "policies": {"base": 0.5, "p": 0.5}}, [5] * 55)


def test_a_prompt_counts_as_a_text_model_reads_it() -> None:
    guidance: dict[str, Any] = {"method": "pargs", "reward_model": "text"}
    messages: dict[str, Any] = {"prompt_field": "messages", "measured": {"text": 97}}
    assert ticket_of(guidance, [5], None, messages)[1].max_tokens == 3
    assert ticket_of(guidance, [5] * 200, sent={"measured": {"text": 90}})[1].max_tokens == 10
    with pytest.raises(TooLong, match=r"10 with a prompt of 97 tokens exceeds the 100 .*'text'.*at most 3") as refusal:
        ticket_of(guidance, [5], sent=messages)
    assert refusal.value.field == "max_tokens"
    full = {**messages, "measured": {"text": 100}}
    with pytest.raises(TooLong, match="100 tokens as reward model 'text' reads it, which reads at most 100") as refusal:
        ticket_of(guidance, [5], sent=full)
    assert refusal.value.field == "messages"
    both = {"method": "pargs", "rewards": [{"model": "a"}, {"model": "text"}]}
    with pytest.raises(TooLong, match="ask for at most 5"):
        ticket_of(both, [5] * 95, sent={"measured": {"text": 20}})


def test_what_the_whole_cache_cannot_hold_is_refused_with_the_way_out() -> None:
    ticket_of(PARGS, [5] * 6, n=8)
    with pytest.raises(GuidanceError) as refusal:
        ticket_of(PARGS, [5] * 6, n=9)
    assert refusal.value.field == "max_tokens"
    text = str(refusal.value)
    for words in ("n=9 choices need 144 tokens", "reward model 'a', which holds 128", "--guidance-cache"):
        assert words in text
    with pytest.raises(GuidanceError) as refusal:
        ticket_of(PARGS, [5] * 6, field="max_completion_tokens", n=9)
    assert refusal.value.field == "max_completion_tokens"
    with pytest.raises(GuidanceError) as refusal:
        ticket_of(PARGS, [5] * 6, field=None, n=9)
    assert refusal.value.field == "max_tokens"


@pytest.mark.parametrize("prompt", [{"prompt_token_ids": []}, {"prompt_embeds": [1]}, "text", None])
def test_a_prompt_without_tokens_is_refused(prompt: Any) -> None:
    entry = {"guidance": PARGS, "key": "k", "max_tokens_field": None}
    with pytest.raises(GuidanceError, match="needs at least one prompt token"):
        admit(REGISTRY, budget(), entry, prompt, SamplingParams())


def test_a_token_that_one_of_the_models_cannot_read_is_refused() -> None:
    ticket_of(PARGS, [49])
    with pytest.raises(GuidanceError, match="holds token 50, reward model 'a' reads the ids 0 to 49"):
        ticket_of(PARGS, [5, 50])
    with pytest.raises(GuidanceError, match="holds token 45, policy 'p'"):
        ticket_of(MIXED, [45])
    search = {"method": "best_of_n", "reward_model": "a", "n": 2}
    with pytest.raises(GuidanceError, match="holds token 50"):
        search_of(search, [50])


def test_a_text_that_is_scored_has_a_ticket_that_tells() -> None:
    entry = {"guidance": MIXED, "key": "k", "max_tokens_field": "prompt", "forced": [3, 4]}
    assert admit(REGISTRY, budget(), entry, {"prompt_token_ids": [5]}, SamplingParams(max_tokens=2)).forced


def test_a_formula_that_is_the_base_needs_no_model() -> None:
    ticket, params = ticket_of({**MIXED, "mix": 0.0}, [5] * 200, max_tokens=300)
    assert (ticket.models, ticket.blocks, params.max_tokens) == ([], {}, 300)


def search_of(guidance: dict[str, Any], prompt: list[int], field: str | None = None, **params: Any) -> Any:
    sampling = SamplingParams(**{"max_tokens": 10, "temperature": 1.0, **params})
    entry = {"guidance": guidance, "key": "k", "max_tokens_field": field, "constraint_field": None}
    parsed: Any = parse_guidance(guidance)
    return admit_search(REGISTRY, budget(), parsed, entry, {"prompt_token_ids": prompt}, sampling, None), sampling


def test_a_search_scores_answers_that_fit_its_reward_model() -> None:
    guidance = {"method": "best_of_n", "reward_model": "a", "n": 2}
    search, params = search_of(guidance, [5, 6])
    assert (search.model, search.prompt, params.max_tokens) == (REWARD, [5, 6], 10)
    assert search_of(guidance, [5] * 95)[1].max_tokens == 5
    with pytest.raises(GuidanceError, match="ask for at most 5"):
        search_of(guidance, [5] * 95, "max_tokens")
    with pytest.raises(GuidanceError, match="temperature"):
        search_of(guidance, [5], temperature=0.0)
    text, _ = search_of({**guidance, "reward_model": "text"}, [5])
    assert text.model == TEXT


def test_a_search_whose_one_answer_no_cache_could_hold_is_refused() -> None:
    small = CacheBudget({"a": 1})
    parsed: Any = parse_guidance({"method": "best_of_n", "reward_model": "a", "n": 2})
    for length, fits in ((11, True), (12, False)):
        prompt, params = {"prompt_token_ids": [5] * 5}, SamplingParams(max_tokens=length)
        entry = {"max_tokens_field": "max_completion_tokens", "constraint_field": None}
        if fits:
            admit_search(REGISTRY, small, parsed, entry, prompt, params, None)
            continue
        with pytest.raises(
            GuidanceError, match=r"one answer of 12 tokens .* reward model 'a'; .*--guidance-cache"
        ) as no:
            admit_search(REGISTRY, small, parsed, entry, prompt, params, None)
        assert no.value.field == "max_completion_tokens"
