"""Reward models: candidate scoring over a cached prefix (same tokenizer, causal) and scoring of text (any other)."""

import logging
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from steersman.guidance.auxiliary import (
    CausalModel,
    ModelRefused,
    Prefix,
    Unscorable,
    eager_attention,
    find_head,
    first_line,
    require_safetensors,
    verify,
)
from steersman.guidance.tokenizers import same_tokenizer, size_of

logger = logging.getLogger(__name__)


class RewardModel(Protocol):
    """Scores the k candidates of every row; rows are independent of each other."""

    name: str
    kind: str
    window: int

    def score(
        self, prefixes: Sequence[Prefix], candidates: torch.Tensor, end_token: int | None
    ) -> tuple[torch.Tensor, list[int]]:
        """candidates [G, k] int64 → rewards [G, k] float32 and, for each row, the prefix tokens read for the first
        time. With `end_token` each reward is read after the candidate and that token. A row for which there is no
        room raises Unscorable only when it is scored alone; beside others its rewards are NaN."""
        ...

    def score_text(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        """The reward after each token of `response`."""
        ...

    def score_answers(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> tuple[list[float], int]:
        """The reward at the end of each response, and the tokens read for all of them."""
        ...

    def release(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """Forgets a request; with `tokens` later requests that begin alike may reuse its cache, unless it failed."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for users: kind, window, cache size."""
        ...


class CausalReward:
    """A causal sequence classifier with the base's tokenizer: reads the new token and the candidates, once each."""

    kind = "causal"

    def __init__(self, model: torch.nn.Module, name: str, cache_bytes: int, max_rows: int = 64) -> None:
        self.name = name
        self.model = CausalModel(model, f"reward model {name!r}", cache_bytes, max_rows, find_head(model))
        self.window = self.model.window

        def evaluate(ids: torch.Tensor) -> torch.Tensor:
            ids = ids.to(self.model.device)
            with eager_attention(model):
                return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()

        with torch.inference_mode():
            verify(self.model, evaluate, model.config.get_text_config().vocab_size, candidates=3)

    def score(
        self, prefixes: Sequence[Prefix], candidates: torch.Tensor, end_token: int | None
    ) -> tuple[torch.Tensor, list[int]]:
        """See RewardModel.score."""
        read = self.model.catch_up(prefixes)
        device = self.model.device
        last = torch.tensor([[p.last] for p in prefixes], device=device)
        candidates = candidates.to(device)
        tokens = [last, candidates]
        if end_token is not None:
            tokens.append(torch.full_like(candidates, end_token))
        outputs = self.model.step(
            [p.key for p in prefixes], [len(p) for p in prefixes], torch.cat(tokens, dim=1), len(tokens) - 1
        )
        return outputs[..., 0], read

    @torch.inference_mode()
    def score_text(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        """See RewardModel.score_text."""
        return [float(r) for r in self.model.outputs([*prompt, *response])[len(prompt) :, 0]]

    @torch.inference_mode()
    def score_answers(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> tuple[list[float], int]:
        """See RewardModel.score_answers. What the responses share with each other and earlier ones is read once."""
        prefixes = [Prefix(object(), prompt, response) for response in responses]
        finite = False
        try:
            read = [self._read_prompt(prompt), *self.model.catch_up(prefixes)]
            last = torch.tensor([[p.last] for p in prefixes], device=self.model.device)
            outputs = self.model.step([p.key for p in prefixes], [len(p) for p in prefixes], last, branches=0)
            finite = bool(outputs.isfinite().all())
        finally:
            for prefix in prefixes:
                self.model.release(prefix.key, prefix.tokens(), failed=not finite)
        return outputs[:, 0, 0].tolist(), sum(read) + len(prefixes)

    def _read_prompt(self, prompt: Sequence[int]) -> int:
        """Leaves a prompt in the cache for those that begin with it; the tokens read."""
        key = object()
        read = self.model.prefill([(key, prompt)])[key]
        self.model.release(key, prompt)
        return read if isinstance(read, int) else 0

    def release(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """See RewardModel.release."""
        self.model.release(key, tokens, failed)

    def describe(self) -> dict[str, Any]:
        """See RewardModel.describe."""
        return {
            "name": self.name,
            "kind": self.kind,
            **self.model.describe(),
            **_training_facts(self.model.model.config),
        }


class TextReward:
    """Any sequence classifier, from text: candidates are decoded, encoded with its own tokenizer, and scored in one
    padded batch. Reads the whole text again for every candidate."""

    kind = "text"

    def __init__(
        self,
        model: torch.nn.Module,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        decode: Callable[[Sequence[int]], str],
        batch_tokens: int = 16384,
    ) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.decode = decode
        self.batch_tokens = batch_tokens
        limit = getattr(model.config, "max_position_embeddings", None) or 2**31
        self.window = int(min(limit, tokenizer.model_max_length))
        self.device = next(model.parameters()).device

    def score(
        self, prefixes: Sequence[Prefix], candidates: torch.Tensor, end_token: int | None
    ) -> tuple[torch.Tensor, list[int]]:
        """See RewardModel.score. `end_token` has no text; classifiers end every text with their own."""
        texts = [
            self.decode([*prefix.tokens(), candidate])
            for prefix, row in zip(prefixes, candidates.tolist(), strict=True)
            for candidate in row
        ]
        encoded = self.tokenizer(texts, add_special_tokens=True)["input_ids"]
        k = candidates.shape[1]
        sizes = [sum(map(len, encoded[g * k : (g + 1) * k])) for g in range(len(prefixes))]
        rewards = torch.full((len(texts),), torch.nan)
        fitting = [n for n, ids in enumerate(encoded) if 0 < len(ids) <= self.window]
        if len(prefixes) == 1 and not fitting:
            raise Unscorable(
                f"reward model {self.name!r} reads at most {self.window} tokens, the text has {len(encoded[0])}"
            )
        for part in _parts(fitting, encoded, self.batch_tokens):
            padded = self.tokenizer.pad({"input_ids": [encoded[n] for n in part]}, return_tensors="pt")
            rewards[part] = self.model(**padded.to(self.device)).logits[:, 0].float().cpu()
        return rewards.view(len(prefixes), k), sizes

    @torch.inference_mode()
    def score_text(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        """See RewardModel.score_text."""
        prefixes = [Prefix(n, prompt, response[:n]) for n in range(len(response))]
        scored, _ = self.score(prefixes, torch.tensor([[token] for token in response]), None)
        return [float(r) for r in scored[:, 0]]

    @torch.inference_mode()
    def score_answers(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> tuple[list[float], int]:
        """See RewardModel.score_answers."""
        prefixes = [Prefix(n, prompt, response[:-1]) for n, response in enumerate(responses)]
        scored, read = self.score(prefixes, torch.tensor([[response[-1]] for response in responses]), None)
        return scored[:, 0].tolist(), sum(read)

    def release(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """Nothing is kept between steps."""

    def describe(self) -> dict[str, Any]:
        """See RewardModel.describe."""
        return {"name": self.name, "kind": self.kind, "window": self.window, **_training_facts(self.model.config)}


def load_reward_model(
    name: str,
    path: str,
    base_tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache_bytes: int = 256 * 2**20,
    max_rows: int = 64,
    trust_remote_code: bool = False,
) -> RewardModel:
    """Loads a checkpoint from a folder or the hub and picks its path: causal when it shares the base's tokenizer.

    max_rows: rows that one forward is laid out for; more are scored in several.

    Raises ModelRefused with the reason and the way out. Only safetensors are read.
    """
    config, tokenizer, causal = inspect_checkpoint(name, path, base_tokenizer, trust_remote_code)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelRefused(f"reward model {name!r}: {path} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelRefused(f"reward model {name!r}: {path} lacks the weights {', '.join(missing[:3])}")
    model = model.to(device)
    if causal:
        return CausalReward(model, name, cache_bytes, max_rows)
    logger.warning(
        "reward model %r (%s) does not share the base model's tokenizer or is not causal: it is scored from text, "
        "which reads the whole answer again for every candidate and is much slower",
        name,
        config.model_type,
    )
    return TextReward(model, name, tokenizer, decode=_text_decoder(base_tokenizer))


def inspect_checkpoint(
    name: str, path: str, base_tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> tuple[Any, PreTrainedTokenizerBase, bool]:
    """Everything that can be said of a checkpoint without its weights: config, tokenizer, whether the causal path fits.

    Raises ModelRefused for what cannot be served.
    """
    require_safetensors(path, f"reward model {name!r}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelRefused(f"reward model {name!r}: {path} cannot be read: {first_line(error)}") from error
    _require_reward_head(name, path, config)
    shared = same_tokenizer(tokenizer, base_tokenizer)
    if declared_kind(config) == "reward" and not shared:
        raise ModelRefused(
            f"reward model {name!r}: {path} was trained on another tokenizer than the base model's "
            f"({size_of(tokenizer)} against {size_of(base_tokenizer)} tokens); train it from a checkpoint that has it"
        )
    return config, tokenizer, shared and _is_causal(config)


def declared_kind(config: Any) -> str | None:
    """The kind that steersman's trainers write into a checkpoint's config, if it is one of theirs."""
    return (getattr(config, "steersman", None) or {}).get("kind")


def _require_reward_head(name: str, path: str | Path, config: Any) -> None:
    architectures = getattr(config, "architectures", None) or []
    if not any("SequenceClassification" in architecture for architecture in architectures):
        raise ModelRefused(
            f"reward model {name!r}: {path} is a {', '.join(architectures) or 'model without an architecture'}, not a "
            "sequence classifier; a reward model has one score for a text (…ForSequenceClassification)"
        )
    if config.num_labels != 1:
        raise ModelRefused(f"reward model {name!r}: {path} has {config.num_labels} outputs; a reward model has one")


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    encoders = {"bert", "roberta", "xlm-roberta", "electra", "camembert", "bert-generation", "roformer", "rembert"}
    bidirectional = config.model_type in encoders or getattr(config, "is_encoder_decoder", False)
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not bidirectional


def _text_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode


def _parts(order: list[int], encoded: list[list[int]], budget: int) -> list[list[int]]:
    parts: list[list[int]] = []
    width = 0
    for n in sorted(order, key=lambda n: len(encoded[n])):
        width = max(width, len(encoded[n]))
        if parts and (len(parts[-1]) + 1) * width <= budget:
            parts[-1].append(n)
        else:
            parts.append([n])
            width = len(encoded[n])
    return parts


def _training_facts(config: Any) -> dict[str, Any]:
    objective = (getattr(config, "steersman", None) or {}).get("objective")
    return {} if objective is None else {"objective": objective}
