"""What a model does not know of a document."""

from typing import Any

import pytest
from pydantic import ConfigDict

from qlora_contract.base import ContractModel, split_unknown


class Inner(ContractModel):
    """An object within another."""

    some_number: int = 0


class Lenient(ContractModel):
    """One that ignores what it does not know."""

    model_config = ConfigDict(extra="ignore")


class Outer(ContractModel):
    """An object with all kinds of fields."""

    inner: Inner | None = None
    items: list[Inner] = []  # noqa: RUF012 - pydantic copies it
    lenient: Lenient = Lenient()
    labels: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it


@pytest.mark.parametrize(
    ("document", "known", "unknown"),
    [
        ({}, {}, []),
        ({"inner": {"someNumber": 1}}, {"inner": {"someNumber": 1}}, []),
        ({"inner": {"some_number": 1}}, {"inner": {}}, [("inner.some_number", 1)]),
        ({"a": {"b": 1}, "labels": {"c": "d"}}, {"labels": {"c": "d"}}, [("a", {"b": 1})]),
        ({"items": [{}, {"x": None}]}, {"items": [{}, {}]}, [("items[1].x", None)]),
        ({"lenient": {"x": 1}}, {"lenient": {"x": 1}}, []),
        ({"inner": [1], "items": {"x": 1}}, {"inner": [1], "items": {}}, [("items.x", 1)]),
        ({"inner": None, "items": "x"}, {"inner": None, "items": "x"}, []),
        ("x", "x", []),
    ],
    ids=[
        "nothing",
        "known fields",
        "a field by its Python name",
        "a field of the document",
        "a field in a list",
        "a model that ignores the rest",
        "values of another form",
        "plain values",
        "not a document",
    ],
)
def test_unknown_fields_are_taken_out_and_named(
    document: Any, known: Any, unknown: list[tuple[str, Any]]
) -> None:
    """Each is given with its path and value; everything else stays as it is."""
    assert split_unknown(document, Outer) == (known, unknown)
