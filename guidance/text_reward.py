"""Scoring of text: any sequence classifier, with whatever tokenizer it has."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steersman.guidance.auxiliary import Prefix, TextTooLong, TextUnreadable
from steersman.guidance.checkpoints import training_facts
from steersman.guidance.plan import Formula
from steersman.guidance.text_form import Source, TextForm

_CONTEXT = 8
"""Prompt tokens that an answer is decoded behind: a tokenizer may write a word differently at the start of a text."""


class TextReward:
    """Any sequence classifier, from text: each candidate's answer is decoded, written behind the conversation in the
    model's own form, encoded with its own tokenizer, and scored in one padded batch. Reads the whole text again for
    every candidate."""

    kind = "text"
    vocabulary = None

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        form: TextForm,
        decode: Callable[[Sequence[int]], str],
        batch_tokens: int = 16384,
    ) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.form = form
        self.decode = decode
        self.batch_tokens = batch_tokens
        if model.config.pad_token_id is None:
            # A causal classifier finds the last token by it.
            model.config.pad_token_id = tokenizer.pad_token_id
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
        """See RewardModel.score. `end_token` has no text; classifiers end every text with their own.

        Raises TextTooLong and TextUnreadable where one of the texts is so: without it a row's candidates could not be
        compared.
        """
        encoded = [
            self._encode(prefix, [*prefix.output, candidate])
            for prefix, row in zip(prefixes, candidates.tolist(), strict=True)
            for candidate in row
        ]
        lengths = [len(entry["input_ids"]) for entry in encoded]
        k = candidates.shape[1]
        sizes = [sum(lengths[g * k : (g + 1) * k]) for g in range(len(prefixes))]
        if (longest := max(lengths)) > self.window:
            raise TextTooLong(f"reward model {self.name!r} reads at most {self.window} tokens, the text has {longest}")
        if not min(lengths):
            raise TextUnreadable(f"reward model {self.name!r} needs at least one token, the text has none")
        rewards = torch.empty(len(encoded))
        # Without a padding token each text is a batch of its own.
        budget = self.batch_tokens if self.tokenizer.pad_token_id is not None else 0
        for part in _parts(lengths, budget):
            padded = self._pad([encoded[n] for n in part])
            rewards[part] = self.model(**padded).logits[:, 0].float().cpu()
        return rewards.view(len(prefixes), k), sizes

    def measure(self, prompt: Sequence[int], source: Source | None) -> int:
        """Tokens of a prompt in the model's form, in front of an answer; raises TextUnreadable where it has none."""
        return len(self._encode(Prefix(None, prompt, (), source), ())["input_ids"])

    def _encode(self, prefix: Prefix, output: Sequence[int]) -> Any:
        source = prefix.source
        context = prefix.prompt if source is None else prefix.prompt[-_CONTEXT:]
        text = self.decode([*context, *output])
        # A prompt of token ids may end within a character.
        prompt = _shared_start(self.decode(context), text)
        try:
            return self.tokenizer(**self.form.write(self.tokenizer, source, prompt, text[len(prompt) :]))
        except ValueError as error:
            raise TextUnreadable(f"reward model {self.name!r}: {error}") from error

    def _score_all(self, prefixes: Sequence[Prefix], last: Sequence[int]) -> tuple[list[float], int]:
        """The reward of each prefix with its last token, and the tokens read."""
        scored, read = self.score(prefixes, torch.tensor(last).unsqueeze(-1), None)
        return scored[:, 0].tolist(), sum(read)

    def _pad(self, entries: list[Any]) -> Any:
        return self.tokenizer.pad(entries, padding=len(entries) > 1, return_tensors="pt").to(self.device)

    @torch.inference_mode()
    def score_text(
        self, prompt: Sequence[int], response: Sequence[int], start: int = 0, source: Source | None = None
    ) -> list[float]:
        """See RewardModel.score_text."""
        prefixes = [Prefix(n, prompt, response[:n], source) for n in range(start, len(response))]
        return self._score_all(prefixes, response[start:])[0]

    @torch.inference_mode()
    def score_answers(
        self, prompt: Sequence[int], responses: Sequence[Sequence[int]], source: Source | None = None
    ) -> tuple[list[float], int]:
        """See RewardModel.score_answers."""
        prefixes = [Prefix(n, prompt, response[:-1], source) for n, response in enumerate(responses)]
        return self._score_all(prefixes, [response[-1] for response in responses])

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
        facts |= {"form": self.form.kind, "chats": self.form.chat}
        return {**facts, **training_facts(self.model.config)}


def _shared_start(one: str, other: str) -> str:
    if other.startswith(one):
        return one
    return one[: next(n for n, (a, b) in enumerate(zip(one, f"{other}\0", strict=False)) if a != b)]


def _parts(lengths: list[int], budget: int) -> list[list[int]]:
    parts: list[list[int]] = []
    width = 0
    for n in sorted(range(len(lengths)), key=lengths.__getitem__):
        width = max(width, lengths[n])
        if parts and (len(parts[-1]) + 1) * width <= budget:
            parts[-1].append(n)
        else:
            parts.append([n])
            width = lengths[n]
    return parts
