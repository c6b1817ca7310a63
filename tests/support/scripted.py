"""Auxiliary models that return what a test gives them: a runtime over them steps in a millisecond."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from steersman.guidance.auxiliary import Prefix
from steersman.guidance.plan import Formula
from steersman.guidance.rewards import VocabularyReward
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from tests.support.oracle import plan_of

Outputs = torch.Tensor | Callable[[list[int]], torch.Tensor]
"""[V] for every prefix, or a function of its tokens."""
END = 1


class _Scripted:
    kind = "policy"
    window = 10_000
    layer = None

    def __init__(self, name: str, outputs: Outputs) -> None:
        self.name = name
        self.outputs = outputs
        self.released: list[tuple[Hashable, Any]] = []

    @property
    def vocabulary(self) -> int:
        return len(self._of(Prefix(None, [0], [])))

    def covers(self, key: Hashable, length: int) -> bool:
        return True

    def release(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        self.released.append((key, tokens))

    def read(self, prefixes: Sequence[Prefix], last: Any = None) -> tuple[torch.Tensor, list[int]]:
        """last: [G], known to the device before the host, as a prefix may end in a token that stands for it."""
        known = [None] * len(prefixes) if last is None else last.tolist()
        return torch.stack(list(map(self._of, prefixes, known))), [0] * len(prefixes)

    def _of(self, prefix: Prefix, last: int | None = None) -> torch.Tensor:
        if isinstance(self.outputs, torch.Tensor):
            return self.outputs
        tokens = prefix.tokens()
        return self.outputs(tokens if last is None else [*tokens[:-1], last])


class ScriptedPolicy(_Scripted):
    """Logits of the next token."""


class ScriptedReward(_Scripted):
    """Reads every candidate."""

    kind = "causal"

    def score(
        self, prefixes: Sequence[Prefix], candidates: torch.Tensor, end_token: int | None, last: Any = None
    ) -> tuple[torch.Tensor, list[int]]:
        rewards, read = self.read(prefixes)
        return rewards.gather(1, candidates.clamp(max=rewards.shape[1] - 1)), read

    def tokens_per_step(self, formula: Formula) -> int:
        return formula.tokens_per_step


class ScriptedVocabularyReward(_Scripted, VocabularyReward):
    """Has a vocabulary head."""

    kind = "vocabulary"


def scripted_runtime(
    rewards: dict[str, Outputs] | None = None,
    policies: dict[str, Outputs] | None = None,
    heads: dict[str, Outputs] | None = None,
) -> GuidanceRuntime:
    """heads: rewards with a vocabulary head."""
    reward_models: dict[str, Any] = {name: ScriptedReward(name, given) for name, given in (rewards or {}).items()}
    reward_models |= {name: ScriptedVocabularyReward(name, given) for name, given in (heads or {}).items()}
    loaded: dict[str, Any] = {name: ScriptedPolicy(name, given) for name, given in (policies or {}).items()}
    return GuidanceRuntime(reward_models, END, loaded)


def begin_rows(runtime: GuidanceRuntime, guidances: Sequence[dict[str, Any]]) -> list[Row]:
    """New requests of one prompt token each: row n has the token n."""
    return [Row(n, runtime.start(n, plan_of(guidance), 1), [n], []) for n, guidance in enumerate(guidances)]
