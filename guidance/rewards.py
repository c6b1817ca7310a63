"""Reward models: one protocol, and the two kinds that read over a cached prefix.

A causal reward model reads every candidate; one with a vocabulary head says the reward of every next token at once.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch

from steersman.guidance.aspects import describe_aspects
from steersman.guidance.auxiliary import CausalModel, Prefix
from steersman.guidance.cached import CachedModel, NextTokenModel
from steersman.guidance.checkpoints import find_head, training_facts
from steersman.guidance.graphs import CANDIDATES
from steersman.guidance.plan import Formula
from steersman.guidance.text_form import Source
from steersman.guidance.verification import verify

_TEXT_CHUNK = 64
"""Positions whose rewards over a whole vocabulary are held at once."""


class RewardModel(Protocol):
    """Scores the k candidates of every row; rows are independent of each other."""

    name: str
    kind: str
    window: int

    @property
    def vocabulary(self) -> int | None:
        """Token ids below this number can be read; None where the model reads text."""
        ...

    def score(
        self,
        prefixes: Sequence[Prefix],
        candidates: torch.Tensor,
        end_token: int | None,
        last: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """candidates [G, k] int64 → rewards [G, k] float32 and, for each row, the prefix tokens read for the first
        time. With `end_token` each reward is read after the candidate and that token. `last` [G] int64 are the
        prefixes' last tokens, where the device knows them before the host. A row for which there is no room raises
        Unscorable only when it is scored alone; beside others its rewards are NaN. Rewards of candidates that the
        model cannot read mean nothing."""
        ...

    def covers(self, key: Hashable, length: int) -> bool:
        """Whether scoring needs none of the first `length` tokens of a request from the host."""
        ...

    def tokens_per_step(self, formula: Formula) -> int:
        """Tokens read for one generated token; 0 where every step reads another number."""
        ...

    def score_text(
        self, prompt: Sequence[int], response: Sequence[int], start: int = 0, source: Source | None = None
    ) -> list[float]:
        """The reward after each token of `response` from index `start` on. `source` is what the prompt was made of,
        for a model that reads text."""
        ...

    def score_answers(
        self, prompt: Sequence[int], responses: Sequence[Sequence[int]], source: Source | None = None
    ) -> tuple[list[float], int]:
        """The reward at the end of each response, and the tokens read for all of them; `source` as above."""
        ...

    def release(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """Forgets a request; with `tokens` later requests that begin alike may reuse its cache, unless it failed."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for users: kind, vocabulary, window, cache size."""
        ...

    def check(self) -> None:
        """Raises ModelRefused where it would be served wrongly."""
        ...

    def warm_up(self) -> None:
        """Compiles on a GPU what `capture` would otherwise have to."""
        ...

    def capture(self) -> Iterator[None]:
        """Makes CUDA graphs of its step, one a turn; between turns the device may do other work."""
        ...


class _CachedReward(CachedModel):
    """What the two kinds share."""

    def describe(self) -> dict[str, Any]:
        """See RewardModel.describe."""
        config = self.model.model.config
        return {**super().describe(), **training_facts(config), **describe_aspects(config)}

    def _read_answers(self, prompt: Sequence[int], prefixes: Sequence[Prefix]) -> tuple[torch.Tensor, int]:
        """Outputs [G, C] at the end of each, and the tokens read. What the prefixes share with each other and earlier
        ones is read once."""
        finite = False
        try:
            shared = self._read_prompt(prompt) if len(prefixes) > 1 else 0
            outputs, read = self.model.read(prefixes)
            finite = bool(outputs.isfinite().all())
        finally:
            for prefix in prefixes:
                self.release(prefix.key, prefix.tokens(), failed=not finite)
        return outputs, shared + sum(read) + len(prefixes)

    def _read_prompt(self, prompt: Sequence[int]) -> int:
        """Leaves a prompt in the cache for those that begin with it; the tokens read."""
        key = object()
        read = self.model.prefill([(key, prompt)])[key]
        # What was read is not checked yet, as outputs are: blocks of numbers that are not finite are not left behind.
        self.release(key, failed=True)
        return read if isinstance(read, int) else 0


class CausalReward(_CachedReward):
    """A causal sequence classifier with the base's tokenizer: reads the new token and the candidates, once each."""

    kind = "causal"

    def __init__(self, model: Any, name: str, cache_bytes: int, max_rows: int = 64) -> None:
        label = f"reward model {name!r}"
        super().__init__(CausalModel(model, label, cache_bytes, max_rows, find_head(model), CANDIDATES), name)

    @torch.inference_mode()
    def check(self) -> None:
        """See RewardModel.check."""
        verify(self.model, self.vocabulary, branching=True)

    def tokens_per_step(self, formula: Formula) -> int:
        """See RewardModel.tokens_per_step."""
        return formula.tokens_per_step

    def score(
        self,
        prefixes: Sequence[Prefix],
        candidates: torch.Tensor,
        end_token: int | None,
        last: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """See RewardModel.score."""
        read = self.model.catch_up(prefixes)
        candidates = candidates.to(self.model.device)
        tokens = [self.model.last_tokens(prefixes, last), candidates]
        if end_token is not None:
            tokens.append(torch.full_like(candidates, end_token))
        outputs = self.model.step(
            [p.key for p in prefixes], [len(p) for p in prefixes], torch.cat(tokens, dim=1), len(tokens) - 1
        )
        return outputs[..., 0], read

    @torch.inference_mode()
    def score_text(
        self, prompt: Sequence[int], response: Sequence[int], start: int = 0, source: Source | None = None
    ) -> list[float]:
        """See RewardModel.score_text."""
        hidden = self.model.read_text([*prompt, *response])
        return [float(r) for r in self.model.head(hidden[len(prompt) + start :]).float()[:, 0]]

    @torch.inference_mode()
    def score_answers(
        self, prompt: Sequence[int], responses: Sequence[Sequence[int]], source: Source | None = None
    ) -> tuple[list[float], int]:
        """See RewardModel.score_answers."""
        outputs, read = self._read_answers(prompt, [Prefix(object(), prompt, response) for response in responses])
        return outputs[:, 0].tolist(), read


class VocabularyReward(_CachedReward, NextTokenModel):
    """A causal language model whose logits are the rewards of every next token: reads the new token only.

    The reward of v behind s is its logit of v after s; what follows v is not read, so there is no reward behind an
    end token of its own.
    """

    kind = "vocabulary"

    def __init__(self, model: Any, name: str, cache_bytes: int, max_rows: int = 64) -> None:
        label = f"reward model {name!r}"
        NextTokenModel.__init__(self, model, label, name, cache_bytes, max_rows, every_token=False)

    def tokens_per_step(self, formula: Formula) -> int:
        """See RewardModel.tokens_per_step."""
        return 1

    def score(
        self,
        prefixes: Sequence[Prefix],
        candidates: torch.Tensor,
        end_token: int | None,
        last: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """See RewardModel.score; there is no end token behind a candidate."""
        hidden, read = self.read(prefixes, last)
        return self._rewards(hidden, candidates.to(hidden.device).clamp(max=self.vocabulary - 1)), read

    @torch.inference_mode()
    def score_text(
        self, prompt: Sequence[int], response: Sequence[int], start: int = 0, source: Source | None = None
    ) -> list[float]:
        """See RewardModel.score_text."""
        before = self.model.read_text([*prompt, *response])[len(prompt) + start - 1 : -1]
        tokens = torch.tensor(response[start:], device=before.device).unsqueeze(-1)
        parts = zip(before.split(_TEXT_CHUNK), tokens.split(_TEXT_CHUNK), strict=True)
        return [float(r) for hidden, token in parts for r in self._rewards(hidden, token)[:, 0]]

    @torch.inference_mode()
    def score_answers(
        self, prompt: Sequence[int], responses: Sequence[Sequence[int]], source: Source | None = None
    ) -> tuple[list[float], int]:
        """See RewardModel.score_answers."""
        last = [response[-1] for response in responses]
        self.model.require_readable(last)
        outputs, read = self._read_answers(prompt, [Prefix(object(), prompt, response[:-1]) for response in responses])
        tokens = torch.tensor(last, device=outputs.device).unsqueeze(-1)
        return self._rewards(outputs, tokens)[:, 0].tolist(), read

    def _rewards(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of tokens [G, k] behind the hidden states [G, D]: [G, k] float32."""
        assert self.layer is not None
        return self.layer.at(hidden, tokens)
