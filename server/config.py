"""What the server is told about guidance, as plain data that travels to vLLM's workers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steersman.guidance.checkpoints import ModelRefused

CONFIG_KEY = "steersman"
"""Where the configuration lies in vLLM's `additional_config`, and a request's guidance in its `extra_args`."""


@dataclass(frozen=True)
class ServerConfig:
    """Reward models and policies by name, and the memory that their caches may take."""

    reward_models: dict[str, str]
    policies: dict[str, str]
    cache_gib: float

    def dump(self) -> dict[str, Any]:
        """As JSON-like data."""
        return asdict(self)

    @property
    def cache_bytes_per_model(self) -> int:
        """The models share the memory evenly."""
        return int(self.cache_gib * 2**30) // max(1, len(self.reward_models) + len(self.policies))


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
