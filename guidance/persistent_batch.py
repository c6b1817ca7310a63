"""Steps of a batch whose rows stay the same and are guided by heads alone, on a CPU: one call of a kernel each.

Such a step is so short that a record for each row would cost as much as the guidance itself. What a step does is
recorded once for all rows, beside the steps before it; requests get their positions when anything else happens: a row
comes or goes, an answer is reported on, or a client masks tokens.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from steersman.guidance.report import ChosenStep, HeadStep, Position, VocabularyStep
from steersman.guidance.rows import LastTokens, Row, Steered, align_records
from steersman.guidance.work import Work
from steersman.kernels.arguments import HeadRows, Mixed, MixRows, Reranked
from steersman.kernels.dispatch import blend_by_head, choose_mixed, rerank_by_heads

STEPS = 32
"""Steps that lie together in memory, which is held until the last of their answers is reported on."""

_Step = HeadStep | ChosenStep | VocabularyStep


class Steps(Protocol):
    """Guides the rows of one batch by heads, step after step, and records what the steps do."""

    stage: str
    """What its time is counted as, see Work."""

    def write(self, logits: torch.Tensor, hidden: torch.Tensor, last: LastTokens) -> bool:
        """Guides the rows of logits [B, V] float32; hidden: [B, D]; last: the tokens that the step follows. Returns
        False where it cannot: then nothing is written and nothing recorded."""
        ...

    def take(self) -> list[_Step]:
        """Returns the steps since the last call, in their order; line n of each is row n of the batch."""
        ...


class PersistentBatch:
    """A batch of rows that the same heads guide in every step."""

    def __init__(self, steered: Sequence[Steered], steps: Steps, last: LastTokens) -> None:
        """last: the tokens that the first step follows."""
        self._steered = steered
        self._rows: list[Row] = [s.row for s in steered]
        self._steps = steps
        align_records(self._rows, last)
        self._lengths = self._count_tokens()

    def has_advanced(self) -> bool:
        """Whether each row has one token more than in the step before, or as many as it began with."""
        return self._count_tokens() == self._lengths

    def step(self, logits: torch.Tensor, hidden: torch.Tensor, last: LastTokens, work: Work) -> bool:
        """Guides the rows as Steps.write does; a step that was written is counted in `work`."""
        with work.timing(self._steps.stage):
            if not self._steps.write(logits, hidden, last):
                return False
            self._lengths = [length + 1 for length in self._lengths]
        work.steps += 1
        work.rows += len(self._rows)
        return True

    def flush_records(self) -> None:
        """Appends the positions of all steps since the last call to the requests."""
        steps = self._steps.take()
        for line, s in enumerate(self._steered):
            s.row.request.positions += [Position(step, line, s.formula) for step in steps]

    def _count_tokens(self) -> list[int]:
        return [len(row.output) for row in self._rows]


class HeadStepMemory:
    """Memory of steps whose candidates heads score, STEPS of them side by side."""

    def __init__(self) -> None:
        self._asked: HeadRows | None = None
        self._done: Reranked | None = None
        self._place = 0
        """The first step of `_done` that is free."""

    def next_step(self, asked: HeadRows) -> HeadStep:
        """Returns a step that nothing was written to yet, beside the last one where that was of the same rows."""
        if self._done is None or self._asked is not asked or self._place == STEPS:
            self._asked, self._done, self._place = asked, Reranked(STEPS, asked), 0
        self._place += 1
        return HeadStep(self._done, self._place - 1)


class CandidateSteps:
    """Rows whose candidates reward heads score."""

    stage = "rewards_seconds"

    def __init__(self, asked: HeadRows, fail: Callable[[HeadStep], None]) -> None:
        """fail: ends the guidance of the rows of a step whose scores are NaN; they were not written."""
        self._asked = asked
        self._fail = fail
        self._memory = HeadStepMemory()
        self._taken: list[HeadStep] = []

    def write(self, logits: torch.Tensor, hidden: torch.Tensor, last: LastTokens) -> bool:
        """Scores the candidates of every row and writes the rows; returns True. Rows without finite scores are failed,
        and the others written."""
        step = self._memory.next_step(self._asked)
        written = rerank_by_heads(logits, hidden, self._asked, step.done, step.place)
        self._taken.append(step)
        if not written:
            self._fail(step)
        return True

    def take(self) -> list[_Step]:
        """Returns the steps since the last call, which share memory with one another."""
        taken, self._taken = self._taken, []
        return [*taken]


class MixtureSteps:
    """Rows that a policy head is mixed into. What a step gave to a token is looked up when the token is known: in the
    next step, which may use the same memory then."""

    stage = "policies_seconds"

    def __init__(self, asked: MixRows, vocabulary: int) -> None:
        """vocabulary: width of the logits."""
        self._asked = asked
        self._vocabulary = vocabulary
        self._mixed: Mixed | None = None
        """Of the last step, whose tokens are not known yet."""
        self._memory: Mixed | None = None
        """What the next step may overwrite."""
        self._values: list[np.ndarray] = []
        """[STEPS, G, 4] each: ChosenStep.values of the steps before."""
        self._chosen = 0

    def write(self, logits: torch.Tensor, hidden: torch.Tensor, last: LastTokens) -> bool:
        """Looks up what the last step gave to its tokens, and mixes the policy into every row. Returns False where a
        row's features are not finite numbers; then nothing is written."""
        if self._mixed is not None:
            self._choose(self._mixed, last)
            self._memory, self._mixed = self._mixed, None
        if self._memory is None:
            self._memory = Mixed.empty(len(self._asked.rows), self._vocabulary)
        if not blend_by_head(logits, hidden, self._asked, self._memory):
            return False
        self._memory, self._mixed = None, self._memory
        return True

    def take(self) -> list[_Step]:
        """Returns the steps since the last call; that whose tokens are not known yet, if any, over the whole
        vocabulary."""
        values = [rows for block in self._values for rows in block][: self._chosen]
        taken: list[_Step] = [ChosenStep(torch.from_numpy(rows)) for rows in values]
        if (mixed := self._mixed) is not None:
            totals = (mixed.base_total, mixed.guided_total)
            taken.append(VocabularyStep(mixed.base, mixed.guided, *totals, mixed.changed, mixed.kept))
        self._values, self._chosen, self._mixed = [], 0, None
        return taken

    def _choose(self, mixed: Mixed, last: LastTokens) -> None:
        if self._chosen % STEPS == 0:
            self._values.append(np.empty((STEPS, len(self._asked.rows), 4), dtype=np.float32))
        choose_mixed(mixed, last.tokens, self._values[-1][self._chosen % STEPS])
        self._chosen += 1
