"""What a request's body tells the engine beside vLLM's sampling parameters."""

from typing import Any

import pytest

from steersman.server.config import CONFIG_KEY
from steersman.server.protocol import GuidedChatCompletionRequest, GuidedCompletionRequest

GUIDANCE = {"method": "blockwise", "reward_model": "first", "n": 2}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tools"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": NAMED}, "tool_choice"),
    ],
)
def test_the_field_that_constrains_an_answer_is_the_one_that_was_sent(
    change: dict[str, Any], field: str | None
) -> None:
    message = {"role": "user", "content": "hi"}
    request = GuidedChatCompletionRequest(messages=[message], guidance=GUIDANCE, **change)
    # As vLLM's tool parsers do before the sampling parameters are made.
    request.response_format, request.structured_outputs = None, None
    params = request.to_sampling_params(max_tokens=4, default_sampling_params={})
    assert params.extra_args[CONFIG_KEY]["constraint_field"] == field


def test_a_completion_names_its_constraint_too() -> None:
    request = GuidedCompletionRequest(prompt="hi", guidance=GUIDANCE, response_format={"type": "json_object"})
    params = request.to_sampling_params(max_tokens=4)
    assert params.extra_args[CONFIG_KEY]["constraint_field"] == "response_format"
