"""What holds for every method."""

import random
from pathlib import Path
from typing import Any

import pytest

from steersman.training.dpo import METHODS
from steersman.training.errors import ConfigError
from steersman.training.policies.arguments import MethodName
from steersman.training.prefixes import truncate
from tests.support.policies import EOS, begin, compute_loss, draw_rows, make_trainer


@pytest.mark.parametrize("method", METHODS)
def test_padding_takes_part_in_no_loss_and_needs_no_token_of_its_own(
    folder: Path, rng: random.Random, method: MethodName
) -> None:
    rows = draw_rows(rng, 4, aspects=1)
    keys = {"weights": {"first": 1.0}} if method in ("1d", "2d") else {}
    losses = []
    for padding in (True, False):
        trainer = make_trainer(folder, method, rows, padding, **keys)
        (batch,) = trainer.get_train_dataloader()
        losses.append(compute_loss(trainer, batch))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_response_that_is_cut_is_given_no_end_token(folder: Path, rng: random.Random, method: MethodName) -> None:
    """Where it ends is where the cut is: a policy that learned an end there would stop."""
    rows = draw_rows(rng, 8, aspects=5)
    for keep in (0.3, 1.0):
        trainer = make_trainer(folder, method, truncate(rows, keep), train_sampling_strategy="sequential")
        ends = sum(
            int((value == EOS).sum())
            for batch in trainer.get_train_dataloader()
            for name, value in batch.items()
            if name.endswith("input_ids") and not name.startswith(("KL", "prompt"))
        )
        whole = [row for row in rows for response in (row.chosen, row.rejected) if begin(response, keep) == response]
        assert ends == len(whole)


OWN_LOSS: tuple[MethodName, ...] = ("tdpo1", "tdpo2", "2d", "1d")
"""Methods whose loss is none of TRL's."""
PAPER = {"helpfulness": 0.3, "correctness": 0.4, "safety": 0.1, "completeness": 0.1, "clarity": 0.1}


def config_of(tmp_path: Path, method: MethodName, **keys: Any) -> Any:
    """A method's configuration, `keys` set after TRL's own checks."""
    config = METHODS[method].config(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for name, value in keys.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("method", OWN_LOSS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("loss_weights", [1.0]),
        ("loss_type", ["ipo"]),
        ("ld_alpha", 0.5),
        ("f_divergence_type", "js_divergence"),
        ("f_alpha_divergence_coef", 0.1),
        ("label_smoothing", 0.1),
        ("use_weighting", True),
        ("discopop_tau", 0.1),
        ("router_aux_loss_coef", 0.1),
        ("precompute_ref_log_probs", True),
        ("sft_weight", -0.1),
    ],
)
def test_what_a_loss_of_its_own_has_no_use_for_is_refused(
    tmp_path: Path, method: MethodName, option: str, value: Any
) -> None:
    METHODS[method].check(config_of(tmp_path, method, sft_weight=0.0))
    with pytest.raises(ConfigError, match=option):
        METHODS[method].check(config_of(tmp_path, method, **{option: value}))


@pytest.mark.parametrize(
    ("method", "keys", "complaint"),
    [
        ("tdpo1", {"alpha": 0.3}, "alpha: it belongs to method tdpo2"),
        ("tdpo1", {"alpha": -1.0}, "alpha"),
        ("tdpo2", {"alpha": 0.0}, None),
        ("tdpo2", {"alpha": -0.1}, "alpha is at least 0, not -0.1"),
        ("1d", {"weights": {"safety": 2.0}}, None),
        ("1d", {"weights": {"safety": 2.0, "clarity": 1.0}}, "method 1d has one aspect, not safety, clarity"),
        ("2d", {"weights": {"safety": 2.0, "clarity": 1.0}}, None),
        ("2d", {"weights": {"safety": 2.0}}, None),
        ("simpo", {"loss_type": "hinge"}, "method simpo has its own, not hinge"),
        ("simpo", {}, None),
        ("kto", {"train_sampling_strategy": "sequential"}, None),
        ("kto", {"train_sampling_strategy": "random"}, "random would tear KTO's batches apart"),
        *(
            (
                "kto",
                {"train_sampling_strategy": "sequential", "per_device_train_batch_size": size},
                None if size in (4, 6) else f"an even number of at least 4, not {size}",
            )
            for size in (1, 2, 3, 4, 5, 6)
        ),
    ],
)
def test_settings_of_one_method_are_checked_by_it(
    tmp_path: Path, method: MethodName, keys: dict[str, Any], complaint: str | None
) -> None:
    config = config_of(tmp_path, method, **keys)
    if complaint is None:
        METHODS[method].check(config)
        return
    with pytest.raises(ConfigError, match=complaint):
        METHODS[method].check(config)


@pytest.mark.parametrize(
    ("method", "keys", "facts"),
    [
        ("tdpo1", {}, {"loss": "tdpo1"}),
        ("tdpo1", {"sft_weight": 0.2}, {"loss": "tdpo1", "sft_weight": 0.2}),
        ("tdpo2", {}, {"loss": "tdpo2", "alpha": 0.5}),
        ("2d", {}, {"loss": "2d", "weights": PAPER, "sft_weight": 0.1}),
        ("2d", {"sft_weight": 0.0}, {"loss": "2d", "weights": PAPER}),
        ("1d", {}, {"loss": "1d", "weights": {"helpfulness": 1.0}, "sft_weight": 0.1}),
        ("1d", {"weights": {"safety": 2.0}}, {"loss": "1d", "weights": {"safety": 2.0}, "sft_weight": 0.1}),
        ("kto", {"loss_type": "apo_zero_unpaired"}, {"loss": "apo_zero_unpaired"}),
        ("orpo", {}, {"loss": "orpo"}),
        ("simpo", {"simpo_gamma": 0.7}, {"loss": "simpo", "simpo_gamma": 0.7}),
        ("simpo", {"simpo_gamma": 0.7, "cpo_alpha": 0.3}, {"loss": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.3}),
    ],
)
def test_a_model_remembers_the_loss_that_it_was_trained_with(
    tmp_path: Path, method: MethodName, keys: dict[str, Any], facts: dict[str, Any]
) -> None:
    assert METHODS[method].describe(config_of(tmp_path, method, **keys)) == facts


def test_strengths_are_the_papers_unless_others_are_given(tmp_path: Path) -> None:
    assert [config_of(tmp_path, method).beta for method in ("2d", "1d", "simpo")] == [0.2, 0.2, 2.0]
    assert [config_of(tmp_path, method).sft_weight for method in OWN_LOSS] == [0.0, 0.0, 0.1, 0.1]


def test_segments_must_be_scored_by_the_aspects_that_a_method_weighs(tmp_path: Path) -> None:
    given = {"weights": {"safety": 2.0, "clarity": 1.0}}
    assert METHODS["2d"].aspects(config_of(tmp_path, "2d")) == list(PAPER)
    assert METHODS["2d"].aspects(config_of(tmp_path, "2d", **given)) == ["safety", "clarity"]
    assert METHODS["1d"].aspects(config_of(tmp_path, "1d")) == ["helpfulness"]
    assert [name for name in METHODS if METHODS[name].in_order] == ["kto"], "its batches are made beforehand"


@pytest.mark.parametrize("method", ["dpo", "tdpo2", "2d", "orpo", "simpo"])
def test_rows_are_grouped_by_their_longer_side(folder: Path, rng: random.Random, method: MethodName) -> None:
    rows = draw_rows(rng, 6, aspects=5)
    lengths = make_trainer(folder, method, rows).train_dataset["length"]
    assert list(lengths) == [len(row.prompt) + max(len(row.chosen), len(row.rejected)) for row in rows]
