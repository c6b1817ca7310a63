"""Tiny models with random weights, made where they are needed: real architectures, a real tokenizer, no download."""

from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from steersman.guidance.head_files import HeadCheckpoint, Probe, base_facts, save_head
from steersman.guidance.heads import Head, HeadShape

VOCABULARY = 320
END = 1

Module = TypeVar("Module", bound=torch.nn.Module)

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"

_CORPUS = [
    "the quick brown fox jumps over the lazy dog and runs through the old town at night",
    "a kettle, a lamp and two chairs were sent to the wrong house on friday morning",
    'write {"name": "ada", "count": 12, "done": true} as json, please. user: assistant: hello',
]

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": END,
    "bos_token_id": None,
}


def build_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: `<pad>` = 0, `<eos>` = 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    missing = vocabulary - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<extra{n}>" for n in range(missing)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def save_base(folder: Path, seed: int = 0, kind: str = "Llama", **changes: Any) -> Path:
    """A causal language model whose next-token distribution is neither flat nor certain."""
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **changes})
    return _save(AutoModelForCausalLM.from_config(config), folder, seed, spread=0.12)


def save_reward(folder: Path, seed: int = 1, kind: str = "Llama", **changes: Any) -> Path:
    """A sequence classifier of any architecture whose rewards vary by about one between candidates."""
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **changes, "num_labels": 1})
    return _save(AutoModelForSequenceClassification.from_config(config), folder, seed, spread=0.3)


def save_vocabulary_reward(folder: Path, seed: int, **changes: Any) -> Path:
    """A reward model whose output for a token is that token's reward."""
    config = transformers.LlamaConfig(**{**COMMON, **changes}, steersman={"kind": "vocabulary"})
    return _save(AutoModelForCausalLM.from_config(config), folder, seed, spread=0.12)


def save_aspects(folder: Path, seed: int, weights: dict[str, float], **changes: Any) -> Path:
    """A reward model with an output for every aspect."""
    facts = {"kind": "aspects", "objective": "aspects", "aspects": list(weights), "weights": list(weights.values())}
    config = transformers.LlamaConfig(**{**COMMON, **changes}, num_labels=len(weights), steersman=facts)
    return _save(AutoModelForSequenceClassification.from_config(config), folder, seed, spread=0.3)


def save_random_head(folder: Path, base: Path, role: str, seed: int) -> Path:
    """A head on `base` of random weights, whose outputs vary by about one between tokens."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = model.config
    head = randomise(Head(HeadShape(config.hidden_size, 24, 12, config.vocab_size)), seed, spread=0.3)
    generator = torch.Generator().manual_seed(seed)
    head.bias.data = 0.3 * torch.randn(config.vocab_size, generator=generator)
    texts = [torch.randint(2, VOCABULARY - 8, (n,), generator=generator).tolist() for n in (3, 7, 12, 20)]
    with torch.no_grad():
        ends = [model.base_model(torch.tensor([text])).last_hidden_state[0, -1] for text in texts]
    folder.mkdir(parents=True)
    facts = base_facts(config, config.vocab_size)
    save_head(folder, HeadCheckpoint(head, role, facts, Probe(texts, torch.stack(ends)), {"objective": "head"}))
    return folder


def save_adapter(folder: Path, base: Path, seed: int) -> Path:
    """A LoRA adapter over `base` that changes its distributions by a nat or so."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
    adapted.save_pretrained(folder)
    return folder


def randomise(model: Module, seed: int, spread: float) -> Module:
    """Redraws every weight matrix from a normal distribution, so that no output is near constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def _save(model: Any, folder: Path, seed: int, spread: float) -> Path:
    randomise(model.float(), seed, spread).save_pretrained(folder)  # type: ignore[operator]
    build_tokenizer().save_pretrained(folder)
    return folder
