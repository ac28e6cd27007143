"""Rules between fields, in both of their languages."""

from typing import ClassVar

import pytest
from pydantic import ValidationError

from qlora_operator.api.rules import ApiModel, Rule


class Inner(ApiModel):
    low: int
    high: int

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="self.low <= self.high",
            holds=lambda inner: inner.low <= inner.high,
            message="low may not exceed {high}",
            field=("low",),
        ),
        Rule(cel="self.high < 10", holds=lambda inner: inner.high < 10, message="too high"),
    )


class Outer(ApiModel):
    inner: Inner


def test_every_broken_rule_is_reported_where_its_fault_lies() -> None:
    """Two broken rules are two errors, each at its field, with the message as it was written."""
    with pytest.raises(ValidationError) as error:
        Outer.model_validate({"inner": {"low": 12, "high": 11}})

    assert [(details["loc"], details["msg"]) for details in error.value.errors()] == [
        (("inner", "low"), "low may not exceed {high}"),
        (("inner",), "too high"),
    ]


def test_rules_that_hold_let_the_object_pass() -> None:
    """An object that breaks no rule is made."""
    assert Outer.model_validate({"inner": {"low": 1, "high": 2}}).inner.high == 2


def test_the_schema_has_the_rules_in_cel() -> None:
    """A model's JSON schema carries its rules, with the path of the field if there is one."""
    assert Inner.model_json_schema()["x-kubernetes-validations"] == [
        {"rule": "self.low <= self.high", "message": "low may not exceed {high}", "fieldPath": ".low"},
        {"rule": "self.high < 10", "message": "too high"},
    ]
    assert "x-kubernetes-validations" not in Outer.model_json_schema()
