"""The adapter for transformers.generate gives the reference's answers."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.generate import GuidanceLogitsProcessor, load_runtime
from steersman.guidance.request import GuidanceError
from steersman.guidance.runtime import GuidanceRuntime
from tests.support.distribution import CASES, DRAWS, check_draws
from tests.support.oracle import head_rewards, load_oracle
from tests.support.random_input import random_guidance, random_policy_guidance, random_prompts, random_whole_guidance
from tests.support.tiny import END

HEAD: dict[str, Any] = {"method": "pargs", "reward_model": "atop", "beta": 1.3, "top_k": 5}


@pytest.fixture(scope="module")
def runtime(models: Path) -> GuidanceRuntime:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    rewards = {name: str(models / name) for name in ("first", "second", "every", "atop")}
    policies = {name: str(models / name) for name in ("expert", "other", "tilted")}
    return load_runtime(tokenizer, rewards, policies, cache_bytes=2**22)


@pytest.fixture(scope="module")
def roomy_runtime(models: Path) -> GuidanceRuntime:
    """With room for thousands of rows at once."""
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    rewards = {name: str(models / name) for name in ("first", "second", "every", "atop")}
    policies = {name: str(models / name) for name in ("expert", "other", "tilted")}
    return load_runtime(tokenizer, rewards, policies, cache_bytes=2**27)


@pytest.fixture(scope="module")
def base(models: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32).eval()


def test_greedy_answers_and_reports_are_the_references_for_padded_prompts(
    models: Path, runtime: GuidanceRuntime, base: torch.nn.Module
) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    oracle = load_oracle(models)
    prompts = random_prompts(rng, 200, longest=40)
    for start in range(0, len(prompts), 25):
        batch = prompts[start : start + 25]
        kinds = (random_guidance, random_policy_guidance, random_whole_guidance)
        guidance = [kinds[n % 3](rng) for n, _ in enumerate(batch)]
        ids, mask = _left_padded(batch)
        processor = GuidanceLogitsProcessor(base, runtime, guidance, mask, seed=start)
        sequences = base.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, logits_processor=[processor]
        )
        reports = processor.finish(sequences)
        for n, (prompt, wanted, report) in enumerate(zip(batch, guidance, reports, strict=True)):
            response = sequences[n, ids.shape[1] :].tolist()
            response = response[: response.index(END) + 1] if END in response else response
            oracle.assert_greedy(prompt, wanted, response, 8)
            if n % 2 == 0:
                assert report is not None
                oracle.assert_report(
                    prompt, wanted, response, {f: getattr(report, f) for f in report.__dataclass_fields__}
                )
    for model in (*runtime.reward_models.values(), *runtime.policies.values()):
        assert model.describe().get("cache_blocks_in_use", 0) == 0


@pytest.mark.parametrize("name", CASES)
def test_sampled_tokens_follow_the_exact_distribution_and_no_other(
    models: Path, roomy_runtime: GuidanceRuntime, base: torch.nn.Module, name: str
) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    prompt = [random.Random(seed).randrange(2, 300) for _ in range(3)]
    guidance, right, wrong = CASES[name](load_oracle(models), prompt, 2)
    draws: list[list[int]] = []
    batch = 2000
    while len(draws) < DRAWS:
        processor = GuidanceLogitsProcessor(base, roomy_runtime, guidance, seed=len(draws))
        ids = torch.tensor([prompt]).expand(batch, -1)
        sequences = base.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=True, top_k=0,
            logits_processor=[processor],
        )  # fmt: skip
        processor.finish(sequences)
        answers = [row[len(prompt) :] for row in sequences.tolist()]
        draws += [answer[:1] if answer[0] == END else answer for answer in answers]
    check_draws(draws, right, wrong)


def test_rows_without_guidance_keep_the_bases_scores_bit_for_bit(
    runtime: GuidanceRuntime, base: torch.nn.Module
) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    processor = GuidanceLogitsProcessor(base, runtime, [None, {"method": "pargs", "reward_model": "first"}])
    with torch.inference_mode():
        scores = base(ids).logits[:, -1]
    guided = processor(ids, scores)
    assert torch.equal(guided[0], scores[0])
    assert int(guided[1].isfinite().sum()) == 10
    processor.finish(torch.cat((ids, guided.argmax(-1, keepdim=True)), dim=1))


@pytest.mark.parametrize(
    "guidance",
    [
        {"method": "pargs", "reward_model": "first", "beta": 2.0},
        {"method": "mixed", "policy": "expert", "mix": 1.0},
        {"method": "mixed", "policy": "expert", "mix": 1.5},
        {"method": "product", "policies": {"base": -1.0, "expert": 2.0}},
    ],
    ids=["rewards", "mixed 1", "mixed 1.5", "product"],
)
def test_what_processors_in_front_do_to_logits_acts_on_the_guided_ones_once(
    runtime: GuidanceRuntime, base: torch.nn.Module, rng: random.Random, guidance: dict
) -> None:
    ids = torch.tensor(random_prompts(rng, 1, shortest=5))

    def draw(**options: Any) -> int:
        processor = GuidanceLogitsProcessor(base, runtime, guidance)
        sequences = base.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, logits_processor=[processor],
            output_logits=True, output_scores=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        processor.finish(sequences.sequences)
        scores.append(sequences.scores[0][0])
        return int(sequences.sequences[0, -1])

    scores: list[torch.Tensor] = []
    first = draw()
    assert draw(suppress_tokens=[first]) != first
    assert draw(bad_words_ids=[[first]]) != first
    wanted = rng.randrange(4, 300)
    assert draw(sequence_bias={(wanted,): 100.0}) == wanted
    draw(sequence_bias={(first,): -1.5})
    support = (scores[-1] > -torch.inf) & (scores[0] > -torch.inf)
    expected = scores[0].clone()
    expected[first] -= 1.5
    torch.testing.assert_close(
        scores[-1][support].log_softmax(-1), expected[support].log_softmax(-1), rtol=0, atol=1e-4
    )


def test_a_heads_rewards_are_those_of_the_hidden_states_that_the_model_was_given_a_cache_of(
    models: Path, runtime: GuidanceRuntime, base: Any, rng: random.Random
) -> None:
    """Each step of `generate` computes the last token's hidden state only."""
    rewards = head_rewards(models / "atop", models / "base")
    batch = random_prompts(rng, 6, shortest=2, longest=40)
    ids, mask = _left_padded(batch)
    widths: list[int] = []
    processor = GuidanceLogitsProcessor(base, runtime, HEAD, mask)
    hook = base.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    sequences = base.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=True,
        top_k=0,
        use_cache=True,
        logits_processor=[processor],
    )
    reports = processor.finish(sequences)
    hook.remove()
    assert set(widths[1:]) == {1}, "the cache is on"
    for prompt, row, report in zip(batch, sequences.tolist(), reports, strict=True):
        response = row[ids.shape[1] :]
        response = response[: response.index(END) + 1] if END in response else response
        assert report is not None
        expected = float(rewards([[*prompt, *response]]))
        assert report.rewards["atop"] == pytest.approx(expected, abs=1e-5, rel=1e-5)
        assert (report.reward_model_tokens, report.policy_tokens) == (0, 0)


def test_a_head_is_refused_on_another_model_than_its_base(
    models: Path, runtime: GuidanceRuntime, base: torch.nn.Module
) -> None:
    other = AutoModelForCausalLM.from_pretrained(models / "expert", dtype=torch.float32)
    wider = AutoModelForCausalLM.from_pretrained(models / "other", dtype=torch.float32)
    policy = {"method": "mixed", "policy": "tilted", "mix": 0.5}
    for guidance, name in ((HEAD, "reward model 'atop'"), (policy, "policy 'tilted'")):
        for model in (other, wider):
            with pytest.raises(ModelRefused, match=name):
                GuidanceLogitsProcessor(model, runtime, guidance)
            assert not model._forward_hooks, "nothing of a refused call stays at the model"
            assert not model.get_output_embeddings()._forward_pre_hooks
        GuidanceLogitsProcessor(base, runtime, guidance).finish(torch.zeros(0, 1, dtype=torch.long))
        # A model that needs no head is guided by other means all the same.
        GuidanceLogitsProcessor(other, runtime, {"method": "pargs", "reward_model": "first"}).finish(
            torch.zeros(0, 1, dtype=torch.long)
        )


def test_beam_search_and_unknown_models_are_refused(runtime: GuidanceRuntime, base: torch.nn.Module) -> None:
    with pytest.raises(GuidanceError, match="no reward model 'third'"):
        GuidanceLogitsProcessor(base, runtime, {"method": "pargs", "reward_model": "third"})
    processor = GuidanceLogitsProcessor(base, runtime, {"method": "pargs", "reward_model": "first", "beta": 0.3})
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(ValueError, match="beam search"):
        base.generate(ids, max_new_tokens=20, num_beams=4, do_sample=False, logits_processor=[processor])
    for n in range(4):
        runtime.finish(processor._rows[n].request.key, [])  # type: ignore[index, union-attr]


def _left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask
