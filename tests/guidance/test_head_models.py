"""Whether a head fits the base that is served: its outputs on that base, against those that it was trained with."""

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.generate import prove_on
from steersman.guidance.head_files import POLICY, REWARD, HeadCheckpoint, read_head, save_head
from steersman.guidance.head_models import (
    LARGEST_DRIFT,
    NOTICEABLE,
    UNBOUNDED,
    HeadPolicy,
    HeadReward,
    ServedBase,
    read_head_checkpoint,
)
from tests.support.heads import random_checkpoint, random_head
from tests.support.oracle import plan_of
from tests.support.quantised import save_int8
from tests.support.tiny import VOCABULARY

MODELS = Path(__file__).parents[2] / "training" / "world" / "models"
SERVED = ServedBase(hidden_size=64, layers=2, vocabulary=VOCABULARY, window=256)


@pytest.fixture
def base(models: Path) -> PreTrainedModel:
    """A copy that a test may spoil."""
    return AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32).eval()


@pytest.fixture
def tokenizer(models: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(models / "base")


@pytest.fixture
def atop(models: Path) -> HeadReward:
    return HeadReward(read_head("reward model 'atop'", models / "atop", REWARD), "atop", "cpu", SERVED)


def round_weights(model: PreTrainedModel, bits: int, group: int = 32) -> None:
    """As a quantised checkpoint has them: symmetric, a scale for every `group` weights of the layers."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "layers" in name:
            parts = parameter.data.reshape(-1, group)
            scale = parts.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
            parameter.data = ((parts / scale).round() * scale).reshape(parameter.shape)


def test_on_its_own_base_a_head_does_not_drift(base: PreTrainedModel, atop: HeadReward) -> None:
    assert atop.drift is None
    assert "drift" not in atop.describe()
    drift = prove_on(base, atop)
    assert drift.share < 1e-5
    assert drift.spread > 0.1
    assert atop.drift == drift
    assert atop.describe()["drift"] == pytest.approx(drift.share, abs=1e-6)


def test_a_copy_in_bfloat16_drifts_hardly_and_silently(
    base: PreTrainedModel, atop: HeadReward, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert 1e-4 < prove_on(base.bfloat16(), atop).share < NOTICEABLE
    assert not caplog.records


def test_rounded_weights_drift_the_more_the_fewer_bits_they_have(base: PreTrainedModel, atop: HeadReward) -> None:
    drifts = []
    for bits in (8, 7, 6):
        model = AutoModelForCausalLM.from_pretrained(base.name_or_path, dtype=torch.float32).eval()
        round_weights(model, bits)
        drifts.append(prove_on(model, atop).share)
    assert 1e-4 < drifts[0] < drifts[1] < drifts[2]
    assert drifts[0] < NOTICEABLE


@pytest.mark.parametrize(("name", "family"), [("reward-head", HeadReward), ("dpo-head", HeadPolicy)])
def test_a_trained_head_tells_a_quantised_copy_of_its_base_from_a_fine_tuned_one(
    name: str, family: type[HeadReward] | type[HeadPolicy]
) -> None:
    checkpoint = read_head(name, MODELS / name, REWARD if family is HeadReward else POLICY)
    head = family(checkpoint, name, "cpu")
    base = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32).eval()
    assert prove_on(base, head).share < 1e-3
    round_weights(base, 4)
    head.proven_on = lambda: None
    assert 0.01 < prove_on(base, head).share < LARGEST_DRIFT
    with pytest.raises(ModelRefused, match="of another model, or of other weights"):
        prove_on(AutoModelForCausalLM.from_pretrained(MODELS / "dpo", dtype=torch.float32).eval(), head)


def test_a_drift_that_can_be_noticed_is_told_and_served(
    base: PreTrainedModel, atop: HeadReward, caplog: pytest.LogCaptureFixture
) -> None:
    _move_output(base, atop, (NOTICEABLE + LARGEST_DRIFT) / 2)
    with caplog.at_level(logging.WARNING):
        drift = prove_on(base, atop)
    assert NOTICEABLE < drift.share < LARGEST_DRIFT
    (record,) = caplog.records
    assert "reward model 'atop'" in record.message
    assert f"{drift.share:.2g}" in record.message


def _permute(model: PreTrainedModel) -> None:
    """The same hidden states in another order of channels."""
    order = torch.randperm(model.config.hidden_size)
    model.get_input_embeddings().weight.data = model.get_input_embeddings().weight.data[:, order]


def _shuffle_tokens(model: PreTrainedModel) -> None:
    """As a base whose token ids mean other tokens."""
    weight = model.get_input_embeddings().weight
    weight.data = weight.data[torch.randperm(len(weight))]


def _train_on(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data += 0.3 * parameter.data.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0.0


def _spoil(model: PreTrainedModel) -> None:
    model.get_input_embeddings().weight.data.fill_(torch.nan)


@pytest.mark.parametrize("change", [_permute, _shuffle_tokens, _train_on, _spoil])
def test_a_base_of_other_weights_is_refused_with_the_drift_and_the_way_out(
    base: PreTrainedModel, atop: HeadReward, rng: random.Random, change: Callable[[PreTrainedModel], None]
) -> None:
    with torch.no_grad():
        change(base)
    with pytest.raises(ModelRefused) as refused:
        prove_on(base, atop)
    message = str(refused.value)
    assert message.startswith("reward model 'atop': on this base model its outputs are off by ")
    assert "at most 0.2 is allowed" in message
    assert message.endswith("train it on this one")
    assert "\n" not in message


def test_too_coarse_a_quantisation_is_named_with_the_way_out(models: Path) -> None:
    served = replace(SERVED, quantization="awq")
    head = HeadReward(read_head("reward model 'atop'", models / "atop", REWARD), "atop", "cpu", served)
    head.prove(head.probe.hidden)
    with pytest.raises(ModelRefused) as refused:
        head.prove(head.probe.hidden.flip(0))
    message = str(refused.value)
    assert message.startswith("reward model 'atop': on this base model its outputs are off by ")
    assert "at most 0.2 is allowed" in message
    assert "quantisation (awq)" in message
    assert message.endswith("train it on this one, or serve a copy with more bits")


def test_a_quantised_transformers_model_is_compared_as_it_computes(
    models: Path, tmp_path: Path, atop: HeadReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_int8(tmp_path / "base", models / "base")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert 1e-4 < prove_on(base, atop).share < NOTICEABLE
    _shuffle_tokens(base)
    atop.proven_on = lambda: None
    with pytest.raises(ModelRefused, match=r"quantisation \(compressed-tensors\) is too coarse"):
        prove_on(base, atop)


def test_another_base_of_the_same_shape_is_refused(models: Path, atop: HeadReward) -> None:
    other = AutoModelForCausalLM.from_pretrained(models / "expert", dtype=torch.float32)
    with pytest.raises(ModelRefused, match="of another model, or of other weights"):
        prove_on(other, atop)


def test_rows_that_are_handed_over_in_another_order_are_refused(atop: HeadReward) -> None:
    atop.prove(atop.probe.hidden)
    with pytest.raises(ModelRefused):
        atop.prove(atop.probe.hidden.roll(1, dims=0))


def test_a_value_that_all_tokens_share_is_no_drift(rng: random.Random) -> None:
    """It cancels among the candidates."""
    checkpoint = random_checkpoint(rng, REWARD)
    head = checkpoint.head
    # The first channel of a hidden state reaches the first feature alone, and that one every token alike.
    head.inner.weight[1:, 0] = 0.0
    head.outer.weight[1:, 0] = 0.0
    head.tokens[:, 0] = 1.0
    moved = checkpoint.probe.hidden.clone()
    moved[:, 0] += 20.0
    model = HeadReward(checkpoint, "a", "cpu")
    features = [model.head.features(hidden)[:, 0] for hidden in (checkpoint.probe.hidden, moved)]
    assert not torch.allclose(*features)
    assert model.prove(moved).share < 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 128}, "hidden size 64, the served one has 128"),
        ({"layers": 3}, "layers 2, the served one has 3"),
        ({"vocabulary": VOCABULARY + 64}, f"vocabulary {VOCABULARY}, the served one has {VOCABULARY + 64}"),
        ({"window": 20}, "--max-model-len 21"),
    ],
)
def test_a_base_of_another_shape_is_refused_before_anything_is_computed(
    models: Path, tokenizer: PreTrainedTokenizerBase, change: dict[str, int], words: str
) -> None:
    label = "reward model 'atop'"
    read_head_checkpoint(label, models / "atop", REWARD, tokenizer, SERVED)
    with pytest.raises(ModelRefused) as refused:
        read_head_checkpoint(label, models / "atop", REWARD, tokenizer, replace(SERVED, **change))
    assert words in str(refused.value)
    assert str(refused.value).startswith(f"{label}: {models / 'atop'} ")
    assert "; " in str(refused.value)


def test_a_head_of_fewer_tokens_than_the_bases_tokenizer_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> None:
    save_head(tmp_path, random_checkpoint(rng, REWARD, VOCABULARY - 1))
    with pytest.raises(ModelRefused, match=f"{VOCABULARY - 1} token ids"):
        read_head_checkpoint("reward model 'a'", tmp_path, REWARD, tokenizer)


def test_a_transformers_model_of_another_shape_is_refused(atop: HeadReward, models: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(models / "other", dtype=torch.float32)
    with pytest.raises(ModelRefused, match="vocabulary"):
        prove_on(other, atop)


def test_a_model_is_compared_once_as_long_as_it_is_the_last(
    base: PreTrainedModel, atop: HeadReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven: list[int] = []
    prove = atop.prove
    monkeypatch.setattr(atop, "prove", lambda hidden: (proven.append(len(hidden)), prove(hidden))[1])
    twin = AutoModelForCausalLM.from_pretrained(base.name_or_path, dtype=torch.float32).eval()
    for model in (base, base, twin, twin, base):
        prove_on(model, atop)
    assert proven == [4, 4, 4]


@pytest.mark.parametrize(
    ("role", "kind", "parameters"), [(REWARD, HeadReward, "head"), (POLICY, HeadPolicy, "policy_head")]
)
def test_a_head_reads_nothing_and_keeps_nothing(
    rng: random.Random, role: str, kind: type[HeadReward], parameters: str
) -> None:
    head = random_head(rng, "a", role, 40)
    assert isinstance(head, kind)
    assert head.covers("anybody", 10_000)
    head.release("anybody", [1, 2], failed=True)
    assert list(head.capture()) == []
    formula = plan_of({"method": "pargs", "reward_model": "a"}).formula
    assert head.tokens_per_step(formula) == 0
    described = head.describe()
    assert described["kind"] == parameters
    assert (described["vocabulary"], described["window"], described["objective"]) == (40, UNBOUNDED, "head")
    assert described["weight_bytes"] == 4 * described["parameters"]


def test_a_served_heads_window_is_the_servers(models: Path) -> None:
    checkpoint: HeadCheckpoint = read_head("reward model 'atop'", models / "atop", REWARD)
    assert HeadReward(checkpoint, "atop", "cpu", SERVED).window == SERVED.window


def _move_output(model: PreTrainedModel, head: HeadReward, share: float) -> None:
    """Disturbs the last norm until the head's outputs are off by about `share` of their spread."""
    weight = model.base_model.norm.weight
    own, noise = weight.data.clone(), torch.randn_like(weight)
    low, high = 0.0, 4.0
    for _ in range(30):
        middle = (low + high) / 2
        weight.data = own + middle * noise
        with torch.inference_mode():
            ends = [model.base_model(torch.tensor([text])).last_hidden_state[0, -1] for text in head.probe.texts]
        trained, served = (head.head.every(head.head.features(h)) for h in (head.probe.hidden, torch.stack(ends)))
        moved = (served - trained).std(dim=-1, correction=0).square().mean().sqrt()
        found = float(moved / trained.var(dim=-1, correction=0).mean().sqrt())
        low, high = (middle, high) if found < share else (low, middle)
