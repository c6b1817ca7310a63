"""What a caller may ask for, and how refusals read."""

import copy
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from steersman.guidance.plan import Transform, compile_plan
from steersman.guidance.request import METHODS, GuidanceError, describe_methods, parse_guidance


def test_the_request_types_import_no_torch() -> None:
    code = "import steersman.guidance.plan, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_short_form_is_one_plain_term() -> None:
    short = compile_plan(parse_guidance({"method": "pargs", "reward_model": "a", "beta": 2}))
    long = compile_plan(parse_guidance({"method": "pargs", "rewards": [{"model": "a"}], "beta": 2.0}))
    assert short == long
    formula = short.formula
    assert (formula.top_k, formula.end_token, formula.tokens_per_step) == (10, False, 11)


def test_a_plan_carries_every_transform_as_numbers() -> None:
    plan = compile_plan(
        parse_guidance(
            {
                "method": "args",
                "end_token": True,
                "top_k": 4,
                "rewards": [
                    {"model": "a", "weight": -0.5, "transform": "affine", "scale": 2.0, "shift": 1.0},
                    {"model": "b", "transform": "log_sigmoid", "reference": 0.3},
                ],
            }
        )
    )
    first, second = plan.formula.rewards
    assert (first.weight, first.transform, first.scale, first.shift) == (-0.5, Transform.AFFINE, 2.0, 1.0)
    assert (second.weight, second.transform, second.scale, second.shift) == (1.0, Transform.LOG_SIGMOID, 1.0, -0.3)
    assert plan.formula.tokens_per_step == 9


@pytest.mark.parametrize(
    ("value", "field", "says"),
    [
        ([], "guidance", "must be an object"),
        ({}, "guidance.method", "is missing; choose one of pargs, args"),
        ({"method": "magic"}, "guidance.method", "choose one of"),
        ({"method": "pargs"}, "guidance", "either reward_model or rewards"),
        ({"method": "pargs", "reward_model": "a", "strength": 1}, "guidance.strength", "known fields are"),
        ({"method": "pargs", "reward_model": "a", "beta": -1}, "guidance.beta", "greater than or equal to 0"),
        ({"method": "pargs", "reward_model": "a", "beta": math.nan}, "guidance.beta", "finite"),
        ({"method": "pargs", "reward_model": "a", "top_k": 65}, "guidance.top_k", "less than or equal to 64"),
        ({"method": "pargs", "rewards": [{"model": "a"}, {"model": "a"}]}, "guidance", "names a model twice"),
        (
            {"method": "pargs", "rewards": [{"model": "a", "reference": 1.0}]},
            "guidance.rewards.0",
            'reference needs "transform": "log_sigmoid"',
        ),
    ],
)
def test_a_refusal_names_the_field_and_the_way_out(value: Any, field: str, says: str) -> None:
    with pytest.raises(GuidanceError) as refusal:
        parse_guidance(value)
    assert refusal.value.field == field
    assert says in str(refusal.value)


def _integers(schema: Any) -> Iterator[dict[str, Any]]:
    """Every integer in a JSON schema, wherever it stands."""
    if isinstance(schema, dict) and schema.get("type") == "integer":
        yield schema
    children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for child in children:
        yield from _integers(child)


@pytest.mark.parametrize("method", METHODS)
def test_every_integer_has_limits_that_fit_32_bits(method: str) -> None:
    for schema in _integers(describe_methods()[method]):
        assert schema["minimum"] >= 1
        assert schema["minimum"] < schema["maximum"] < 2**31, schema


INTEGERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "top_k": ({"method": "pargs", "reward_model": "a"}, ("top_k",)),
    "first_tokens": ({"method": "mixed", "policy": "a", "mix": 1.0, "gate": {}}, ("gate", "first_tokens")),
    "gate's samples": (
        {"method": "mixed", "policy": "a", "mix": 1.0, "gate": {"kl_above": 1.0, "estimator": "monte_carlo"}},
        ("gate", "samples"),
    ),
    "samples": (
        {"method": "kl_threshold", "policy": "a", "threshold": 1.0, "estimator": "monte_carlo"},
        ("samples",),
    ),
    "length": ({"method": "length_control", "policy": "a"}, ("length",)),
    "n": ({"method": "best_of_n", "reward_model": "a"}, ("n",)),
    "n of a block": ({"method": "blockwise", "reward_model": "a"}, ("n",)),
    "block": ({"method": "blockwise", "reward_model": "a", "n": 2}, ("block",)),
}


@pytest.mark.parametrize(("guidance", "path"), INTEGERS.values(), ids=INTEGERS)
def test_an_integral_float_is_an_integer_and_nothing_else_is(
    rng: random.Random, guidance: dict[str, Any], path: tuple[str, ...]
) -> None:
    def parse(value: Any) -> Any:
        asked = copy.deepcopy(guidance)
        (asked["gate"] if path[0] == "gate" else asked)[path[-1]] = value
        return parse_guidance(asked)

    number = rng.randint(2, 64)
    assert parse(float(number)) == parse(number)
    field = ".".join(("guidance", *path))
    for value in (number + 0.5, True, str(number), [number], 2**70, 1e30):
        with pytest.raises(GuidanceError) as refusal:
            parse(value)
        assert refusal.value.field == field


def test_every_method_has_a_schema() -> None:
    schemas = describe_methods()
    assert set(schemas) == set(METHODS)
    assert schemas["pargs"]["properties"]["top_k"]["anyOf"][0]["maximum"] == 64
