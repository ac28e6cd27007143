"""What users read of an invalid job: what is wrong with each field, and what would be right."""

import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_contract import remote
from qlora_operator.api import names, quantity, v1alpha1
from qlora_operator.api.schema import INT_OR_STRING, Schema, job_schema
from qlora_operator.api.yaml_reader import child_path

_SHOWN = 60
"""Characters of a wrong value that are shown."""


_FORMS = {
    quantity.MEMORY_PATTERN: "a quantity of memory such as 16Gi, as a string",
    names.JOB_NAME_PATTERN: names.JOB_NAME_RULE,
    v1alpha1.LABEL_VALUE_PATTERN: "the value of a label: letters, digits, '-', '_', '.', at most 63 of them",
    v1alpha1.LABEL_KEY_PATTERN: "the name of a label, such as kubernetes.io/hostname",
    v1alpha1.SUBDOMAIN_PATTERN: "lower-case letters, digits, '-' and '.', at most {maxLength} characters",
    v1alpha1.MANAGER_PATTERN: "a controller such as kueue.x-k8s.io/multikueue, at most 63 characters",
    v1alpha1.IMAGE_PATTERN: "an image, such as registry.example/team/trainer@sha256:...",
    remote.PVC_PATTERN: "pvc://claim/path, at most 512 characters",
    remote.MODEL_PATTERN: "pvc://claim/path, hf://org/name or s3://bucket/path, at most 512 characters",
    remote.DATASET_PATTERN: "pvc://claim/path, hf://datasets/org/name/path or s3://bucket/path, at most 512 "
    "characters",
    remote.DESTINATION_PATTERN: "hf://org/name or s3://bucket/path, at most 512 characters",
    remote.SECRET_PATTERN: "the name of a Secret: lower-case letters, digits, '-' and '.'",
    remote.REVISION_PATTERN: "a branch, tag or commit of the Hub, at most 128 characters",
}
"""Pattern of a string -> what it means to people, with placeholders for the schema's bounds. Other strings are
described by their bounds."""


def validation_faults(error: ValidationError) -> list[tuple[str, str]]:
    """(field path, message) of every fault that pydantic found in a job, in the order of the fields."""
    # Each side of a union reports a fault of its own.
    found = error.errors(include_url=False)
    for details in found:
        details["loc"] = _field(details["loc"])
    return list(
        dict.fromkeys(
            (functools.reduce(child_path, details["loc"], ""), _message(details)) for details in found
        )
    )


def _field(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The location without the side of the union that pydantic adds to it."""
    for length in range(1, len(location)):
        try:
            if INT_OR_STRING in schema_at(location[:length]):
                return location[:length]
        except KeyError:  # no such field
            break
    return location


def _message(details: ErrorDetails) -> str:
    location = details["loc"]
    if details["type"] == "extra_forbidden":
        return unknown_field(str(location[-1]), schema_at(location[:-1])["properties"])
    if details["type"] == "missing":
        return f"is required: {expected(schema_at(location))}"
    if details["type"] in ("rule", "value_error"):
        return details["msg"].removeprefix("Value error, ")
    return f"is {described(details['input'])}; it must be {expected(schema_at(location))}"


def unknown_field(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """That there is no such field, and which one was perhaps meant.

    Args:
        name: the field.
        known: the fields that there are.
    """
    folded = {field.replace("_", "").lower(): field for field in known}
    near = difflib.get_close_matches(name[:_SHOWN].replace("_", "").lower(), folded, n=1)
    if near:
        return f"no such field; did you mean {folded[near[0]]}?"
    return f"no such field; there are {', '.join(known)}"


def schema_at(location: Sequence[str | int]) -> Schema:
    """The schema of what is at a location within a job. KeyError when the schema has no such field."""
    node = job_schema()
    for part in location:
        if isinstance(part, int):
            node = node["items"]
        elif "properties" in node:
            node = node["properties"][part]
        else:
            node = node["additionalProperties"]
    return node


def described(value: Any) -> str:
    """A wrong value: its type, and itself if it is short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, str):
        return f"the string {_shortened(ascii(value) if not value.isprintable() else repr(value))}"
    if isinstance(value, int | float):
        return f"the number {_number(value)}"
    return "a list" if isinstance(value, list) else "a map"


def _number(value: float) -> str:
    # Python refuses to print an integer of more than 4,300 digits.
    return str(value) if abs(value) < 10**_SHOWN else "beyond all bounds"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def expected(node: Schema) -> str:
    """What a value must be, according to its schema: `an integer from 1 to 512`."""
    if "enum" in node:
        values = ", ".join(str(value) for value in node["enum"])
        return f"one of {values}" if len(node["enum"]) > 1 else values
    if INT_OR_STRING in node:
        return f"an integer{_interval(node)}, or {node['pattern'].strip('^$')}"
    return _EXPECTED[node["type"]](node)


def _expected_string(node: Schema) -> str:
    if node.get("pattern") in _FORMS:
        return _FORMS[node["pattern"]].format_map(node)
    form = f" that matches {node['pattern']}" if "pattern" in node else ""
    return f"a string{_size(node, 'Length', 'characters')}{form}"


def _expected_list(node: Schema) -> str:
    return f"a list{_size(node, 'Items', 'items')}, each {expected(node['items'])}"


def _expected_map(node: Schema) -> str:
    if "properties" in node:
        return f"a map with {', '.join(node['properties'])}"
    size = _size(node, "Properties", "entries")
    return f"a map{size}, each value {expected(node['additionalProperties'])}"


_EXPECTED = {
    "boolean": lambda _: "true or false",
    "integer": lambda node: f"an integer{_interval(node)}",
    "number": lambda node: f"a number{_interval(node)}",
    "string": _expected_string,
    "array": _expected_list,
    "object": _expected_map,
}


def _interval(node: Schema) -> str:
    """` from 1 to 512`, ` above 0, at most 1`; empty without bounds."""
    low = high = ""
    if "minimum" in node:
        low = f" {'above' if node.get('exclusiveMinimum') else 'from'} {node['minimum']}"
    if "maximum" in node:
        word = "below" if node.get("exclusiveMaximum") else "to" if low.startswith(" from") else "at most"
        high = f"{',' if word != 'to' and low else ''} {word} {node['maximum']}"
    return low + high


def _size(node: Schema, kind: str, unit: str) -> str:
    """` of 1 to 64 items`; empty without bounds."""
    low, high = node.get(f"min{kind}"), node.get(f"max{kind}")
    if high is None:
        return "" if low is None else f" of at least {low} {unit}"
    return f" of {low} to {high} {unit}" if low is not None else f" of at most {high} {unit}"
