"""Policies' cached logits are those of plain forwards, for every architecture, and adapters are the merged model's."""

import copy
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.guidance.auxiliary import CausalModel, Prefix
from steersman.guidance.cache import BLOCK_SIZE
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.policies import Policy, inspect_policy, is_adapter, load_policy
from steersman.guidance.readings import Readings
from steersman.guidance.rows import GuidedRequest, Row
from tests.support.oracle import plan_of
from tests.support.quantised import declare_gptq, save_int8
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


def test_a_policy_is_served_as_it_was_asked_for(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    policy = load_policy("p", str(models / "expert"), str(models / "base"), tokenizer, cache_bytes=2**22)
    assert policy.model.dtype == torch.float32
    assert (policy.kind, policy.describe()["kind"], policy.name) == ("policy", "policy", "p")
    half = load_policy(
        "p", str(models / "expert"), str(models / "base"), tokenizer, dtype=torch.bfloat16, cache_bytes=2**22
    )
    assert half.model.dtype == torch.bfloat16
    assert half.model.cache.keys[0].dtype == torch.bfloat16
    assert half.describe()["weight_bytes"] * 2 == policy.describe()["weight_bytes"]
    assert not any(parameter.requires_grad for parameter in policy.model.model.parameters())


def test_a_cache_has_256_mib_and_room_for_64_rows_unless_told_otherwise(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    policy = load_policy("p", str(models / "expert"), str(models / "base"), tokenizer)
    cache, block = policy.cache, policy.model.bytes_per_token * BLOCK_SIZE
    assert (cache.memory, len(cache.scratch)) == (256 * 2**20 // block * block, 64)
    assert len(Policy(policy.model.model, "p", 2**24).cache.scratch) == 64
    sized = load_policy("p", str(models / "expert"), str(models / "base"), tokenizer, cache_bytes=2**24, max_rows=9)
    assert (sized.cache.memory, len(sized.cache.scratch)) == (2**24 // block * block, 9)


def test_a_model_whose_cached_steps_are_off_is_not_served(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, step = AutoTokenizer.from_pretrained(models / "base"), CausalModel.step

    def wrong(*given: Any, **more: Any) -> torch.Tensor:
        outputs = step(*given, **more)
        return outputs + torch.randn_like(outputs)

    monkeypatch.setattr(CausalModel, "step", wrong)
    with pytest.raises(ModelRefused, match="cached outputs differ from plain forwards"):
        load_policy("p", str(models / "expert"), str(models / "base"), tokenizer, cache_bytes=2**22)


def test_an_adapter_that_spoils_the_bases_weights_is_refused(models: Path, tmp_path: Path) -> None:
    tokenizer, folder = AutoTokenizer.from_pretrained(models / "base"), copy_of(models / "adapter", tmp_path / "spoilt")
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelRefused, match="does not fit the base model: NaNs detected"):
        load_policy("p", str(folder), str(models / "base"), tokenizer, cache_bytes=2**22)


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_weights_that_are_missing_are_named(models: Path, tmp_path: Path) -> None:
    tokenizer, folder = AutoTokenizer.from_pretrained(models / "base"), copy_of(models / "expert", tmp_path / "holes")
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    dropped = sorted(name for name in weights if "mlp" in name)[:4]
    save_file({name: value for name, value in weights.items() if name not in dropped}, file, {"format": "pt"})
    with pytest.raises(ModelRefused, match=f"policy 'p': .* lacks the weights {', '.join(dropped[:3])}$"):
        load_policy("p", str(folder), str(models / "base"), tokenizer)


def test_no_code_of_a_checkpoint_is_run_unless_that_is_asked_for(models: Path, tmp_path: Path) -> None:
    tokenizer, folder = AutoTokenizer.from_pretrained(models / "base"), copy_of(models / "expert", tmp_path / "coded")
    edit_config(folder, model_type="coded", auto_map={"AutoConfig": "coded.CodedConfig"})
    ran = tmp_path / "ran"
    (folder / "coded.py").write_text(f"open({str(ran)!r}, 'w')\nraise ValueError('its code ran')\n")
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(ModelRefused, match="policy 'p'"):
            load_policy("p", str(folder), str(models / "base"), tokenizer, **options)
        assert not ran.exists()
    with pytest.raises(ModelRefused, match="its code ran"):
        load_policy("p", str(folder), str(models / "base"), tokenizer, trust_remote_code=True)


def test_an_adapter_without_peft_is_refused_with_what_to_install(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    with pytest.raises(ModelRefused, match=r"policy 'p': an adapter needs the package peft; .* pip install peft"):
        inspect_policy("p", str(models / "adapter"), str(models / "base"), tokenizer, False)
    inspect_policy("p", str(models / "expert"), str(models / "base"), tokenizer, False)


def test_an_adapter_over_a_quantised_base_is_refused_before_it_is_loaded(models: Path, tmp_path: Path) -> None:
    """Merged into rounded weights it would not be the policy that it is over the base."""
    tokenizer, base = AutoTokenizer.from_pretrained(models / "base"), save_int8(tmp_path / "base", models / "base")
    with pytest.raises(ModelRefused, match=r"policy 'p': .*adapter, .* is quantised \(compressed-tensors\).*merge it"):
        inspect_policy("p", str(models / "adapter"), str(base), tokenizer, False)


def test_what_a_quantised_policy_needs_is_named_where_it_is_not_installed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_gptq.is_optimum_available", lambda: False)
    folder = copy_of(models / "expert", tmp_path / "expert")
    declare_gptq(folder)
    with pytest.raises(ModelRefused, match=r"policy 'p': .* cannot be loaded: .*GPTQ.*requires"):
        load_policy("p", str(folder), str(models / "base"), AutoTokenizer.from_pretrained(models / "base"))


def test_a_tokenizer_that_an_adapter_brings_along_must_be_the_bases(models: Path, tmp_path: Path) -> None:
    tokenizer, folder = AutoTokenizer.from_pretrained(models / "base"), copy_of(models / "adapter", tmp_path / "own")
    assert is_adapter(str(folder))
    assert not is_adapter(str(models / "expert"))
    tokenizer.save_pretrained(folder)
    inspect_policy("p", str(folder), str(models / "base"), tokenizer, False)
    build_tokenizer(vocabulary=300).save_pretrained(folder)
    with pytest.raises(ModelRefused, match="another vocabulary than the base model"):
        inspect_policy("p", str(folder), str(models / "base"), tokenizer, False)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"vocab_size": VOCABULARY - 1}, "token ids"),
        ({"architectures": None}, "is a model without an architecture, not a causal language model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification, not a causal"),
        ({"architectures": ["GPT2LMHeadModel"]}, None),
        ({"model_type": "nothing of the kind"}, "cannot be read"),
    ],
)
def test_a_checkpoint_is_judged_before_its_weights_are_read(
    models: Path, tmp_path: Path, changes: dict[str, Any], complaint: str | None
) -> None:
    tokenizer, folder = AutoTokenizer.from_pretrained(models / "base"), copy_of(models / "expert", tmp_path / "other")
    edit_config(folder, **changes)
    if complaint is None:
        inspect_policy("p", str(folder), str(models / "base"), tokenizer, False)
        return
    with pytest.raises(ModelRefused, match=f"policy 'p': .*{complaint}"):
        inspect_policy("p", str(folder), str(models / "base"), tokenizer, False)


def test_a_tokenizer_that_cannot_be_read_is_named(models: Path, tmp_path: Path) -> None:
    tokenizer, folder = AutoTokenizer.from_pretrained(models / "base"), copy_of(models / "expert", tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{")
    with pytest.raises(ModelRefused, match=r"policy 'p': the tokenizer of .* cannot be read"):
        inspect_policy("p", str(folder), str(models / "base"), tokenizer, False)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelRefused, match=r"policy 'p': the tokenizer of .* cannot be read"):
        inspect_policy("p", str(folder), str(models / "base"), tokenizer, False)


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
