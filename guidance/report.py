"""What guidance did to one answer: the numbers that every guided response carries."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from steersman.guidance.plan import Formula, Plan, RewardTerm, Transform
from steersman.guidance.transfer import to_device
from steersman.guidance.work import Fault, Misfit
from steersman.kernels.arguments import Reranked
from steersman.kernels.dispatch import has_kernels

_BASE = Formula()
_SUMMED = (
    *("guided_tokens", "interventions", "kl", "kl_truncation", "kl_steering", "reward_model_tokens", "policy_tokens"),
    *("saved_reward_model_tokens", "saved_policy_tokens", "switches"),
)
BASE_SOURCE, GUIDED_SOURCE, MIXTURE_SOURCE = "base", "guided", "mixture"
"""Names of distributions that a token is sampled from, beside the policies' own."""
TRACED = 5
"""Candidates that a trace shows where the whole vocabulary is the support."""


@dataclass(frozen=True)
class CandidateStep:
    """One step over the base's top k, shared by all of its rows."""

    ids: torch.Tensor
    """[G, k] int64."""
    base_logprobs: torch.Tensor
    """[G, k] float32, normalised over the tokens that no grammar or ban masks; -inf where a candidate is masked."""
    scores: torch.Tensor
    """[G, k] float32: log π up to a constant."""
    rewards: torch.Tensor
    """[G, terms, k] float32, as the reward models gave them."""

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first three on a CPU: numpy takes a row out in a tenth of torch's time, and there are as many as
        tokens."""
        return self.ids.numpy(), self.base_logprobs.numpy(), self.scores.numpy()


@dataclass(frozen=True, slots=True)
class HeadStep:
    """What CandidateStep is, of a step that heads alone have scored on a CPU: one of several that lie together, so that
    a report takes a slice of them."""

    done: Reranked
    place: int
    """Of the step in `done`."""

    @property
    def ids(self) -> torch.Tensor:
        """[G, k] int64, as CandidateStep.ids."""
        return torch.from_numpy(self.done.ids[self.place])

    @property
    def scores(self) -> torch.Tensor:
        """[G, k] float32, as CandidateStep.scores."""
        return torch.from_numpy(self.done.scores[self.place])

    @property
    def rewards(self) -> torch.Tensor:
        """[G, terms, k] float32, as CandidateStep.rewards."""
        return torch.from_numpy(self.done.rewards[self.place])

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, log-probabilities and scores, as CandidateStep.arrays."""
        return self.done.ids[self.place], self.done.logprobs[self.place], self.done.scores[self.place]


@dataclass(frozen=True, slots=True)
class VocabularyStep:
    """One step over the whole vocabulary, shared by all of its rows; kept only until the next tokens are known."""

    base: torch.Tensor
    """[G, V] float32 logits."""
    guided: torch.Tensor
    """[G, V] float32 logits."""
    base_total: torch.Tensor
    """[G] log-sum-exp of the base's logits."""
    guided_total: torch.Tensor
    changed: torch.Tensor
    """[G] bool: whether the most likely token is another one than the base's."""
    opened: torch.Tensor
    """[G] bool: whether the position's formula was decoded, and not what stands behind its gate."""
    rewards: torch.Tensor | None = None
    """[G, terms, V] float32, as the reward models gave them; None without rewards."""

    def choose(self, lines: Sequence[int], tokens: torch.Tensor) -> "ChosenStep":
        """What became of `lines` now that their tokens [len(lines)] int64 are known; asks the device for nothing."""
        if self.rewards is None and not has_kernels(self.base.device):
            return ChosenStep(self._look_up(np.asarray(lines), tokens.numpy()))
        parts = [self.base, self.guided, self.base_total, self.guided_total, self.changed, self.opened]
        if list(lines) != list(range(len(self.base))):
            line = to_device(lines, self.base.device)
            parts = [part[line] for part in parts]
        base, guided, base_total, guided_total, changed, opened = parts
        token = tokens.unsqueeze(-1)
        rewards = None
        if self.rewards is not None:
            rewards = self.rewards[to_device(lines, self.base.device), :, tokens]
        logprobs = guided.gather(1, token).squeeze(-1) - guided_total
        base_logprobs = base.gather(1, token).squeeze(-1) - base_total
        return ChosenStep(torch.stack((logprobs, base_logprobs, changed.float(), opened.float()), dim=-1), rewards)

    def _look_up(self, lines: np.ndarray, tokens: np.ndarray) -> torch.Tensor:
        """ChosenStep.values, by fewer calls than torch's."""
        values = np.empty((len(lines), 4), dtype=np.float32)
        values[:, 0] = self.guided.numpy()[lines, tokens] - self.guided_total.numpy()[lines]
        values[:, 1] = self.base.numpy()[lines, tokens] - self.base_total.numpy()[lines]
        values[:, 2], values[:, 3] = self.changed.numpy()[lines], self.opened.numpy()[lines]
        return torch.from_numpy(values)

    def trace(self, line: int, terms: Sequence[RewardTerm]) -> list[dict[str, Any]]:
        """The most likely tokens of a line, whose formula has the reward `terms`, best first."""
        best = self.guided[line].topk(min(TRACED, self.guided.shape[-1]))
        base = self.base[line, best.indices] - self.base_total[line]
        scores = best.values - self.guided_total[line]
        rewards: list[float | None] = [None] * len(base)
        if self.rewards is not None:
            raw = self.rewards[line][:, best.indices].double().cpu().numpy()
            rewards = _combined_rewards(terms, raw).tolist()
        rows = zip(best.indices.tolist(), base.tolist(), rewards, scores.tolist(), strict=True)
        return [
            {"token_id": token, "logprob": logprob, "reward": reward, "score": score}
            for token, logprob, reward, score in rows
            if score > -np.inf
        ]


@dataclass(frozen=True)
class ChosenStep:
    """Positions over the whole vocabulary after their tokens were chosen."""

    values: torch.Tensor
    """[n, 4] float32: log π and log π₀ of the chosen token; 1 where guidance changed the most likely token; 1 where
    the position's formula was decoded."""
    rewards: torch.Tensor | None = None
    """[n, terms] of the chosen token; None without rewards."""

    @cached_property
    def array(self) -> np.ndarray:
        """`values` on a CPU, of which numpy takes a row out in a tenth of torch's time."""
        return self.values.numpy()


@dataclass(slots=True)
class Position:
    """One generated position of one request; `step` is None where the base decoded alone."""

    step: CandidateStep | HeadStep | VocabularyStep | ChosenStep | None = None
    line: int = 0
    """The request's row in `step`."""
    formula: Formula = _BASE
    below: Formula = _BASE
    """What was decoded instead where the step says that the gate was closed."""
    traced: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens that auxiliary models read for one request, and those that closed gates spared them."""

    reward_model_tokens: int = 0
    policy_tokens: int = 0
    saved_reward_model_tokens: int = 0
    saved_policy_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """The `guidance` object of a response."""

    method: str
    tokens: int
    guided_tokens: int
    interventions: int
    """Positions at which guidance changed the most likely token."""
    kl: float
    """Σ log π − log π₀ of the chosen tokens, nats, before temperature and top-p."""
    kl_truncation: float
    """Of it what keeping only the candidates costs, Σ −log π₀(candidates): there also with β = 0."""
    kl_steering: float
    """The rest, against π₀ on the same candidates: what rewards and policies have done."""
    rewards: dict[str, float | None]
    """Each reward model's value after the last token; None where the last token was not scored."""
    reward_model_tokens: int
    policy_tokens: int
    saved_reward_model_tokens: int
    """What closed gates spared: tokens that would have been read at every position, less those caught up later."""
    saved_policy_tokens: int
    sources: dict[str, int]
    """Tokens by the distribution that they were sampled from, see `name_source`."""
    switches: int
    """Tokens that were sampled from another distribution than the one before."""
    kl_spent: float | None = None
    """Σ KL(π‖π₀) over positions, nats, where there is a budget."""
    trace: list[dict[str, Any]] | None = None
    error: str | None = None
    fault: Fault | Misfit | None = None
    """Whose fault the error is."""


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """Positions that were guided, whichever way they were decoded; a column each."""

    places: list[int]
    """Of the answer's tokens."""
    kl: list[float]
    truncation: list[float]
    """Of `kl`; 0 where the whole vocabulary is the support."""
    changed: list[bool]
    formulas: list[Formula]
    candidates: list[Sequence[dict[str, Any]]]
    """Empty lists without a trace."""

    def __add__(self, other: "_Outcomes") -> "_Outcomes":
        return _Outcomes(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


_NONE = _Outcomes([], [], [], [], [], [])


def summarise(
    plan: Plan,
    positions: Sequence[Position],
    counts: Counts,
    response: Sequence[int],
    kl_spent: float | None = None,
    error: str | None = None,
    fault: Fault | Misfit | None = None,
) -> Report:
    """Reads the positions of `response`; later ones, computed ahead of a stop, are ignored."""
    used = [] if error is not None else list(positions[: len(response)])
    outcomes = _candidate_outcomes(plan, used, response) + _vocabulary_outcomes(used)
    sources = _name_sources(outcomes, len(response))
    kl, truncation = sum(outcomes.kl, 0.0), sum(outcomes.truncation, 0.0)
    return Report(
        method=plan.method,
        tokens=len(response),
        guided_tokens=len(outcomes.places),
        interventions=sum(outcomes.changed),
        kl=kl,
        kl_truncation=truncation,
        kl_steering=kl - truncation,
        rewards=_final_rewards(plan, used, response),
        reward_model_tokens=counts.reward_model_tokens,
        policy_tokens=counts.policy_tokens,
        saved_reward_model_tokens=counts.saved_reward_model_tokens,
        saved_policy_tokens=counts.saved_policy_tokens,
        sources=dict(Counter(sources)),
        switches=sum(before != after for before, after in pairwise(sources)),
        kl_spent=kl_spent,
        trace=_trace(outcomes, sources, response) if plan.trace else None,
        error=error,
        fault=fault,
    )


def merge_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report from those of workers of which each guided other positions of the same answer. Where an answer went
    from one to another, each counts a switch."""
    merged = dict(reports[0])
    for report in reports[1:]:
        for name in _SUMMED:
            merged[name] += report[name]
        merged["error"] = merged["error"] or report["error"]
        merged["fault"] = merged["fault"] or report["fault"]
        merged["sources"] = _merge_sources(merged["sources"], report["sources"], merged["tokens"])
        merged["rewards"] = {
            name: value if value is not None else report["rewards"][name] for name, value in merged["rewards"].items()
        }
        if merged["trace"] is not None:
            merged["trace"] = [
                mine if mine["source"] != BASE_SOURCE else other
                for mine, other in zip(merged["trace"], report["trace"], strict=True)
            ]
    return merged


def name_source(formula: Formula) -> str:
    """Which distribution a formula samples: the base, one policy, a mixture of policies, or one guided by rewards."""
    if formula.rewards:
        return GUIDED_SOURCE
    if formula.is_base:
        return BASE_SOURCE
    alone = formula.base == 0.0 and len(formula.policies) == 1 and formula.policies[0].coefficient == 1.0
    return formula.policies[0].policy if alone else MIXTURE_SOURCE


def _candidate_outcomes(plan: Plan, used: Sequence[Position], response: Sequence[int]) -> _Outcomes:
    places = [n for n, position in enumerate(used) if isinstance(position.step, CandidateStep | HeadStep)]
    if not places:
        return _NONE
    steps = [(used[n].step, used[n].line) for n in places]
    ids, base, scores = _stack_rows(steps)  # type: ignore[arg-type]
    logprobs = scores - _log_sum_exp(scores)[:, None]
    truncation = -_log_sum_exp(np.where(scores > -np.inf, base, -np.inf))
    chosen = ids == np.asarray([response[n] for n in places])[:, None]
    changed = scores.argmax(axis=1) != base.argmax(axis=1)
    rows = chosen.any(axis=1).nonzero()[0]
    columns = chosen[rows].argmax(axis=1)
    kl = logprobs[rows, columns] - base[rows, columns]
    guided = [places[row] for row in rows.tolist()]
    return _Outcomes(
        guided,
        kl.tolist(),
        truncation[rows].tolist(),
        changed[rows].tolist(),
        [used[n].formula for n in guided],
        [
            _candidates(used[n], ids[row], base[row], logprobs[row]) if plan.trace else []
            for row, n in zip(rows.tolist(), guided, strict=True)
        ],
    )


def _vocabulary_outcomes(used: Sequence[Position]) -> _Outcomes:
    chosen = [(n, p, p.step) for n, p in enumerate(used) if isinstance(p.step, ChosenStep)]
    if not chosen:
        return _NONE
    if chosen[0][2].values.device.type == "cpu":
        values = np.stack([step.array[p.line] for _, p, step in chosen])
    else:
        values = torch.stack([step.values[p.line] for _, p, step in chosen]).cpu().numpy()
    logprobs, base_logprobs, changed, opened = values.T.astype(np.float64)
    formulas = [p.formula if is_open else p.below for (_, p, _), is_open in zip(chosen, opened > 0, strict=True)]
    rows = [row for row, formula in enumerate(formulas) if not formula.is_base]
    return _Outcomes(
        [chosen[row][0] for row in rows],
        (logprobs - base_logprobs)[rows].tolist(),
        [0.0] * len(rows),
        (changed > 0)[rows].tolist(),
        [formulas[row] for row in rows],
        [chosen[row][1].traced for row in rows],
    )


def _candidates(position: Position, ids: np.ndarray, base: np.ndarray, logprobs: np.ndarray) -> list[dict[str, Any]]:
    step = position.step
    assert isinstance(step, CandidateStep | HeadStep)
    rewards = _combined_rewards(position.formula.rewards, step.rewards[position.line].double().cpu().numpy())
    rows = zip(ids.tolist(), base.tolist(), rewards.tolist(), logprobs.tolist(), strict=False)
    shown = [
        {"token_id": token, "logprob": logprob, "reward": reward, "score": score}
        for token, logprob, reward, score in rows
        if score > -np.inf
    ]
    return sorted(shown, key=lambda candidate: -candidate["score"])


def _combined_rewards(terms: Sequence[RewardTerm], rewards: np.ndarray) -> np.ndarray:
    """Σ w T(r) of each candidate: rewards [terms, k] → [k]."""
    total = np.zeros(rewards.shape[1])
    for term, raw in zip(terms, rewards, strict=False):
        value = term.scale * raw + term.shift
        total += term.weight * (-np.logaddexp(0.0, -value) if term.transform is Transform.LOG_SIGMOID else value)
    return total


def _final_rewards(plan: Plan, used: Sequence[Position], response: Sequence[int]) -> dict[str, float | None]:
    last: dict[str, float | None] = dict.fromkeys(plan.reward_models)
    step = used[-1].step if used and len(used) == len(response) else None
    if isinstance(step, CandidateStep | HeadStep):
        line = used[-1].line
        column = (step.ids[line] == response[-1]).nonzero()
        if len(column):
            values = step.rewards[line, :, int(column[0])].tolist()
            last = dict(zip(last, values, strict=False))
    elif isinstance(step, ChosenStep) and step.rewards is not None:
        last = dict(zip(last, step.rewards[used[-1].line].tolist(), strict=False))
    return last


def _trace(outcomes: _Outcomes, sources: Sequence[str], response: Sequence[int]) -> list[dict[str, Any]]:
    lines = {n: line for line, n in enumerate(outcomes.places)}
    return [
        {
            "token_id": token,
            "candidates": outcomes.candidates[lines[n]] if n in lines else [],
            "kl": outcomes.kl[lines[n]] if n in lines else 0.0,
            "source": sources[n],
        }
        for n, token in enumerate(response)
    ]


def _name_sources(outcomes: _Outcomes, tokens: int) -> list[str]:
    """The distribution that each token was sampled from."""
    # An answer has two formulas at most, and a position holds the plan's own object.
    names = {key: name_source(formula) for key, formula in {id(f): f for f in outcomes.formulas}.items()}
    sources = [BASE_SOURCE] * tokens
    for n, formula in zip(outcomes.places, outcomes.formulas, strict=True):
        sources[n] = names[id(formula)]
    return sources


def _merge_sources(mine: Mapping[str, int], others: Mapping[str, int], tokens: int) -> dict[str, int]:
    """To each worker, what another one guided is the base's."""
    guided = Counter(mine) + Counter(others)
    del guided[BASE_SOURCE]
    rest = tokens - guided.total()
    return {**guided, BASE_SOURCE: rest} if rest else dict(guided)


def _stack_rows(
    steps: Sequence[tuple[CandidateStep | HeadStep, int]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [n, k], log-probabilities and scores [n, k] float64 of one line of each step, in the width of the widest;
    those that have fewer are filled up with what is no candidate."""
    parts = _copy_to_host(steps) if _is_on_device(steps[0][0]) else _find_parts(steps)
    width = max(ids.shape[1] for ids, _, _ in parts)
    ids, base, scores = (
        np.concatenate([_pad(part[n], width, padding) for part in parts])
        for n, padding in enumerate((-1, -np.inf, -np.inf))
    )
    return ids, base.astype(np.float64), scores.astype(np.float64)


def _is_on_device(step: CandidateStep | HeadStep) -> bool:
    return isinstance(step, CandidateStep) and step.ids.device.type != "cpu"


_Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids, log-probabilities and scores [n, k] of n steps, one after another."""


def _find_parts(steps: Sequence[tuple[CandidateStep | HeadStep, int]]) -> list[_Part]:
    """Of steps on a CPU; those of heads that lie together are one part, uncopied."""
    parts: list[_Part] = []
    run: tuple[Reranked, int, int, int] | None = None
    for step, line in steps:
        if isinstance(step, HeadStep):
            if run is not None and step.done is run[0] and line == run[1] and step.place == run[3]:
                run = (*run[:3], run[3] + 1)
                continue
            parts += _cut(run)
            run = (step.done, line, step.place, step.place + 1)
        else:
            parts += _cut(run)
            run = None
            ids, base, scores = step.arrays
            parts.append((ids[line : line + 1], base[line : line + 1], scores[line : line + 1]))
    return parts + _cut(run)


def _cut(run: tuple[Reranked, int, int, int] | None) -> list[_Part]:
    if run is None:
        return []
    done, line, start, stop = run
    return [(done.ids[start:stop, line], done.logprobs[start:stop, line], done.scores[start:stop, line])]


def _copy_to_host(steps: Sequence[tuple[Any, int]]) -> list[_Part]:
    """Of steps on a device, of any widths, copied together."""
    widths = np.cumsum([step.ids.shape[1] for step, _ in steps])[:-1]
    rows = [
        np.split(torch.cat([part(step)[line] for step, line in steps]).cpu().numpy(), widths)
        for part in (lambda step: step.ids, lambda step: step.base_logprobs, lambda step: step.scores)
    ]
    return [(ids[None], base[None], scores[None]) for ids, base, scores in zip(*rows, strict=True)]


def _log_sum_exp(values: np.ndarray) -> np.ndarray:
    """Of each row [n, k] that has a finite value; numpy's logaddexp takes ten times as long."""
    largest = values.max(axis=1)
    return largest + np.log(np.exp(values - largest[:, None]).sum(axis=1))


def _pad(values: np.ndarray, width: int, padding: float) -> np.ndarray:
    short = width - values.shape[1]
    return np.pad(values, ((0, 0), (0, short)), constant_values=padding) if short else values
