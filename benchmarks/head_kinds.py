"""What is compared with heads: how each is trained, on how many pairs, and the strengths that it is decoded with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steersman.benchmarks.runs import Pairs, Run, SmallLanguageModel
from steersman.benchmarks.sweep import Curve
from steersman.demo import MODELS

SEEDS = (0, 1, 2)
FEW, MANY = 2500, 10_000
"""Preference pairs in a seed's file; policies read 6,000 of the larger one."""
TOP_K = 10
MODEL = "trained"
"""The runtime's name for what guides."""
TOO_STRONG = 8.0
"""The β of heads that budgets are tried with."""
BUDGETS = (2.0, 4.0, 8.0, 16.0)

_BETAS = (1.0, 2.0, 4.0, 6.0, TOO_STRONG)
_CANDIDATE_BETAS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Their rewards differ by less than those of models that return every token's reward at once."""
_MIXES = (0.25, 0.5, 1.0, 1.25, 1.5)


@dataclass(frozen=True)
class Kind:
    """A way to train what guides, and models that it gave."""

    name: str
    command: str
    """`reward` or `dpo`."""
    config: str
    """Of `training/configs/`."""
    folder: str
    """Of its models, under a seed's."""
    pairs: int = FEW
    flags: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    shipped: str | None = None
    """The demo's own model of that name is the one of seed 0, which the recipe trained on the MANY pairs."""
    betas: tuple[float, ...] = _BETAS
    """Strengths of a reward model."""
    from_small: bool = False
    """Begins with the demo's small language model, and not with its base."""
    teacher: "Kind | None" = None
    """The reward model that it is trained towards."""

    @property
    def read(self) -> int:
        """Pairs that it is trained on: recipes of policies read 6,000 at most."""
        return self.pairs if self.is_reward else min(self.pairs, 6000)

    @property
    def is_head(self) -> bool:
        """Whether it reads the base's hidden states, and has no model of its own."""
        return "head" in self.config

    @property
    def is_reward(self) -> bool:
        """Whether it is a reward model, with strengths β, and not a policy that is mixed in."""
        return self.command == "reward"

    @property
    def curve(self) -> Curve:
        """Its strengths."""
        if self.is_reward:
            return Curve(self.name, "β", self.betas, lambda model, beta: pargs(model, beta))
        return Curve(self.name, "mix", _MIXES, lambda model, mix: {"method": "mixed", "policy": model, "mix": mix})

    @property
    def tuned(self) -> str:
        """Names answers at the strength that is best for sampling with each seed's model."""
        return f"{self.name}, tuned"

    @property
    def budgets(self) -> Curve:
        """Of a reward model: KL budgets at a β that is too strong."""
        name = f"{self.name}, β = {TOO_STRONG:g}"
        return Curve(name, "kl_budget", BUDGETS, lambda model, nats: pargs(model, TOO_STRONG) | {"kl_budget": nats})

    def path(self, work: Path, seed: int) -> Path:
        """Where its model of a seed lies."""
        if self.shipped is not None and seed == 0:
            return MODELS / self.shipped
        return work / f"seed{seed}" / self.folder

    def run(self, work: Path, seed: int) -> Run:
        """Its training."""
        start = SmallLanguageModel(work).path if self.from_small else MODELS / "base"
        flags: dict[str, Any] = {
            **{"model": start, "train_file": pairs_of(work, self.pairs, seed).path, "validation_file": ""},
            **{"seed": seed, "figure": False},
        }
        if self.is_head:
            flags["feature_cache"] = work / f"seed{seed}" / "features"
        if self.teacher is not None:
            flags["teacher"] = self.teacher.path(work, seed)
        return Run(self.command, self.config, self.path(work, seed), flags | dict(self.flags))


def pargs(model: str, beta: float) -> dict[str, Any]:
    """Guidance by a reward model."""
    return {"method": "pargs", "reward_model": model, "beta": beta, "top_k": TOP_K}


def pairs_of(work: Path, count: int, seed: int) -> Pairs:
    """Preference pairs of a seed."""
    name = "pairs" if count == FEW else f"pairs-{count}"
    return Pairs(work / f"seed{seed}" / f"{name}.jsonl", count, seed)


def _reward_head(name: str, folder: str, **options: Any) -> Kind:
    return Kind(name, "reward", "reward-head.yaml", folder, **options)


def _policy_head(name: str, folder: str, **options: Any) -> Kind:
    return Kind(name, "dpo", "dpo-head.yaml", folder, **options)


def _candidate(name: str, folder: str, **options: Any) -> Kind:
    return Kind(name, "reward", "reward-partial.yaml", folder, betas=_CANDIDATE_BETAS, from_small=True, **options)


def _vocabulary(name: str, folder: str, **options: Any) -> Kind:
    return Kind(name, "reward", "reward-vocabulary.yaml", folder, from_small=True, **options)


def _policy(name: str, folder: str, **options: Any) -> Kind:
    return Kind(name, "dpo", "dpo.yaml", folder, **options)


_ONE = (0,)

HEAD = _reward_head("reward head", "reward-head-pairs")
CANDIDATE = _candidate("candidate model", "candidate")
VOCABULARY = _vocabulary("vocabulary model", "vocabulary")
POLICY_HEAD = _policy_head("DPO head", "dpo-head")
POLICY = _policy("DPO of the whole model", "dpo")

HEAD_MANY = _reward_head("reward head, 10,000 pairs", "reward-head-10000", pairs=MANY, flags={"num_train_epochs": 2})
HEAD_LONG = _reward_head("reward head, 10,000 pairs, 8 epochs", "reward-head-10000-8", pairs=MANY, seeds=_ONE)
CANDIDATE_MANY = _candidate("candidate model, 10,000 pairs", "candidate-10000", pairs=MANY, shipped="reward-partial")
VOCABULARY_MANY = _vocabulary(
    "vocabulary model, 10,000 pairs", "vocabulary-10000", pairs=MANY, shipped="reward-vocabulary"
)
POLICY_HEAD_MANY = _policy_head("DPO head, 6,000 pairs", "dpo-head-6000", pairs=MANY, shipped="dpo-head")
POLICY_MANY = _policy("DPO of the whole model, 6,000 pairs", "dpo-6000", pairs=MANY, shipped="dpo")


def _other_target(name: str, target: str, **options: Any) -> Kind:
    return _reward_head(
        f"reward head, {name}", f"reward-head-{target}", flags={"head_target": target}, seeds=_ONE, **options
    )


def _other_loss(name: str, **flags: Any) -> Kind:
    return _policy_head(f"{name} head", f"{name.lower()}-head", flags=flags, seeds=_ONE)


def _size(width: int, rank: int) -> Kind:
    flags = {"head_width": width, "head_rank": rank}
    return _reward_head(f"reward head, {width} × {rank}", f"reward-head-{width}-{rank}", flags=flags, seeds=_ONE)


RATINGS = _other_target("ratings", "ratings")
TEACHER = _other_target("by a teacher", "teacher", teacher=CANDIDATE)
LOSSES = (
    # β as in the recipes for whole models.
    _other_loss("IPO", loss_type="ipo", beta=1.0),
    _other_loss("KTO", method="kto", beta=0.1),
    _other_loss("SimPO", method="simpo", beta=2.0),
    _other_loss("ORPO", method="orpo", beta=1.0),
)
SIZES = (_size(64, 32), _size(256, 128))
OTHERS = (RATINGS, TEACHER, *LOSSES, *SIZES)
"""Heads by other recipes, of one seed, at their best strengths alone."""

PARTS: dict[str, tuple[Kind, ...]] = {
    "few": (HEAD, CANDIDATE, VOCABULARY, POLICY_HEAD, POLICY),
    "many": (HEAD_MANY, CANDIDATE_MANY, VOCABULARY_MANY, POLICY_HEAD_MANY, POLICY_MANY),
    "long": (HEAD_LONG,),
    "ratings": (RATINGS,),
    "teacher": (TEACHER,),
    "losses": LOSSES,
    "sizes": SIZES,
}
BUDGETED = (HEAD, HEAD_LONG)
"""Those that are decoded with budgets too."""
RIVALS = (
    *((HEAD, CANDIDATE), (HEAD, VOCABULARY), (POLICY_HEAD, POLICY)),
    *((HEAD_MANY, CANDIDATE_MANY), (HEAD_MANY, VOCABULARY_MANY), (POLICY_HEAD_MANY, POLICY_MANY)),
)
"""A head, and what it is compared with: trained on as many pairs."""
