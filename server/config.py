"""What the server is told about guidance, as plain data that travels to vLLM's workers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.head_files import is_head
from steersman.guidance.text_form import PAIR, RAW

CONFIG_KEY = "steersman"
"""Where the configuration lies in vLLM's `additional_config`, and a request's guidance in its `extra_args`."""
WORKER_EXTENSION = "steersman.server.worker.GuidanceWorkerExtension"
"""vLLM's `worker_extension_cls`: how the API process reaches the guidance of its workers."""


class GuidanceEntry(dict[str, Any]):
    """A request's guidance on its way to the workers, under CONFIG_KEY. A type of its own, so that what a client puts
    under that key, which is a plain value, is never taken for it."""


@dataclass(frozen=True)
class ServerConfig:
    """Reward models and policies by name, the memory that their caches may take, and the forms of reward models that
    are scored from text (see `choose_form`)."""

    reward_models: dict[str, str]
    policies: dict[str, str]
    cache_gib: float
    reward_templates: dict[str, str] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        """As JSON-like data."""
        return asdict(self)

    @property
    def cached_models(self) -> int:
        """Models that have a key-value cache: all but heads."""
        return sum(not is_head(path) for path in (*self.reward_models.values(), *self.policies.values()))

    @property
    def cache_bytes_per_model(self) -> int:
        """Models that have a cache share the memory evenly."""
        return int(self.cache_gib * 2**30) // max(1, self.cached_models)


def load_config(additional_config: Mapping[str, Any]) -> ServerConfig:
    """Reads what `ServerConfig.dump` wrote into vLLM's configuration."""
    return ServerConfig(**additional_config[CONFIG_KEY])


def parse_named_paths(option: str, values: Sequence[str]) -> dict[str, str]:
    """NAME=PATH arguments as a dictionary; raises ModelRefused for one that is malformed or given twice."""
    named: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not name or not path:
            raise ModelRefused(f"{option} {value}: give NAME=PATH_OR_REPO, for example {option} helpful=./reward")
        if name in named:
            raise ModelRefused(f"{option} {name} is given twice; names must differ")
        named[name] = path
    return named


def parse_templates(values: Sequence[str], reward_models: Mapping[str, str]) -> dict[str, str]:
    """`--reward-template NAME=raw|pair|FILE` arguments, files as their text; raises ModelRefused."""
    option = "--reward-template"
    templates = parse_named_paths(option, values)
    for name, value in templates.items():
        if name not in reward_models:
            known = ", ".join(sorted(reward_models)) or "none"
            raise ModelRefused(f"{option} {name}: no reward model has this name; --reward-model has: {known}")
        if value not in (RAW, PAIR):
            try:
                templates[name] = Path(value).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ModelRefused(
                    f"{option} {name}={value}: give raw, pair or the path of a Jinja file ({error})"
                ) from error
    return templates
