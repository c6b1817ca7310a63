"""Requests of every kind that the OpenAPI document allows, and of kinds that it does not: no 5xx, key or no key."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from schemathesis import Case, GenerationMode

from tests.support.server import Server

CASES = 2_000
WITH_KEY, WITHOUT = 300, 40
"""Of one operation; most have fewer."""
MODELS = {"/v1/rewards": "first"}
LENGTHS = {"/v1/responses": "max_output_tokens"}
TOKENS = 2
GENERATING = {
    *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/v1/messages"),
    "/invocations",
}


@pytest.fixture(scope="module")
def schema(limited: Server) -> Any:
    return schemathesis.openapi.from_dict(limited.get("/openapi.json").json())


def test_no_request_is_a_server_error(limited: Server, schema: Any) -> None:
    sent, failures = 0, []
    with requests.Session() as session:
        for headers, most, wanted in ((limited.headers, WITH_KEY, None), ({}, WITHOUT, 401)):
            for case in _cases(schema, most):
                response = case.call(base_url=limited.url, headers=headers, session=session, timeout=60)
                sent += 1
                # Health is for everybody, also while the keys are wrong.
                wrong = wanted is not None and response.status_code != wanted and case.path != "/health"
                if response.status_code >= 500 or wrong:
                    failures.append(
                        f"{response.status_code} {response.text:.200} for {case.method} {case.path} {case.body}"
                    )
    assert not failures, "\n".join(failures)
    assert sent >= CASES
    assert limited.complete("the lamp", max_tokens=2)["choices"]


def _cases(schema: Any, most: int) -> Iterator[Case]:
    """Boundary values of every field, allowed ones and not, beside a model that is there and for short answers."""
    for result in schema.get_all_operations():
        operation = result.ok()
        cases = schema.iter_coverage_cases(
            operation,
            generation_modes=list(GenerationMode),
            generation_config=schema.config.generation_for(operation=operation),
        )
        for case in itertools.islice(cases, most):
            if isinstance(case.body, dict) and isinstance(case.body.get("model", ""), str):
                case.body["model"] = MODELS.get(operation.path, "base")
            if isinstance(case.body, dict) and operation.path in GENERATING:
                _shorten(case.body, LENGTHS.get(operation.path, "max_tokens"))
            yield case


def _shorten(body: dict[str, Any], usual: str) -> None:
    """Keeps values that are refused, and those that are short already."""
    for field in (usual, "max_tokens", "max_completion_tokens"):
        value = body.get(field)
        if (field == usual and value is None) or (isinstance(value, int) and value > TOKENS):
            body[field] = TOKENS
