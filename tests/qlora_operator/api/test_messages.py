"""Faults in a user's words."""

from typing import Any

import pytest

from qlora_operator.api.messages import (
    described,
    expected,
    field_of_spec,
    no_such_field,
    schema_at,
    unknown_field,
)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "nothing (null)"),
        (True, "the boolean true"),
        (16, "the number 16"),
        (1.5, "the number 1.5"),
        (10**5000, "the number with too many digits to show"),
        ("16", "the string '16'"),
        ("a\n", r"the string 'a\n'"),
        ("\ud800", r"the string '\ud800'"),
        ("x" * 100, f"the string '{'x' * 59}..."),
        ([1], "a list"),
        ({"a": 1}, "a map"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)
def test_a_wrong_value_is_described_by_its_type(value: object, words: str) -> None:
    """The type comes first, since it is what is wrong most often; the value follows if it can be shown."""
    assert described(value) == words


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "boolean"}, "true or false"),
        ({"type": "integer", "minimum": 1, "maximum": 8}, "an integer from 1 to 8"),
        ({"type": "integer", "minimum": 1}, "an integer from 1"),
        ({"type": "integer", "maximum": 8}, "an integer at most 8"),
        ({"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1}, "a number above 0, at most 1"),
        ({"type": "number", "minimum": 0, "maximum": 1, "exclusiveMaximum": True}, "a number from 0, below 1"),
        ({"type": "string"}, "a string"),
        ({"type": "string", "minLength": 1}, "a string of at least 1 characters"),
        ({"type": "string", "maxLength": 5}, "a string of at most 5 characters"),
        ({"type": "string", "pattern": "^a$"}, "a string that matches ^a$"),
        ({"type": "string", "enum": ["a", "b"]}, "one of a, b"),
        ({"type": "integer", "enum": [64]}, "64"),
        ({"type": "array", "maxItems": 2, "items": {"type": "string"}}, "a list of at most 2 items, each a string"),
        ({"type": "object", "properties": {"a": {}, "b": {}}}, "a map with a, b"),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"]}, "a map with b"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "a map, each value a string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_would_be_right_is_read_from_the_schema(schema: dict[str, Any], words: str) -> None:
    """Types, values and bounds of a schema make a phrase."""
    assert expected(schema) == words


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("maxstep", "did you mean maxSteps?"),
        ("max_steps", "did you mean maxSteps?"),
        ("MAXSTEPS", "did you mean maxSteps?"),
        ("zzz", "there are epochs, maxSteps"),
        ("x" * 10**6, "there are epochs, maxSteps"),
    ],
    ids=["missing letter", "snake case", "capitals", "nothing near", "a megabyte"],
)
def test_an_unknown_field_is_compared_with_the_known_ones(name: str, phrase: str) -> None:
    """The nearest field is suggested; without one, all are listed."""
    assert phrase in unknown_field(name, ["epochs", "maxSteps"])


@pytest.mark.parametrize(
    ("location", "phrase"),
    [
        (["spec", "training", "max_steps"], "did you mean maxSteps?"),
        (["spec", "maxSteps"], "did you mean spec.training.maxSteps?"),
        (["spec", "training", "every_steps"], "one of spec.evaluation.everySteps, spec.checkpoint.everySteps?"),
        (["model"], "did you mean spec.model?"),
        (["data"], "here it is spec.dataset.source"),
        (["spec", "training", "lr"], "here it is spec.training.learningRate"),
        (["spec", "adapter", "r"], "here it is spec.adapter.rank"),
        (["spec", "training", "use_dora"], "there is no DoRA"),
        (["spec", "training", "learning_rat"], "did you mean learningRate?"),
        (["spec", "quantization", "zzz"], "there are scheme"),
    ],
)  # fmt: skip
def test_an_unknown_field_of_a_job_is_looked_for(location: list[str], phrase: str) -> None:
    """In another spelling, at another place, under the name that another program has for it, and by likeness."""
    assert phrase in no_such_field(location, "spec.")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("learning_rate", "training.learningRate"),
        ("lora-r", "adapter.rank"),
        ("everySteps", None),
        ("zzz", None),
    ],
)
def test_a_name_alone_is_a_field_where_only_one_has_it(name: str, path: str | None) -> None:
    """In any spelling."""
    assert field_of_spec(name) == path


def test_a_place_in_a_job_has_a_schema() -> None:
    """Locations lead through objects, lists and maps."""
    assert schema_at(["spec", "isa", "allowed", 1])["enum"][0] == "amx_bf16"
    assert schema_at(["spec", "scheduling", "nodeSelector", "any"])["maxLength"] == 63
    assert schema_at([])["required"] == ["apiVersion", "kind", "metadata", "spec"]
