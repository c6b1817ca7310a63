"""What policies know of preferences: implicit rewards of beginnings, truncated training, and the Monte Carlo KL.

Read from the models themselves, on test pairs that no model was trained on (Shallow Preference Signals, §3.2 and §3.3).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.benchmarks.common.rendering import BLUE, GREY, ORANGE
from steersman.benchmarks.seeds import REPEATED, SEEDS, policy_folder
from steersman.benchmarks.settings import world_prompts
from steersman.benchmarks.statistics import Estimate, estimate
from steersman.benchmarks.sweep import Finding
from steersman.demo import MODELS, WORLD
from steersman.kernels.reference import measure_kl, sample_kl
from steersman.training.accuracy import accuracy_of
from steersman.training.data.preferences import Preference, TokenizedPreference, tokenize
from steersman.training.implicit_reward import token_log_ratios
from steersman.training.world import gold
from steersman.training.world.build import POLICIES
from steersman.training.world.pairs import by_gold, read_rows
from steersman.training.world.sampling import sample
from steersman.training.world.tokenizer import WINDOW

SHARES = (0.1, 0.2, 0.25, 0.3, 0.33, 0.4, 0.5, 0.75, 1.0)
LENGTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96)
SAMPLES = (10, 100, 1000)
THRESHOLDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_ANSWERS = 400
_PREFIX_PAIRS = 60
_BATCH = 64


@dataclass(frozen=True)
class Knowledge:
    """One policy of one seed."""

    name: str
    seed: int
    by_share: dict[str, float]
    """Share of the longer response → accuracy of the implicit reward against gold order."""
    by_length: dict[str, float]
    """Tokens of both responses → the same."""
    gold: float
    """Mean gold reward of answers at temperature 1."""
    gold_error: float
    """Its standard error over prompts."""


def measure_policies(work: Path, pool: Executor) -> list[Knowledge]:
    """Every policy of every seed, two at a time."""
    jobs = [(name, seed) for name in POLICIES for seed in SEEDS if seed == 0 or name in REPEATED]
    return list(pool.map(_measure, *zip(*((work, name, seed) for name, seed in jobs), strict=True)))


def _measure(work: Path, name: str, seed: int) -> Knowledge:
    base, tokenizer = _load(MODELS / "base"), AutoTokenizer.from_pretrained(MODELS / "base")
    policy = _load(policy_folder(work, name, seed))
    rows = gold_pairs(tokenizer)
    # β only scales the implicit reward, and no order depends on it.
    sums = [
        [ratios.cumsum(0) for ratios in token_log_ratios(policy, base, side, _BATCH)]
        for side in ([(row.prompt, row.chosen) for row in rows], [(row.prompt, row.rejected) for row in rows])
    ]

    def at_cuts(cuts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = (
            torch.stack([row[min(i, len(row)) - 1] for row, i in zip(side, cuts, strict=True)]) for side in sums
        )
        return chosen, rejected

    prompts = [prompt.text or "" for prompt in world_prompts("reporting")][:_ANSWERS]
    answers = sample(policy, tokenizer, prompts, seed, f"{name}, seed {seed}")
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    golds = estimate([gold.score(prompt, text).total for prompt, text in zip(prompts, texts, strict=True)])
    by_share, by_length = accuracy_of(at_cuts, rows, SHARES), accuracy_at_lengths(at_cuts, rows)
    return Knowledge(name, seed, by_share, by_length, golds.mean, golds.standard_error)


def accuracy_at_lengths(
    at_cuts: Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]], rows: Sequence[TokenizedPreference]
) -> dict[str, float]:
    """Tokens → accuracy where both responses of every row are cut at so many; equal beginnings are half right."""
    accuracy = {}
    for length in LENGTHS:
        chosen, rejected = at_cuts([length] * len(rows))
        equal = torch.tensor([row.chosen[:length] == row.rejected[:length] for row in rows])
        right = torch.where(equal, 0.5, (chosen > rejected).double())
        accuracy[str(length)] = round(right.mean().item(), 4)
    return accuracy


def implicit(policies: Sequence[Knowledge]) -> Finding:
    """Accuracy of the implicit reward by how much of the responses it reads."""
    full = [policy for policy in policies if policy.name == "dpo"]
    by_share = {s: estimate([policy.by_share[f"{s:g}"] for policy in full]) for s in SHARES}
    by_length = {n: estimate([policy.by_length[str(n)] for policy in full]) for n in LENGTHS}
    gap = estimate([policy.by_share["1"] - policy.by_share["0.5"] for policy in full])
    return Finding(
        "Implicit reward of the beginnings of responses",
        (
            {
                "share of the longer response": [f"{s:.0%}" for s in SHARES],
                "accuracy against gold order": [f"{by_share[s]:.3f}" for s in SHARES],
            },
            {
                "tokens of both responses": [str(n) for n in LENGTHS],
                "accuracy against gold order": [f"{by_length[n]:.3f}" for n in LENGTHS],
            },
        ),
        (
            f"The implicit reward of whole responses orders {by_share[1.0]:.3f} of pairs rightly, of their first half "
            f"{by_share[0.5]:.3f} and of their first quarter {by_share[0.25]:.3f}; whole less half: "
            f"{gap:.3f}.",
        ),
        "Mean ± standard error over the training seeds; the demo world's test pairs.",
        {"policies": [policy.__dict__ for policy in full]},
        lambda figure: _draw_implicit(figure, by_share, by_length),
    )


def truncated(policies: Sequence[Knowledge]) -> Finding:
    """What policies lose that were trained on the beginnings of responses only."""
    of = {name: [policy for policy in policies if policy.name == name] for name in POLICIES}
    golds = {name: estimate([policy.gold for policy in group]) for name, group in of.items()}
    whole = {name: estimate([policy.by_share["1"] for policy in group]) for name, group in of.items()}
    table = {
        "trained on the first": [f"{share:.0%}" for share in POLICIES.values()],
        "seeds": [str(len(group)) for group in of.values()],
        "gold reward of answers": [f"{golds[name]:.2f}" for name in of],
        "accuracy of the implicit reward, whole responses": [f"{whole[name]:.3f}" for name in of],
    }
    losses = {
        name: estimate([a.gold - b.gold for a, b in zip(of["dpo"], of[name], strict=True)])
        for name in REPEATED
        if name != "dpo"
    }
    return Finding(
        "Training on the beginnings of responses",
        (table,),
        tuple(_loss_in_words(name, loss) for name, loss in losses.items()),
        f"Mean ± standard error over the training seeds, where there are several; {_ANSWERS} reporting prompts at "
        "temperature 1, and the demo world's test pairs.",
        {"policies": [policy.__dict__ for policy in policies]},
        lambda figure: _draw_truncated(figure, golds, whole),
    )


@dataclass(frozen=True)
class Agreement:
    """The Monte Carlo KL beside the exact one, over positions of real answers."""

    exact: torch.Tensor
    """[N] nats."""
    sampled: dict[int, torch.Tensor]
    """Number of samples → [N] nats."""


@torch.inference_mode()
def measure_agreement() -> Agreement:
    """KL(dpo‖base) after every prefix of some test responses, exact and sampled."""
    base, policy = _load(MODELS / "base"), _load(MODELS / "dpo")
    rows = gold_pairs(AutoTokenizer.from_pretrained(MODELS / "base"))[:_PREFIX_PAIRS]
    exact: list[torch.Tensor] = []
    sampled: dict[int, list[torch.Tensor]] = {count: [] for count in SAMPLES}
    for n, (prompt, response) in enumerate((r.prompt, side) for r in rows for side in (r.chosen, r.rejected)):
        ids = torch.tensor([[*prompt, *response]])
        ours, theirs = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() for model in (policy, base))
        exact.append(measure_kl(ours, theirs))
        for count in SAMPLES:
            generators = [torch.Generator().manual_seed(1000 * n + place) for place in range(len(response))]
            sampled[count].append(sample_kl(ours, theirs, count, generators))
    return Agreement(torch.cat(exact), {count: torch.cat(values) for count, values in sampled.items()})


def estimator(measured: Agreement) -> Finding:
    """How often the Monte Carlo KL decides as the exact one does, over thresholds."""
    agreed = {
        count: [((values > b) == (measured.exact > b)).double().mean().item() for b in THRESHOLDS]
        for count, values in measured.sampled.items()
    }
    errors = {n: (values - measured.exact).double() for n, values in measured.sampled.items()}
    most = max(SAMPLES)
    bias = estimate(errors[most].tolist())
    return Finding(
        "Monte Carlo KL against the exact KL",
        (
            {
                "threshold b, nats": [f"{b:g}" for b in THRESHOLDS],
                "policy decodes (exact)": [f"{(measured.exact > b).double().mean().item():.3f}" for b in THRESHOLDS],
                **{f"K = {n}: same decision": [f"{share:.4f}" for share in agreed[n]] for n in SAMPLES},
            },
            {
                "samples K": [str(n) for n in SAMPLES],
                "mean absolute error, nats": [f"{errors[n].abs().mean().item():.4f}" for n in SAMPLES],
                "mean error, nats": [f"{estimate(errors[n].tolist()):.5f}" for n in SAMPLES],
            },
        ),
        (
            f"With K = {most} the Monte Carlo KL decides as the exact KL at {min(agreed[most]):.2%} of positions or "
            f"more, whatever the threshold ({len(measured.exact)} positions; its mean error is {bias:.5f} nats).",
        ),
        "The demo's policy dpo and base after every prefix of test responses; ± is a standard error over positions.",
        {"agreement": {str(n): dict(zip(map(str, THRESHOLDS), agreed[n], strict=True)) for n in SAMPLES}}
        | {"positions": len(measured.exact), "bias": bias.dump()},
        lambda figure: _draw_estimator(figure, measured, agreed),
    )


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def gold_pairs(tokenizer: Any) -> list[TokenizedPreference]:
    """The demo world's test pairs, the better one by gold as the chosen."""
    rows = by_gold(read_rows(WORLD / "test_pairs.jsonl"))
    return [
        tokenize(Preference(r["prompt"], r["chosen"], r["rejected"], "test pairs"), tokenizer, WINDOW) for r in rows
    ]


def _loss_in_words(name: str, loss: Estimate) -> str:
    words = {1: "worse than", 0: "not clearly different from", -1: "better than"}[loss.verdict]
    return (
        f"Answers of the policy trained on the first {POLICIES[name]:.0%} are {words} those of the one trained on "
        f"whole responses (gold lower by {loss:.2f})."
    )


def _draw_implicit(figure: Any, by_share: dict[float, Estimate], by_length: dict[int, Estimate]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, values, label in (
        (left, {100 * s: v for s, v in by_share.items()}, "first % of the longer response"),
        (right, by_length, "first tokens of both responses"),
    ):
        means, errors = [v.mean for v in values.values()], [v.standard_error for v in values.values()]
        axis.errorbar(list(values), means, errors, fmt="o-", color=BLUE, capsize=2)
        axis.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
    left.set_ylabel("accuracy against gold order")


def _draw_truncated(figure: Any, golds: dict[str, Estimate], whole: dict[str, Estimate]) -> None:
    counts = (f"{v.count} seed{'s' if v.count > 1 else ''}" for v in golds.values())
    labels = [f"{share:.0%}\n{count}" for share, count in zip(POLICIES.values(), counts, strict=True)]
    for axis, values, colour, title in zip(
        figure.subplots(1, 2),
        (golds, whole),
        (BLUE, ORANGE),
        ("Gold reward of answers", "Accuracy of the implicit reward, whole responses"),
        strict=True,
    ):
        axis.bar(labels, [v.mean for v in values.values()], color=colour)
        repeated = [(label, v) for label, v in zip(labels, values.values(), strict=True) if v.count > 1]
        heights, errors = [v.mean for _, v in repeated], [v.standard_error for _, v in repeated]
        axis.errorbar([label for label, _ in repeated], heights, errors, fmt="none", color="black", capsize=3)
        axis.set(title=title, xlabel="trained on the first part of each response")
    figure.axes[1].set_ylim(0.5, 1.0)


def _draw_estimator(figure: Any, measured: Agreement, agreed: dict[int, list[float]]) -> None:
    left, right = figure.subplots(1, 2)
    for (count, shares), colour in zip(agreed.items(), (GREY, ORANGE, BLUE), strict=True):
        left.plot(THRESHOLDS, shares, "o-", color=colour, label=f"K = {count}")
    left.set(xscale="log", xlabel="threshold b, nats", ylabel="positions with the same decision")
    left.set_xticks(THRESHOLDS, [f"{b:g}" for b in THRESHOLDS])
    left.legend(fontsize=8)
    most = max(SAMPLES)
    right.plot(measured.exact, measured.sampled[most], ".", color=BLUE, markersize=2, alpha=0.4)
    top = float(measured.exact.max())
    right.plot([0, top], [0, top], color=GREY, linewidth=0.8)
    right.set(xlabel="exact KL, nats", ylabel=f"Monte Carlo KL, K = {most}")
