"""Token-level DPO (TDPO): the sequential KL of both responses beside their log-ratios."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from steersman.training.configuration import ConfigError
from steersman.training.options import refuse
from steersman.training.policies import distributions
from steersman.training.policies.distributions import DistributionConfig, DistributionDPOTrainer
from steersman.training.policies.losses import token_level_dpo
from steersman.training.policies.method import Method
from steersman.training.policies.pairs import train_with


@dataclass
class TokenLevelConfig(DistributionConfig):
    """TRL's, and how much the sequential KL weighs."""

    alpha: float = field(default=0.5, metadata={"help": "Of tdpo2: how much the sequential KL weighs; 0 is DPO."})


class TDPO2Trainer(DistributionDPOTrainer):
    """Equation 14 of TDPO: the chosen response's KL is held, but not trained."""

    trains_kl = True
    version: Literal[1, 2] = 2

    def _preference_loss(self, ratios: Tensor, kl: Tensor, inputs: dict[str, Any]) -> Tensor:
        """See DistributionDPOTrainer."""
        (chosen, rejected), (chosen_kl, rejected_kl) = ratios.sum(dim=1).chunk(2), kl.chunk(2)
        return token_level_dpo(chosen, rejected, chosen_kl, rejected_kl, self.beta, self.args.alpha, self.version)


class TDPO1Trainer(TDPO2Trainer):
    """Equation 13 of TDPO."""

    version = 1


def _check(config: TokenLevelConfig) -> None:
    distributions.check(config)
    if config.alpha < 0:
        raise ConfigError(f"alpha is at least 0, not {config.alpha:g}; 0 leaves the sequential KL out")


def _check_first(config: TokenLevelConfig) -> None:
    _check(config)
    refuse(config, {"alpha": "it belongs to method tdpo2, tdpo1 has none: leave it out"})


TDPO1 = Method(
    config=TokenLevelConfig,
    make_trainer=train_with(TDPO1Trainer),
    describe=lambda config: distributions.describe(config, "tdpo1"),
    check=_check_first,
)
TDPO2 = Method(
    config=TokenLevelConfig,
    make_trainer=train_with(TDPO2Trainer),
    describe=lambda config: distributions.describe(config, "tdpo2", alpha=config.alpha),
    check=_check,
)
