"""The YAML files that ship: each key once, and alike where two models are compared."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from trl.trainer.reward_config import RewardConfig

from steersman.training import reward
from steersman.training.configuration import parse
from steersman.training.dpo import METHODS, config_type
from steersman.training.heads.arguments import HeadPolicyConfig, HeadRewardConfig
from steersman.training.heads.policy import check_policy_config
from steersman.training.iterative.iterate import IterateArguments
from steersman.training.iterative.representatives import read_representatives
from steersman.training.policies.arguments import DPOArguments
from steersman.training.policies.two_dimensional import TwoDimensionalConfig
from steersman.training.rewards.arguments import RewardArguments, check
from steersman.training.world.aspects import WEIGHTS
from steersman.training.world.build import CONFIGS, REWARD_MODELS


def read(path: Path) -> dict[str, Any]:
    """The mapping; YAML's loader would silently keep the last of two equal keys."""
    keys = [key.value for key, _ in yaml.compose(path.read_text(encoding="utf-8")).value]
    assert len(keys) == len(set(keys))
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("reward-*.yaml")), ids=lambda path: path.stem)
def test_a_config_of_a_reward_model_names_its_own_model_and_objective(path: Path) -> None:
    read(path)
    argv = ["--config", str(path)]
    arguments, config = parse("reward", RewardArguments, reward.config_type(argv), argv)
    check(arguments)
    assert config.output_dir == f"models/{path.stem}"
    name = path.stem.removeprefix("reward-").replace("-", "_")
    assert arguments.objective == ("full" if name == "evaluation" else name)


def test_partial_and_full_differ_only_in_objective() -> None:
    partial, full = (read(CONFIGS / f"{name}.yaml") for name in REWARD_MODELS[:2])
    differing = {key for key in partial.keys() | full.keys() if partial.get(key) != full.get(key)}
    assert differing == {"objective", "output_dir", "prefixes", "prefixes_per_pair"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("dpo*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_policy_s_config_belongs_to_its_method(path: Path) -> None:
    config, argv = read(path), ["--config", str(path)]
    arguments, settings = parse("dpo", DPOArguments, config_type(argv), argv)
    if arguments.head:
        check_policy_config(arguments, settings)
    else:
        METHODS[arguments.method].check(settings)
    assert (config["output_dir"], config["model"]) == (f"models/{path.stem}", "models/base")
    assert (arguments.method, settings.beta) == (config.get("method", "dpo"), config["beta"])
    assert f"steersman train dpo --config {path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_heads_of_the_world_are_trained_by_the_defaults(kind: str) -> None:
    config = read(CONFIGS / f"{kind}-head.yaml")
    kinds: dict[str, Any] = {"reward": (RewardArguments, HeadRewardConfig), "dpo": (DPOArguments, HeadPolicyConfig)}
    for defaults in kinds[kind]:
        for field in fields(defaults):
            if field.name.startswith("head_") or field.name in ("learning_rate", "num_train_epochs", "weight_decay"):
                assert config.get(field.name, field.default) == field.default, field.name


def test_aspects_weigh_the_same_in_the_reward_model_and_the_policy() -> None:
    for name in ("reward-aspects", "dpo-2d"):
        assert read(CONFIGS / f"{name}.yaml")["weights"] == WEIGHTS
    argv = ["--config", str(CONFIGS / "reward-aspects.yaml")]
    arguments, _ = parse("reward", RewardArguments, RewardConfig, argv)
    assert (arguments.objective, arguments.weights) == ("aspects", WEIGHTS)


def test_iteration_knows_how_each_of_the_world_s_aspects_is_represented() -> None:
    argv = ["--config", str(CONFIGS / "iterate.yaml")]
    arguments, _ = parse("iterate", IterateArguments, TwoDimensionalConfig, argv)
    assert set(read_representatives(arguments.representatives, list(WEIGHTS))) == set(WEIGHTS)
    assert f"--aspects_at segments --output_dir {arguments.reward_model}" in (CONFIGS / "iterate.yaml").read_text()


def test_dpo_starts_from_the_base_and_trains_on_whole_responses() -> None:
    config = read(CONFIGS / "dpo.yaml")
    assert (config["model"], config["output_dir"], config["keep"]) == ("models/base", "models/dpo", 1.0)


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files_and_knows_every_key(path: Path) -> None:
    loaded = load_config_from_file(str(path))
    assert loaded.num_machines == 1
    launch = launch_command_parser()
    flags = {action.dest for action in launch._actions}
    own = read(path)
    for section in ("fsdp_config", "deepspeed_config"):
        keys = {**own.get(section, {})}
        assert keys.keys() <= flags
        assert getattr(loaded, section) == keys
