"""Policies' cached logits are those of plain forwards, for every architecture, and adapters are the merged model's."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.guidance.auxiliary import Prefix
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.policies import Policy, load_policy
from steersman.guidance.readings import Readings
from steersman.guidance.rows import GuidedRequest, Row
from tests.support.oracle import plan_of
from tests.support.random_input import random_prompts
from tests.support.tiny import COMMON, VOCABULARY, build_tokenizer, randomise, save_adapter, save_base

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Mistral": {"sliding_window": 24},
    "Gemma2": {"head_dim": 32, "sliding_window": 24, "final_logit_softcapping": 5.0},
    "Gemma3Text": {"head_dim": 32, "sliding_window": 24},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
    "GPTNeoX": {**SMALL, "intermediate_size": 96},
    "Phi": {**SMALL, "intermediate_size": 96},
    "Phi3": {"pad_token_id": 0},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_plain_forwards_token_after_token(name: str, rng: random.Random) -> None:
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **ARCHITECTURES[name]})
    model: Any = randomise(AutoModelForCausalLM.from_config(config).float(), seed=rng.randrange(2**31), spread=0.1)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").float().eval()
    plain.load_state_dict(model.state_dict())
    policy = Policy(model, "probed", cache_bytes=2**22)
    prompts = random_prompts(rng, 4, shortest=2, longest=60)
    outputs: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        for _ in range(5):
            logits, _ = policy.read([Prefix(n, p, o) for n, (p, o) in enumerate(zip(prompts, outputs, strict=True))])
            for n, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
                expected = plain(input_ids=torch.tensor([[*prompt, *output]])).logits[0, -1]
                torch.testing.assert_close(logits[n], expected, rtol=1e-4, atol=2e-4)
                output.append(rng.randrange(2, VOCABULARY))


def test_an_adapter_is_the_merged_model(models: Path, rng: random.Random) -> None:
    import peft

    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    policy = load_policy("lora", str(models / "adapter"), str(models / "base"), tokenizer, cache_bytes=2**22)
    base = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, models / "adapter").eval()
    prompt = random_prompts(rng, 1, shortest=20)[0]
    with torch.inference_mode():
        logits, read = policy.read([Prefix("a", prompt, [])])
        expected = adapted(input_ids=torch.tensor([prompt])).logits[0, -1]
        with adapted.disable_adapter():
            without = adapted(input_ids=torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
    assert float((expected - without).abs().max()) > 0.1, "the adapter changes something"
    assert read == [len(prompt) - 1]


@pytest.mark.parametrize("width", [VOCABULARY - 8, VOCABULARY, VOCABULARY + 24])
def test_vocabularies_padded_differently_are_brought_to_the_bases_width(width: int) -> None:
    readings = Readings(VOCABULARY)
    request = GuidedRequest("r", plan_of({"method": "mixed", "policy": "p", "mix": 1.0}), 1)
    rows = [Row(n, request, [5], []) for n in (4, 1, 3)]
    logits = torch.randn(3, width)
    readings.add("p", rows[:2], logits[:2])
    readings.add("p", rows[2:], logits[2:])
    gathered = readings.gather("p", [rows[2], rows[0]])
    common = min(width, VOCABULARY)
    assert gathered.shape == (2, VOCABULARY)
    assert torch.equal(gathered[:, :common], logits[[2, 0], :common])
    assert bool((gathered[:, common:] == -torch.inf).all())
    assert not readings.has("p", Row(7, request, [5], []))


def test_what_cannot_be_combined_is_refused_with_the_way_out(models: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    save_base(tmp_path / "foreign", seed=3)
    build_tokenizer(vocabulary=300).save_pretrained(tmp_path / "foreign")
    wide = save_base(tmp_path / "wide", seed=4, hidden_size=96)
    save_adapter(tmp_path / "misfit", wide, seed=5)
    for path, words in (
        (tmp_path / "foreign", ("another vocabulary", "300", str(VOCABULARY), "family")),
        (models / "first", ("ForSequenceClassification", "ForCausalLM")),
        (tmp_path / "misfit", ("adapter", "does not fit")),
        (tmp_path / "absent", ("does not exist",)),
    ):
        with pytest.raises(ModelRefused) as refusal:
            load_policy("p", str(path), str(models / "base"), tokenizer)
        assert all(word in str(refusal.value) for word in ("policy 'p'", *words)), refusal.value
