"""The logits processor that fits vLLM's model runner, and what both of them share."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from steersman.guidance.checkpoints import ModelRefused
from steersman.server.adapters import attach_adapter, changes_logits, force_tokens, require_exact_drafts


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


@pytest.mark.parametrize(
    ("params", "changes"),
    [
        ({}, False),
        ({"temperature": 0.3, "top_p": 0.5, "top_k": 3, "presence_penalty": 1.0, "repetition_penalty": 1.3}, False),
        ({"logit_bias": {3: 1.0}}, True),
        ({"allowed_token_ids": [4]}, True),
        ({"bad_words": ["no"]}, True),
        ({"min_tokens": 2}, True),
        ({"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])}, True),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value),
)
def test_biases_and_masks_change_logits_and_what_comes_behind_them_does_not(
    params: dict[str, Any], changes: bool
) -> None:
    assert changes_logits(SamplingParams(**params)) is changes


def test_one_token_is_left_in_the_rows_of_texts_that_are_not_complete(rng: random.Random) -> None:
    logits = torch.randn(4, 9)
    own, texts = logits.clone(), [[rng.randrange(9) for _ in range(3)] for _ in range(3)]
    force_tokens(logits, [(3, texts[0], 0), (0, texts[1], 2), (1, texts[2], 3)])
    probabilities = logits.softmax(-1)
    assert [float(probabilities[row, token]) for row, token in ((3, texts[0][0]), (0, texts[1][2]))] == [1.0, 1.0]
    assert torch.equal(logits[1:3], own[1:3])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"rejection_sample_method": "block"}, None),
        ({"rejection_sample_method": "synthetic"}, "choose standard or block"),
        ({"enable_adaptive_verification": True}, "enable_adaptive_verification"),
        ({"use_v2_model_runner": False}, "Model Runner V2"),
        ({"enable_batch_sharded_sampling": True}, "leave one of the two out"),
    ],
)
def test_speculation_that_would_not_be_exact_is_refused_at_start(change: dict[str, Any], says: str | None) -> None:
    known: dict[str, Any] = {
        **{"rejection_sample_method": "standard", "enable_adaptive_verification": False},
        **{"use_v2_model_runner": True, "enable_batch_sharded_sampling": False},
        **change,
    }
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(**known), parallel_config=SimpleNamespace(**known), **known
    )
    if says is None:
        require_exact_drafts(config)
    else:
        with pytest.raises(ModelRefused, match=f"^--speculative-config: .*{says}"):
            require_exact_drafts(config)
    config.speculative_config = None
    require_exact_drafts(config)
