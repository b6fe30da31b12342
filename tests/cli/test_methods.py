from __future__ import annotations

import pytest

from pfed_cli.methods import TITLES, Method, plan_of
from pfedsecure.plan import Plan, ProtectionPlan

PLAN = Plan(class_names=("cat", "dog"), seed=7, protection=ProtectionPlan(matching="plain"))


@pytest.mark.parametrize(
    ("method", "section", "field", "value"),
    [
        (Method.RANDOM_EXPERTS, "protection", "matching", "random"),
        (Method.GATE_ONLY, "mixture", "experts", 0),
        (Method.PROMPTFL, None, "method", "promptfl"),
        (Method.LOCAL, None, "method", "promptfl"),
        (Method.ZERO_SHOT, None, "method", "promptfl"),
    ],
)
def test_a_method_changes_one_setting(method: Method, section: str | None, field: str, value: object) -> None:
    expected = PLAN.model_dump()
    (expected[section] if section else expected)[field] = value

    assert plan_of(method, PLAN).model_dump() == expected
    assert plan_of(method, plan_of(method, PLAN)) == plan_of(method, PLAN)


def test_the_plan_itself_is_of_pfedmoap() -> None:
    assert plan_of(Method.PFEDMOAP, PLAN) is PLAN


def test_every_method_has_a_title() -> None:
    assert set(TITLES) == set(Method)
