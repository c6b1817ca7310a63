"""Scoring of text: any sequence classifier, with whatever tokenizer it has."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from steersman.guidance.auxiliary import Prefix, Unscorable
from steersman.guidance.checkpoints import training_facts
from steersman.guidance.plan import Formula


class TextReward:
    """Any sequence classifier, from text: candidates are decoded, encoded with its own tokenizer, and scored in one
    padded batch. Reads the whole text again for every candidate."""

    kind = "text"
    vocabulary = None

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
        self,
        prefixes: Sequence[Prefix],
        candidates: torch.Tensor,
        end_token: int | None,
        last: torch.Tensor | None = None,
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

    def covers(self, key: Hashable, length: int) -> bool:
        """Never: every step reads the whole text."""
        return False

    def tokens_per_step(self, formula: Formula) -> int:
        """See RewardModel.tokens_per_step."""
        return 0

    def release(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """Nothing is kept between steps."""

    def check(self) -> None:
        """Nothing is cached that could be wrong."""

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def capture(self) -> Iterator[None]:
        """Nothing is captured."""
        return iter(())

    def describe(self) -> dict[str, Any]:
        """See RewardModel.describe."""
        facts = {"name": self.name, "kind": self.kind, "vocabulary": self.vocabulary, "window": self.window}
        return {**facts, **training_facts(self.model.config)}


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
