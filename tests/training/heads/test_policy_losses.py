"""Losses of policy heads against the definitions, in float64 and one token at a time."""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from steersman.guidance.heads import HeadShape
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.heads import policy_losses
from steersman.training.heads.examples import Collator, read_pair, whole_pair
from steersman.training.heads.features import compute_features
from steersman.training.heads.frozen_base import FrozenBase
from steersman.training.heads.network import TrainedHead
from steersman.training.heads.policy_losses import LossName, PolicyLoss, PolicyLossSettings
from tests.support import tiny
from tests.support.random_input import random_prompts


@dataclass
class Setup:
    """Two or three pairs of a random base, a head with random weights, and their batch."""

    rows: list[TokenizedPreference]
    base: FrozenBase
    head: TrainedHead
    batch: dict[str, torch.Tensor]
    plain: Any


@pytest.fixture
def setup(rng: random.Random, tmp_path: Path) -> Setup:
    path = tiny.save_base(tmp_path / "base", rng.randrange(1000), "Gemma2", head_dim=32, final_logit_softcapping=8.0)
    base = FrozenBase(str(path), torch.device("cpu"))
    rows = [
        TokenizedPreference(prompt, *([rng.randrange(2, 300) for _ in range(rng.randint(1, 9))] for _ in range(2)))
        for prompt in random_prompts(rng, rng.randint(2, 3))
    ]
    readings = [reading for row in rows for reading in read_pair(row)]
    features = compute_features(base, readings, tmp_path, tokens=100, what="rows")
    head = TrainedHead(HeadShape(64, 8, 4, tiny.VOCABULARY), features.moments())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.5)
    batch = Collator(features)([whole_pair(features, readings, n) for n in range(len(rows))])
    plain = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    return Setup(rows, base, head, batch, plain)


@torch.no_grad()
def reference(setup: Setup, settings: PolicyLossSettings) -> float:
    """From whole distributions of plain forwards."""
    sides = []
    for row in setup.rows:
        for response in (row.chosen, row.rejected):
            ids = torch.tensor([[*row.prompt, *response]])
            found = setup.plain(ids, output_hidden_states=True)
            ratio = logprob = kl = 0.0
            for n, token in enumerate(response):
                place = len(row.prompt) + n - 1
                base = found.logits[0, place].double().log_softmax(-1)
                change = setup.head.every(setup.head.features(found.hidden_states[-1][:1, place]))[0].double()
                policy = (base + change).log_softmax(-1)
                ratio += (policy - base)[token].item()
                logprob += policy[token].item()
                kl += (policy.exp() * (policy - base)).sum().item()
            sides.append((ratio, logprob, kl, len(response)))
    pairs = list(zip(sides[0::2], sides[1::2], strict=True))
    return sum(_one(w, l, settings, sum(side[2] for side in sides) / len(sides)) for w, l in pairs) / len(pairs)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _one(w: tuple[float, ...], l: tuple[float, ...], s: PolicyLossSettings, point: float) -> float:
    margin = s.beta * (w[0] - l[0])
    mean_w, mean_l = w[1] / w[3], l[1] / l[3]
    if s.name == "sigmoid":
        return -math.log(_sigmoid(margin))
    if s.name == "robust":
        e = s.label_smoothing
        return (-(1 - e) * math.log(_sigmoid(margin)) + e * math.log(_sigmoid(-margin))) / (1 - 2 * e)
    if s.name == "ipo":
        return (w[0] / w[3] - l[0] / l[3] - 0.5 / s.beta) ** 2
    if s.name == "kto":
        return (2 - _sigmoid(s.beta * (w[0] - point)) - _sigmoid(s.beta * (point - l[0]))) / 2
    if s.name == "simpo":
        return -math.log(_sigmoid(s.beta * (mean_w - mean_l) - s.gamma))
    odds = math.log(math.exp(mean_w) / (1 - math.exp(mean_w))) - math.log(math.exp(mean_l) / (1 - math.exp(mean_l)))
    return -mean_w - s.beta * math.log(_sigmoid(odds))


@pytest.mark.parametrize("name", get_args(LossName))
def test_a_loss_is_its_definition(rng: random.Random, setup: Setup, name: LossName) -> None:
    settings = PolicyLossSettings(name, rng.uniform(0.05, 1), rng.uniform(0, 0.4), rng.uniform(0, 1))
    found = PolicyLoss(settings, setup.base)(setup.head, setup.batch).item()
    assert found == pytest.approx(reference(setup, settings), rel=5e-3, abs=1e-3)
    assert PolicyLoss(settings, setup.base).count(setup.batch) == len(setup.rows)


@pytest.mark.parametrize("name", ["sigmoid", "kto"])
def test_chunks_change_neither_loss_nor_gradient(setup: Setup, monkeypatch: pytest.MonkeyPatch, name: LossName) -> None:
    loss = PolicyLoss(PolicyLossSettings(name, 0.3), setup.base)
    found = []
    for chunk in (2**24, 3 * tiny.VOCABULARY):
        monkeypatch.setattr(policy_losses, "CHUNK", chunk)
        setup.head.zero_grad()
        value = loss(setup.head, setup.batch)
        value.backward()
        gradients = {key: own.grad.clone() for key, own in setup.head.named_parameters() if own.grad is not None}
        found.append((value.detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0])
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, atol=1e-5, rtol=1e-3)


def test_kto_takes_no_gradient_of_its_reference_point(setup: Setup) -> None:
    loss = PolicyLoss(PolicyLossSettings("kto", 0.3), setup.base)
    loss(setup.head, setup.batch).backward()
    found = setup.head.outer.weight.grad.clone()  # type: ignore[union-attr]
    values = loss._tokens(setup.head, setup.batch["hidden"], setup.batch["tokens"][:, 0])
    owners = setup.batch["owners"]
    ratios, kl = (values.new_zeros(int(owners.max()) + 1).index_add(0, owners, values[n]) for n in (0, 2))
    point = kl.mean().item()
    signs = torch.where(torch.arange(len(ratios)) % 2 == 0, 1.0, -1.0)
    setup.head.zero_grad()
    (1 - (0.3 * signs * (ratios - point)).sigmoid()).mean().backward()
    torch.testing.assert_close(found, setup.head.outer.weight.grad, atol=1e-6, rtol=1e-4)
