"""What users read of an invalid job: what is wrong with each field, and what would be right."""

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from qlora_contract import remote
from qlora_contract.run_config import TRACKING_URI_PATTERN
from qlora_operator.api import foreign, hints, names, quantity, v1alpha1
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
    v1alpha1.TIME_ZONE_PATTERN: "the name of a time zone, such as Europe/Berlin, at most 64 characters",
    TRACKING_URI_PATTERN: "a server's address such as http://mlflow.tracking.svc:5000, without user or query, at most "
    "512 characters",
    remote.PVC_PATTERN: "pvc://claim/path, at most 512 characters",
    remote.MODEL_PATTERN: "pvc://claim/path, hf://org/name or s3://bucket/path, at most 512 characters",
    remote.DATASET_PATTERN: "pvc://claim/path, hf://datasets/org/name/path, s3://bucket/path, or https://host/path "
    "without user and query, at most 512 characters",
    remote.DESTINATION_PATTERN: "hf://org/name, s3://bucket/path or oci://registry/name:tag, at most 512 "
    "characters",
    remote.SECRET_PATTERN: "the name of a Secret: lower-case letters, digits, '-' and '.'",
    remote.REVISION_PATTERN: "a branch, tag or commit of the Hub, at most 128 characters",
}
"""Pattern of a string -> what it means to people, with placeholders for the schema's bounds. Other strings are
described by their bounds."""


def validation_faults(error: ValidationError) -> list[tuple[str, str]]:
    """(field path, message) of every fault that pydantic found in a job, in the order of the fields."""
    faults = []
    for details in error.errors(include_url=False):
        location = _without_side_of_union(details["loc"])
        match details["type"]:
            case "extra_forbidden":
                message = no_such_field(location, "spec.")
            case "missing":
                message = f"is required: {expected(schema_at(location))}"
            case "rule" | "value_error":
                message = details["msg"].removeprefix("Value error, ")
            case _:
                node = schema_at(location)
                message = f"is {described(details['input'])}; it must be {expected(node)}"
                message += "".join(f"; {hint}" for hint in [hints.hint(details["input"], node)] if hint)
        faults.append((functools.reduce(child_path, location, ""), message))
    # Each side of a union reports the fault.
    return list(dict.fromkeys(faults))


def _without_side_of_union(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The location of a field, without what pydantic adds to it when the field has a union of types."""
    for length in range(1, len(location)):
        try:
            if INT_OR_STRING in schema_at(location[:length]):
                return location[:length]
        except KeyError:  # no such field
            break
    return location


def no_such_field(location: Sequence[str | int], prefix: str = "") -> str:
    """Says that a field of a job does not exist, and which one was perhaps meant: there, elsewhere in spec, or by what
    another program calls it.

    Args:
        location: of the field within a job.
        prefix: before paths in spec.
    """
    name, known = str(location[-1])[:_SHOWN], schema_at(location[:-1])["properties"]
    if foreign.folded(name) not in map(foreign.folded, known):
        if elsewhere := _paths_named(name):
            one_of = "one of " if len(elsewhere) > 1 else ""
            return f"no such field; did you mean {one_of}{', '.join(prefix + path for path in elsewhere)}?"
        if called := foreign.called_here(name, prefix):
            return f"no such field; {called}"
    return unknown_field(name, known)


def field_of_spec(name: str) -> str | None:
    """The one field of spec with this name, in any spelling, or that another program calls so; None: not just one."""
    paths = _paths_named(name)
    return foreign.path_here(name) if not paths else paths[0] if len(paths) == 1 else None


def _paths_named(name: str) -> list[str]:
    """Fields of spec with this name, whatever map they are in."""
    return [path for path in _spec_paths() if foreign.folded(path.rpartition(".")[2]) == foreign.folded(name)]


@functools.cache
def _spec_paths() -> tuple[str, ...]:
    """Every field of spec, as `training.seed`."""

    def paths(node: Schema, path: str) -> Iterator[str]:
        for name, inner in node.get("properties", {}).items():
            whole = f"{path}.{name}" if path else name
            yield whole
            yield from paths(inner, whole)

    return tuple(paths(schema_at(["spec"]), ""))


def unknown_field(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Says that a field does not exist, and which one was perhaps meant.

    Args:
        name: the field.
        known: the fields that there are.
    """
    by_folded = {foreign.folded(field): field for field in known}
    near = difflib.get_close_matches(foreign.folded(name[:_SHOWN]), by_folded, n=1)
    if near:
        return f"no such field; did you mean {by_folded[near[0]]}?"
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
        text = repr(value) if value.isprintable() else ascii(value)
        return f"the string {text if len(text) <= _SHOWN else f'{text[:_SHOWN]}...'}"
    if isinstance(value, int | float):
        # Python refuses to print an integer of more than 4,300 digits.
        return f"the number {value if abs(value) < 10**_SHOWN else 'with too many digits to show'}"
    return "a list" if isinstance(value, list) else "a map"


def expected(node: Schema) -> str:
    """What a value must be, according to its schema: `an integer from 1 to 512`."""
    if "enum" in node:
        values = ", ".join(str(value) for value in node["enum"])
        return f"one of {values}" if len(node["enum"]) > 1 else values
    if INT_OR_STRING in node:
        return f"an integer{_interval(node)}, or {node['pattern'].strip('^$')}"
    match node["type"]:
        case "boolean":
            return "true or false"
        case "integer" | "number" as kind:
            return f"{'an' if kind == 'integer' else 'a'} {kind}{_interval(node)}"
        case "string":
            if node.get("pattern") in _FORMS:
                return _FORMS[node["pattern"]].format_map(node)
            form = f" that matches {node['pattern']}" if "pattern" in node else ""
            return f"a string{_size(node, 'Length', 'characters')}{form}"
        case "array":
            return f"a list{_size(node, 'Items', 'items')}, each {expected(node['items'])}"
        case _:
            if "properties" in node:
                return f"a map with {', '.join(node.get('required') or node['properties'])}"
            size = _size(node, "Properties", "entries")
            return f"a map{size}, each value {expected(node['additionalProperties'])}"


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
