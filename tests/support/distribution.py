"""Chi-squared tests of drawn answers against the exact distribution of every method, and against a wrong one."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy import stats

from tests.support.oracle import Oracle
from tests.support.tiny import END

DRAWS = 20_000
FEW_DRAWS = 1_000
"""Where one draw costs many milliseconds; `COARSE_CASES` are wrong by so much more."""
ACCEPT = 1e-4
REJECT = 1e-6
"""With 20,000 draws a coefficient that is off by a quarter is found with a power close to one at this level."""
_BINS = 30

Joint = dict[tuple[int, ...], float]
"""Probability of every answer of one or two tokens."""
Case = Callable[[Oracle, list[int], int], tuple[dict[str, Any], Joint, Joint]]
"""Oracle, prompt and length → guidance, its exact distribution, and one that must be told from it."""

_PRODUCT = {"base": 0.8, "expert": 0.6, "other": -0.4}
_TWO_REWARDS = {
    "method": "pargs",
    "rewards": [{"model": "first", "weight": 0.5}, {"model": "second", "transform": "log_sigmoid", "reference": 0.5}],
    "beta": 0.7,
    "top_k": 6,
}

_HEAD = {"method": "pargs", "rewards": [{"model": "atop"}], "beta": 0.25, "top_k": 10}
"""Rewards that vary by some nats: more strength would leave one token, which tells nothing apart."""


def changed(guidance: dict[str, Any], **wrong: Any) -> Case:
    """A method whose parameters are mistaken for `wrong` ones."""

    def case(oracle: Oracle, prompt: list[int], length: int) -> tuple[dict[str, Any], Joint, Joint]:
        right = _joint(oracle, prompt, guidance, length)
        return guidance, right, _joint(oracle, prompt, {**guidance, **wrong}, length)

    return case


def _exact_threshold(oracle: Oracle, prompt: list[int], length: int) -> tuple[dict[str, Any], Joint, Joint]:
    low, high = _thresholds(oracle, prompt, length)
    guidance = {"method": "kl_threshold", "policy": "expert", "threshold": low}
    wrong = {**guidance, "threshold": high}
    return guidance, _joint(oracle, prompt, guidance, length), _joint(oracle, prompt, wrong, length)


def _two_samples(error: float) -> Case:
    def case(oracle: Oracle, prompt: list[int], length: int) -> tuple[dict[str, Any], Joint, Joint]:
        threshold, _ = _thresholds(oracle, prompt, length)
        guidance = {
            **{"method": "kl_threshold", "policy": "expert", "threshold": threshold},
            **{"estimator": "monte_carlo", "samples": 2},
        }
        right, wrong = (_joint_of_two_samples(oracle, prompt, t, length) for t in (threshold, threshold + error))
        return guidance, right, wrong

    return case


CASES: dict[str, Case] = {
    "one reward": changed({"method": "pargs", "reward_model": "first", "beta": 0.8, "top_k": 10}, beta=0.6),
    "two rewards": changed(_TWO_REWARDS, beta=0.5),
    "gated reward": changed({"method": "pargs", "reward_model": "first", "gate": {"first_tokens": 1}}, beta=0.75),
    "mixed 0": changed({"method": "mixed", "policy": "expert", "mix": 0.0}, mix=0.15),
    "mixed 0.3": changed({"method": "mixed", "policy": "expert", "mix": 0.3}, mix=0.45),
    "mixed 1": changed({"method": "mixed", "policy": "expert", "mix": 1.0}, mix=1.15),
    "mixed 1.7": changed({"method": "mixed", "policy": "expert", "mix": 1.7}, mix=1.85),
    "length_control": changed({"method": "length_control", "policy": "other", "length": 1}, length=2),
    "product of three": changed({"method": "product", "policies": _PRODUCT}, policies={**_PRODUCT, "other": -0.3}),
    "head": changed(_HEAD, beta=0.15),
    "policy head": changed({"method": "mixed", "policy": "tilted", "mix": 0.8}, mix=0.65),
    "kl_threshold exact": _exact_threshold,
    "kl_threshold monte carlo": _two_samples(0.4),
}

COARSE_CASES: dict[str, Case] = {
    "gated reward": changed({"method": "pargs", "reward_model": "first", "gate": {"first_tokens": 1}}, beta=0.5),
    "mixed 0.3": changed({"method": "mixed", "policy": "expert", "mix": 0.3}, mix=0.6),
    "head": changed(_HEAD, rewards=[{"model": "atop", "weight": -1.0}]),
    "kl_threshold monte carlo": _two_samples(1.0),
}


def check_draws(draws: Sequence[Sequence[int]], right: Joint, wrong: Joint) -> None:
    """The draws follow `right`, answer by answer, and are told from `wrong`."""
    counts = Counter(map(tuple, draws))
    assert set(counts) <= set(right), "a token outside of the support was drawn"
    assert _p_value(counts, right, [[cell] for cell in right]) > ACCEPT
    bins = _bins_that_tell_apart(right, wrong)
    assert _p_value(counts, right, bins) > ACCEPT
    assert _p_value(counts, wrong, bins) < REJECT


def _joint(oracle: Oracle, prompt: list[int], guidance: dict[str, Any], length: int) -> Joint:
    return _all_answers(prompt, length, lambda tokens, position: oracle.step(tokens, guidance, position).logprobs)


def _joint_of_two_samples(oracle: Oracle, prompt: list[int], threshold: float, length: int) -> Joint:
    """The policy where the mean of two draws' log ratios exceeds the threshold, else the base."""

    def logprobs(tokens: list[int], _: int) -> torch.Tensor:
        base, policy = _base_and_expert(oracle, tokens)
        ratio, p = policy - base, policy.exp()
        opened = float((p.outer(p) * ((ratio.unsqueeze(0) + ratio.unsqueeze(1)) / 2 > threshold)).sum())
        return (opened * p + (1 - opened) * base.exp()).log()

    return _all_answers(prompt, length, logprobs)


def _all_answers(prompt: list[int], length: int, logprobs: Callable[[list[int], int], torch.Tensor]) -> Joint:
    """Answers that are less likely than one in a million draws of the test are left out."""
    joint: Joint = {}
    for v, p in enumerate(logprobs(prompt, 0).exp().tolist()):
        if v == END or length == 1:
            joint[(v,)] = p
        elif p > 1e-9:
            second = logprobs([*prompt, v], 1).exp()
            joint.update({(v, w): p * q for w, q in enumerate(second.tolist()) if q > 1e-9})
    return joint


def _thresholds(oracle: Oracle, prompt: list[int], length: int) -> tuple[float, float]:
    """Thresholds above which half and an eighth of the likely last positions lie; of one position, either side."""
    base, policy = _base_and_expert(oracle, prompt)
    if length == 1:
        kl = float((policy.exp() * (policy - base)).sum())
        return 0.8 * kl, 1.2 * kl
    likely = policy.topk(60).indices.tolist()
    divergences = []
    for v in likely:
        base, expert = _base_and_expert(oracle, [*prompt, v])
        divergences.append(float((expert.exp() * (expert - base)).sum()))
    divergences.sort()
    return tuple((divergences[n] + divergences[n + 1]) / 2 for n in (29, 52))  # type: ignore[return-value]


def _base_and_expert(oracle: Oracle, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    sources = (oracle.models.base, oracle.models.policies["expert"])
    base, expert = (logits(tokens).double().log_softmax(-1) for logits in sources)
    return base, expert


def _bins_that_tell_apart(right: Joint, wrong: Joint) -> list[list[tuple[int, ...]]]:
    """Answers in bins of like probability, ordered by how much more likely one distribution makes them: the test
    that looks at these has nearly the power of the likelihood ratio."""
    cells = sorted(right.keys() | wrong.keys(), key=lambda c: (right.get(c, 0.0) + 1e-12) / (wrong.get(c, 0.0) + 1e-12))
    bins: list[list[tuple[int, ...]]] = [[]]
    mass = 0.0
    for cell in cells:
        bins[-1].append(cell)
        mass += right.get(cell, 0.0)
        if mass > 1 / _BINS:
            bins.append([])
            mass = 0.0
    return bins


def _p_value(counts: Counter, joint: Joint, bins: list[list[tuple[int, ...]]]) -> float:
    """Chi-squared test over bins; those that expect fewer than five draws are merged into one."""
    draws = sum(counts.values())
    expected = [draws * sum(joint.get(cell, 0.0) for cell in cells) for cells in bins]
    observed = [sum(counts[cell] for cell in cells) for cells in bins]
    large = [(o, e) for o, e in zip(observed, expected, strict=True) if e >= 5]
    rest = draws - sum(e for _, e in large)
    if rest >= 5:
        large.append((draws - sum(o for o, _ in large), rest))
    scale = sum(o for o, _ in large) / sum(e for _, e in large)
    return float(stats.chisquare([o for o, _ in large], [e * scale for _, e in large]).pvalue)
