"""What a caller may ask for, and how refusals read."""

import math
import subprocess
import sys
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


def test_every_method_has_a_schema() -> None:
    schemas = describe_methods()
    assert set(schemas) == set(METHODS)
    assert schemas["pargs"]["properties"]["top_k"]["maximum"] == 64
