"""The logits processor that fits vLLM's model runner."""

from types import SimpleNamespace

import pytest

from steersman.server.adapters import attach_adapter


class Config:
    """A configuration of vLLM: whether Model Runner V2 is used may depend on the custom processors in it."""

    def __init__(self, preferred: bool, with_processors: bool, processors: list[str] | None) -> None:
        self.model_config = SimpleNamespace(logits_processors=processors)
        self._preferred, self._with_processors = preferred, with_processors

    @property
    def use_v2_model_runner(self) -> bool:
        return self._preferred and (self._with_processors or not self.model_config.logits_processors)


@pytest.mark.parametrize(
    ("preferred", "with_processors", "version"), [(True, True, "v2"), (True, False, "v1"), (False, True, "v1")]
)
@pytest.mark.parametrize("others", [None, ["their:Processor"]])
def test_the_adapter_is_that_of_the_runner_that_serves_with_it(
    preferred: bool, with_processors: bool, version: str, others: list[str] | None
) -> None:
    config = Config(preferred, with_processors, others)
    attach_adapter(config)
    own = f"steersman.server.logits_{version}:GuidanceLogitsProcessor"
    assert config.model_config.logits_processors == [*(others or []), own]


def test_a_release_without_the_second_runner_gets_the_first_adapter() -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(logits_processors=None))
    attach_adapter(config)
    assert config.model_config.logits_processors == ["steersman.server.logits_v1:GuidanceLogitsProcessor"]
