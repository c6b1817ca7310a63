"""Cached candidate scoring equals plain full forwards for every architecture that is served, and others are refused."""

import random
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from steersman.guidance.auxiliary import Prefix
from steersman.guidance.cached import make_ready
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.rewards import CausalReward
from tests.support.tiny import COMMON, VOCABULARY, randomise

_HEADS = {"head_dim": 32}
_WINDOW = {"sliding_window": 8}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": _HEADS,
    "Gemma2": {**_HEADS, **_WINDOW},
    "Gemma3Text": {**_HEADS, **_WINDOW},
    "Mistral": _WINDOW,
    "GPT2": _GPT,
    "GPTNeoX": {},
    "Phi": {},
    "Phi3": _WINDOW,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rewards_are_those_of_plain_forwards(name: str) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    plain, served = _plain(name, seed), CausalReward(_build(name, seed), name, cache_bytes=2**22)
    rows = [[rng.randrange(2, VOCABULARY) for _ in range(length)] for length in (1, 3, 40, 70)]
    rows.append(rows[2][:35] + rows[1])
    for _ in range(3):
        for end in (None, 1):
            candidates = torch.tensor([[rng.randrange(VOCABULARY) for _ in range(5)] for _ in rows])
            with torch.inference_mode():
                rewards, _ = served.score([Prefix(n, row, []) for n, row in enumerate(rows)], candidates, end)
                expected = _plain_rewards(plain, rows, candidates, end)
            torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=2e-5)
        for row in rows:
            row.append(rng.randrange(2, VOCABULARY))
    for n in range(len(rows)):
        served.release(n)
    assert served.describe()["cache_blocks_in_use"] == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_prefix_of_a_text_is_scored_as_by_plain_forwards(name: str) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    plain, served = _plain(name, seed), CausalReward(_build(name, seed), name, cache_bytes=2**22)
    prompt, response = ([rng.randrange(2, VOCABULARY) for _ in range(length)] for length in (7, 12))
    rewards = served.score_text(prompt, response)
    with torch.inference_mode():
        prefixes = [[*prompt, *response[:n]] for n in range(12)]
        expected = [
            float(_plain_rewards(plain, [p], torch.tensor([[v]]), None))
            for p, v in zip(prefixes, response, strict=True)
        ]
    assert rewards == pytest.approx(expected, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("GPTNeo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 2, "hidden_size": 64}),
        ("Mpt", {"d_model": 64, "n_layers": 2, "n_heads": 2}),
    ],
)
def test_architectures_that_would_be_scored_wrongly_are_refused(name: str, config: dict[str, Any]) -> None:
    model = AutoModelForSequenceClassification.from_config(
        getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, pad_token_id=0, num_labels=1, **config)
    )
    with pytest.raises(ModelRefused, match="cannot be read token by token"):
        CausalReward(model.float(), "odd", cache_bytes=2**22)


def test_a_model_whose_cached_rewards_are_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from steersman.guidance import attention

    honest = attention.attend_paged

    def careless(batch: Any, layer: int, *tensors: Any) -> torch.Tensor:
        return honest(batch, layer, *tensors) * (1.05 if layer == 1 else 1.0)

    monkeypatch.setattr(attention, "attend_paged", careless)
    with pytest.raises(ModelRefused, match="differ from plain forwards"):
        make_ready(CausalReward(_build("Llama", 0), "off", cache_bytes=2**22))


def _build(name: str, seed: int) -> Any:
    changes = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **changes, "num_labels": 1})
    return randomise(AutoModelForSequenceClassification.from_config(config).float().eval(), seed, spread=0.3)


def _plain(name: str, seed: int) -> Any:
    model = _build(name, seed)
    model.set_attn_implementation("eager")
    return model


def _plain_rewards(model: Any, rows: list[list[int]], candidates: torch.Tensor, end: int | None) -> torch.Tensor:
    suffix = [] if end is None else [end]
    rewards = []
    for row, wanted in zip(rows, candidates.tolist(), strict=True):
        ids = torch.tensor([[*row, v, *suffix] for v in wanted])
        hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        rewards.append(model.score(hidden[:, -1])[:, 0])
    return torch.stack(rewards)
