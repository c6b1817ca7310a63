"""TDPO's trainers against the papers' formulas."""

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from steersman.training.policies.arguments import MethodName
from tests.support.policies import (
    compute_loss,
    distributions,
    draw_rows,
    log_ratios,
    log_sigmoid,
    make_trainer,
    step_away,
    token_logprobs,
)


@pytest.mark.parametrize("method", ["tdpo1", "tdpo2"])
def test_the_loss_is_the_margin_of_dpo_less_the_difference_of_the_sequential_kl(
    folder: Path, rng: random.Random, method: MethodName
) -> None:
    """Equations 13 and 14 of TDPO, and the SFT loss on chosen responses beside."""
    rows = draw_rows(rng, 5)
    trainer = make_trainer(folder, method, rows, sft_weight=0.1)
    (batch,) = trainer.get_train_dataloader()
    models = step_away(trainer, folder)
    expected, chosen = 0.0, []
    for row in rows:
        (ratio_w, kl_w), (ratio_l, kl_l) = (
            (sum(log_ratios(*models, row.prompt, y)), kl(*models, row.prompt, y)) for y in (row.chosen, row.rejected)
        )
        delta = kl_l - kl_w if method == "tdpo1" else 0.5 * (kl_l - kl_w)
        expected -= log_sigmoid(0.3 * (ratio_w - ratio_l - delta)) / len(rows)
        chosen += token_logprobs(models[0], row.prompt, row.chosen)
    assert compute_loss(trainer, batch) == pytest.approx(expected - 0.1 * sum(chosen) / len(chosen), rel=1e-4)


def test_what_is_logged(folder: Path, rng: random.Random) -> None:
    rows = draw_rows(rng, 4)
    trainer: Any = make_trainer(folder, "tdpo2", rows)
    (batch,) = trainer.get_train_dataloader()
    models = step_away(trainer, folder)
    compute_loss(trainer, batch)
    rewards = {side: [0.3 * sum(log_ratios(*models, r.prompt, getattr(r, side))) for r in rows] for side in SIDES}
    kls = {side: [kl(*models, row.prompt, getattr(row, side)) for row in rows] for side in SIDES}
    margins = [w - l for w, l in zip(rewards["chosen"], rewards["rejected"], strict=True)]
    expected = {f"rewards/{side}": values for side, values in rewards.items()}
    expected |= {f"sequential_kl/{side}": values for side, values in kls.items()}
    expected |= {"rewards/margins": margins, "rewards/accuracies": [float(margin > 0) for margin in margins]}
    logged = trainer._metrics["train"]
    assert {name: logged[name] for name in expected} == {
        name: [pytest.approx(math.fsum(values) / len(rows), rel=1e-3, abs=1e-5)] for name, values in expected.items()
    }


def test_what_is_measured_without_training_is_logged_apart(folder: Path, rng: random.Random) -> None:
    trainer: Any = make_trainer(folder, "tdpo1", draw_rows(rng, 2))
    (batch,) = trainer.get_train_dataloader()
    loss, outputs = trainer.compute_loss(trainer.model.eval(), dict(batch), return_outputs=True)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5), "nothing is trained yet"
    assert set(trainer._metrics["eval"]) >= {"rewards/margins", "sequential_kl/chosen"}
    assert trainer._metrics["eval"]["rewards/accuracies"] == [0.0], "equal rewards order no pair rightly"
    assert not trainer._metrics["train"]


def test_the_reference_of_an_adapter_is_the_model_under_it(folder: Path, rng: random.Random) -> None:
    rows = draw_rows(rng, 4)
    trainer = make_trainer(folder, "tdpo1", rows, lora=LoraConfig(r=4, target_modules="all-linear"))
    (batch,) = trainer.get_train_dataloader()
    assert compute_loss(trainer, batch) == pytest.approx(math.log(2), abs=1e-5)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    found = compute_loss(trainer, batch)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float64") for _ in range(2))
    policy.load_state_dict(copy.deepcopy(trainer.model).merge_and_unload().state_dict())
    expected = 0.0
    for row in rows:
        (ratio_w, kl_w), (ratio_l, kl_l) = (
            (sum(log_ratios(policy, reference, row.prompt, y)), kl(policy, reference, row.prompt, y))
            for y in (row.chosen, row.rejected)
        )
        expected -= log_sigmoid(0.3 * (ratio_w - ratio_l - (kl_l - kl_w))) / len(rows)
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(found - math.log(2)) > 1e-3


SIDES = ("chosen", "rejected")


def kl(policy: Any, reference: Any, prompt: list[int], response: list[int]) -> float:
    """Σ_t KL(π_ref ‖ π)."""
    own, other = (distributions(model, prompt, response) for model in (policy, reference))
    return float((other.exp() * (other - own)).sum())


@pytest.mark.parametrize("method", ["tdpo1", "tdpo2"])
def test_the_gradient_goes_through_the_kl_of_the_equations(
    folder: Path, rng: random.Random, method: MethodName
) -> None:
    """Both responses' in equation 13, the rejected one's alone in equation 14."""
    rows = draw_rows(rng, 3)
    trainer = make_trainer(folder, method, rows)
    (batch,) = trainer.get_train_dataloader()
    policy, reference = step_away(trainer, folder)
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model.train(), dict(batch)).backward()

    def terms(prompt: list[int], response: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        own, other = (
            model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for model in (policy, reference)
        )
        taken = torch.arange(len(response)), torch.tensor(response)
        return (own[taken] - other[taken]).sum(), (other.exp() * (other - own)).sum()

    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        (ratio_w, kl_w), (ratio_l, kl_l) = (terms(row.prompt, y) for y in (row.chosen, row.rejected))
        delta = kl_l - kl_w if method == "tdpo1" else 0.5 * (kl_l - kl_w.detach())
        loss = loss - torch.nn.functional.logsigmoid(0.3 * (ratio_w - ratio_l - delta)) / len(rows)
    loss.backward()
    for name, parameter in policy.named_parameters():
        found = trainer.model.get_parameter(name).grad
        torch.testing.assert_close(found.double(), parameter.grad, atol=1e-5, rtol=1e-3)
