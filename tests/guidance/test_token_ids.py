"""Token ids beyond a model's embedding: what cannot be served is refused, and the rest is never read. The base's logits
are padded here, as those of a family's larger models are against its smaller ones. On a CPU, and as a GPU does it."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from steersman.guidance.auxiliary import CausalModel, Prefix, Unscorable
from steersman.guidance.checkpoints import ModelRefused, find_head
from steersman.guidance.generate import GuidanceLogitsProcessor, load_runtime
from steersman.guidance.policies import load_policy
from steersman.guidance.reference import ReferenceModels, reference_step
from steersman.guidance.request import GuidanceError, parse_guidance
from steersman.guidance.reward_loading import load_reward_model
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from steersman.guidance.tokenizers import count_ids
from tests import laws
from tests.support.gpu_runtime import DEVICE, acting_as_gpu
from tests.support.oracle import causal_rewards, language_model, plan_of, vocabulary_rewards
from tests.support.random_input import random_prompts
from tests.support.tiny import (
    COMMON,
    END,
    VOCABULARY,
    build_tokenizer,
    randomise,
    save_adapter,
    save_aspects,
    save_base,
    save_reward,
    save_vocabulary_reward,
)

PADDED = VOCABULARY + 8
"""Logits of the base; the models `first`, `every` and `expert` read the ids below VOCABULARY only."""
BEYOND = range(VOCABULARY, PADDED)
CPU = torch.device("cpu")

FIRST = {"method": "pargs", "reward_model": "first", "beta": 1.3, "top_k": 12}
WIDE = {**FIRST, "reward_model": "wide"}
MIXED = {"method": "mixed", "policy": "expert", "mix": 0.6}
GUIDANCES: dict[str, dict[str, Any]] = {
    "a causal reward": FIRST,
    "with an end token": {**FIRST, "end_token": True},
    "a vocabulary head": {**FIRST, "reward_model": "every"},
    "a narrow and a wide reward": {"method": "pargs", "rewards": [{"model": "wide"}, {"model": "first"}]},
    "rewards over a mixture": {**WIDE, "policies": {"base": 0.4, "expert": 0.6}},
    "a policy": MIXED,
}
NARROW = {"a causal reward": "first", "a vocabulary head": "every", "a policy": "expert"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that reads all of the base's ids."""
    return save_reward(tmp_path_factory.mktemp("wide"), seed=21, vocab_size=PADDED)


@pytest.fixture(scope="module", params=["plain", "kernels"])
def runtime(request: pytest.FixtureRequest, models: Path, wide: Path) -> Iterator[GuidanceRuntime]:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    rewards = {"wide": str(wide), **{name: str(models / name) for name in ("first", "every")}}
    policies = {"expert": str(models / "expert")}
    if request.param == "plain":
        yield load_runtime(tokenizer, rewards, policies, cache_bytes=2**22)
        return
    with acting_as_gpu():
        yield load_runtime(tokenizer, rewards, policies, cache_bytes=2**22, device=DEVICE)


@pytest.fixture
def device(runtime: GuidanceRuntime) -> torch.device:
    return runtime.policies["expert"].model.device


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "runtime" in request.fixturenames:
        runtime: GuidanceRuntime = request.getfixturevalue("runtime")
        for model in runtime.models.by_name.values():
            assert model.describe()["cache_blocks_in_use"] == 0


def padded_logits(rows: int, device: torch.device) -> torch.Tensor:
    """In which some of the most likely tokens are beyond the narrow models' embeddings."""
    logits = 2 * torch.randn(rows, PADDED)
    logits[:, VOCABULARY:] += 3
    return logits.to(device)


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=list(GUIDANCES))
def test_the_distribution_is_the_references_over_what_the_models_read(
    runtime: GuidanceRuntime,
    device: torch.device,
    models: Path,
    wide: Path,
    rng: random.Random,
    guidance: dict[str, Any],
) -> None:
    plain = {"first": causal_rewards(models / "first"), "every": vocabulary_rewards(models / "every")}
    expert = language_model(models / "expert")
    rewards = {name: _of_readable(score) for name, score in plain.items()} | {"wide": causal_rewards(wide)}
    policies = {"expert": lambda tokens: torch.nn.functional.pad(expert(tokens), (0, 8), value=-torch.inf)}

    def reference(logits: torch.Tensor, prompt: list[int], guidance: dict[str, Any]) -> torch.Tensor:
        sources = ReferenceModels(lambda _: logits.cpu(), END, rewards, policies)
        logprobs = reference_step(prompt, parse_guidance(guidance), sources).logprobs  # type: ignore[arg-type]
        logprobs[VOCABULARY:] = -torch.inf
        return logprobs.log_softmax(-1).to(device)

    logits = padded_logits(4, device)
    assert bool((logits.topk(FIRST["top_k"]).indices >= VOCABULARY).any())
    laws.assert_equals_reference(runtime, logits, random_prompts(rng, 4, longest=40), [guidance] * 4, reference)


def _of_readable(score: Callable[[list[list[int]]], torch.Tensor]) -> Callable[[list[list[int]]], torch.Tensor]:
    """Rewards of texts in which an id that cannot be read is another one: its candidate is masked afterwards."""
    return lambda texts: score([[min(token, VOCABULARY - 1) for token in text] for text in texts])


def test_a_neighbours_narrow_model_changes_no_bit_of_a_row(
    runtime: GuidanceRuntime, device: torch.device, rng: random.Random
) -> None:
    logits, prompts = padded_logits(3, device), random_prompts(rng, 3)
    alone = laws.step(runtime, logits, prompts, [WIDE, None, None])
    beside = laws.step(runtime, logits, prompts, [WIDE, FIRST, GUIDANCES["a vocabulary head"]])
    assert torch.equal(beside[0], alone[0])
    support = (beside > -torch.inf).cpu()
    assert int(support[0].sum()) == WIDE["top_k"]
    assert bool(support[0, VOCABULARY:].any()), "the wide model's row keeps the ids that only it reads"
    assert not bool(support[1:, VOCABULARY:].any())
    everyone = [WIDE, FIRST, {**WIDE, "top_k": 5}]
    laws.assert_batched_equals_single(runtime, logits, prompts, everyone)


def test_a_row_without_a_candidate_that_its_model_reads_fails_alone_and_names_it(
    runtime: GuidanceRuntime, device: torch.device, rng: random.Random
) -> None:
    logits, prompts = 2 * torch.randn(4, PADDED, device=device), random_prompts(rng, 4)
    logits[:, VOCABULARY:] += 50
    guidances = [{**FIRST, "top_k": 8}, WIDE, {**GUIDANCES["rewards over a mixture"], "top_k": 3}, FIRST]
    rows = _begin(runtime, prompts, guidances)
    guided = logits.clone()
    runtime.step(guided, rows)
    errors = _finish(runtime, rows)
    for error, name in ((errors[0], "'first'"), (errors[2], "'expert'")):
        assert error is not None
        assert all(word in error for word in (name, "0 to 319", "raise top_k")), error
    assert errors[1] is errors[3] is None
    assert int((guided[1] > -torch.inf).sum()) == WIDE["top_k"]
    assert int((guided[3] > -torch.inf).sum()) == FIRST["top_k"] - 8, "some candidates of the row are left"


def test_a_model_without_a_reward_for_a_masked_candidate_is_not_blamed_for_anothers(
    runtime: GuidanceRuntime, device: torch.device, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = runtime.reward_models["wide"]
    score = wide.score
    monkeypatch.setattr(wide, "score", lambda *asked: (score(*asked)[0] * torch.nan, [0]))
    guidance = {"method": "pargs", "rewards": [{"model": "every"}, {"model": "wide"}], "top_k": 12}
    rows = _begin(runtime, random_prompts(rng, 1), [guidance])
    runtime.step(padded_logits(1, device), rows)
    (error,) = _finish(runtime, rows)
    assert error == "reward model 'wide' returned a reward that is not a finite number"


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("name", NARROW)
def test_a_prompt_with_such_an_id_fails_alone(
    runtime: GuidanceRuntime, device: torch.device, rng: random.Random, name: str, where: str
) -> None:
    guidance = GUIDANCES[name]
    logits, prompts = padded_logits(2, device), random_prompts(rng, 3, shortest=3, longest=50)
    expected = laws.step(runtime, logits, [prompts[0], prompts[2]], [guidance] * 2)
    place = {"first": 0, "middle": len(prompts[1]) // 2, "last": -1}[where]
    prompts[1][place] = rng.choice(BEYOND)
    rows = _begin(runtime, prompts, [guidance] * 3)
    guided = logits[[0, 0, 1]].clone()
    runtime.step(guided, rows)
    errors = _finish(runtime, rows)
    assert errors[1] is not None
    assert f"{NARROW[name]!r} could not read the answer" in errors[1]
    assert "the token ids 0 to 319" in errors[1]
    assert errors[0] is errors[2] is None
    torch.testing.assert_close(guided[[0, 2]], expected, rtol=0, atol=1e-4)
    assert int(guided[1].argmax()) == END, "a failed row is made to end"


@pytest.mark.parametrize("name", NARROW)
def test_what_the_base_chose_behind_a_closed_gate_is_found_when_it_is_caught_up(
    runtime: GuidanceRuntime, device: torch.device, rng: random.Random, name: str
) -> None:
    prompts = random_prompts(rng, 2, shortest=5)
    rows = _begin(runtime, prompts, [{**GUIDANCES[name], "gate": {"entropy_above": 2.0}}] * 2)
    certain = padded_logits(2, device)
    certain[:, 7] = 60.0
    answers = [[rng.choice(BEYOND), 9, 10], [8, 9, 10]]
    for count, logits in enumerate((padded_logits(2, device), certain, certain, padded_logits(2, device))):
        for row, answer in zip(rows, answers, strict=True):
            row.output = answer[:count]
        runtime.step(logits, rows)
    errors = _finish(runtime, rows)
    assert "the token ids 0 to 319" in str(errors[0])
    assert errors[1] is None


@pytest.mark.parametrize("name", ["first", "every"])
def test_no_id_reaches_the_embedding_that_it_does_not_have(
    runtime: GuidanceRuntime, device: torch.device, rng: random.Random, name: str
) -> None:
    """Candidates and last tokens that the host does not check; on a GPU such an id would end the process."""
    model = runtime.reward_models[name]
    prompts = random_prompts(rng, 2, shortest=20)
    prefixes = [Prefix(("direct", n), prompt, []) for n, prompt in enumerate(prompts)]
    candidates = torch.randint(2, VOCABULARY, (2, 10), device=device)
    wild = candidates.clone()
    wild[0, 3], wild[1, 0] = PADDED - 1, 2**40
    with torch.inference_mode():
        expected, _ = model.score(prefixes, candidates, None)
        scored, _ = model.score(prefixes, wild, None)
        last = torch.tensor([prompts[0][-1], PADDED - 1], device=device)
        ended, _ = model.score(prefixes, candidates, None, last)
    same = candidates == wild
    torch.testing.assert_close(scored[same], expected[same], rtol=0, atol=1e-5)
    torch.testing.assert_close(ended[0], expected[0], rtol=0, atol=1e-5)
    assert bool(torch.isfinite(scored).all())
    for prefix in prefixes:
        model.release(prefix.key)


@pytest.mark.parametrize("name", ["first", "every"])
def test_texts_with_such_an_id_are_not_scored(runtime: GuidanceRuntime, rng: random.Random, name: str) -> None:
    prompt, answer = random_prompts(rng, 2, shortest=4)
    for spoilt in (
        ([*prompt, rng.choice(BEYOND), 5], answer),
        (prompt, [rng.choice(BEYOND), *answer]),
        (prompt, [5, 325]),
    ):
        with pytest.raises(Unscorable, match=rf"'{name}' reads the token ids 0 to 319, the text holds 32\d"):
            runtime.score_text(name, *spoilt)
        with pytest.raises(Unscorable, match=rf"'{name}' reads the token ids 0 to 319, the text holds 32\d"):
            runtime.score_answers(name, spoilt[0], [answer, spoilt[1]])


def test_generate_refuses_such_a_prompt_before_it_decodes_and_never_chooses_such_a_token(
    runtime: GuidanceRuntime, device: torch.device, rng: random.Random
) -> None:
    config = transformers.LlamaConfig(**{**COMMON, "vocab_size": PADDED})
    base: Any = randomise(AutoModelForCausalLM.from_config(config).float(), seed=rng.randrange(2**31), spread=0.12)
    base.to(device)
    prompt = random_prompts(rng, 1, shortest=6)[0]
    for guidance in (FIRST, MIXED):
        spoilt = torch.tensor([prompt, [*prompt[:-2], rng.choice(BEYOND), 7]], device=device)
        processor = GuidanceLogitsProcessor(base, runtime, guidance)
        with pytest.raises(
            GuidanceError, match=r"prompt: holds token 32\d, .* reads the ids 0 to 319; leave"
        ) as caught:
            base.generate(spoilt, max_new_tokens=4, do_sample=False, logits_processor=[processor])
        assert caught.value.field == "prompt"
        # The row without guidance may hold it.
        processor = GuidanceLogitsProcessor(base, runtime, [guidance, None])
        answers = base.generate(spoilt, max_new_tokens=8, do_sample=False, logits_processor=[processor])
        processor.finish(answers)
        assert int(answers[0].max()) < VOCABULARY


SAVED: dict[str, Callable[[Path, int], Path]] = {
    "reward": lambda folder, size: save_reward(folder, vocab_size=size),
    "aspects": lambda folder, size: save_aspects(folder, 3, {"wit": 0.5, "grace": 0.5}, vocab_size=size),
    "vocabulary": lambda folder, size: save_vocabulary_reward(folder, 4, vocab_size=size),
    "policy": lambda folder, size: save_base(folder, vocab_size=size),
    "adapter": lambda folder, size: save_adapter(folder, save_base(folder.parent / "base", vocab_size=size), seed=5),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_model_with_fewer_rows_than_the_tokenizer_has_ids_is_refused_before_its_weights_are_read(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = SAVED[kind](tmp_path / "small", VOCABULARY - 1)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights are read")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", never)
    with pytest.raises(ModelRefused) as refusal:
        _load(kind, folder, models)
    words = ("'small'", "319 token ids", "needs 320", "resize_token_embeddings(320)")
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("kind", SAVED)
def test_the_embedding_itself_is_counted_where_the_configuration_says_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = SAVED[kind](tmp_path / "small", VOCABULARY - 1)
    for module in ("policies", "reward_loading"):
        monkeypatch.setattr(f"steersman.guidance.{module}.declared_vocabulary", lambda _: None)
    with pytest.raises(ModelRefused, match="319 token ids, the base model's tokenizer needs 320"):
        _load(kind, folder, models)


@pytest.mark.parametrize("kind", SAVED)
def test_a_model_with_more_rows_is_served_and_describes_what_it_reads(models: Path, tmp_path: Path, kind: str) -> None:
    loaded = _load(kind, SAVED[kind](tmp_path / "small", PADDED), models, tmp_path / "base")
    assert loaded.describe()["vocabulary"] == loaded.vocabulary == PADDED


def test_a_model_that_reads_text_has_no_ids(models: Path) -> None:
    loaded = load_reward_model("text", str(models / "text"), AutoTokenizer.from_pretrained(models / "base"))
    assert loaded.describe()["vocabulary"] is loaded.vocabulary is None


def test_fewer_next_token_outputs_than_rows_count(rng: random.Random) -> None:
    model: Any = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**COMMON))
    model.lm_head = torch.nn.Linear(64, VOCABULARY - 3, bias=False)
    assert CausalModel(model, "cut", 2**20, 4, find_head(model)).vocabulary == VOCABULARY - 3


def test_ids_of_a_tokenizer_are_counted_with_their_gaps() -> None:
    words = WordLevel({"<pad>": 0, "<eos>": 1, "far": 40}, unk_token="<pad>")
    assert count_ids(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))) == 41
    assert count_ids(build_tokenizer()) == VOCABULARY


def _load(kind: str, folder: Path, models: Path, base: Path | None = None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    if kind in ("policy", "adapter"):
        return load_policy("small", str(folder), str(base or folder.parent / "base"), tokenizer, cache_bytes=2**22)
    return load_reward_model("small", str(folder), tokenizer, cache_bytes=2**22)


def _begin(runtime: GuidanceRuntime, prompts: list[list[int]], guidances: list[dict[str, Any]]) -> list[Row]:
    return [
        Row(n, runtime.start(("ids", n), plan_of(guidance), len(prompt)), prompt, [])
        for n, (prompt, guidance) in enumerate(zip(prompts, guidances, strict=True))
    ]


def _finish(runtime: GuidanceRuntime, rows: list[Row]) -> list[str | None]:
    reports = [runtime.finish(row.request.key, [*row.output, 5]) for row in rows]
    return [None if report is None else report.error for report in reports]
