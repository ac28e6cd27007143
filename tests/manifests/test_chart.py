"""What is made from the chart's values.yaml."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("chart", ROOT / "manifests" / "chart.py")
assert _spec is not None
assert _spec.loader is not None
chart: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(chart)


def schema_of(text: str) -> Any:
    """The schema made from a values.yaml."""
    return chart.values_schema(chart.read_values(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("string", {"type": "string"}),
        ("integer or null", {"type": ["integer", "null"]}),
        ("list of string", {"type": "array", "items": {"type": "string"}}),
        ("set of string", {"type": "array", "items": {"type": "string"}, "uniqueItems": True}),
        ("map of string", {"type": "object", "additionalProperties": {"type": "string"}}),
        ("a | b", {"type": "string", "enum": ["a", "b"]}),
        ("object", {"type": "object"}),
    ],
)
def test_types(text: str, expected: Any) -> None:
    """Each way to name a type gives its schema."""
    assert chart.parse_type(text) == expected


def test_a_key_has_its_comments_words_and_its_defaults_type() -> None:
    """The comment above a key describes it, over as many lines as it has; its default says what it may be."""
    text = (
        "# Not of the key.\n\n# How many\n# there are.\ncount: 3\nsection:\n  # Whether it is.\n  on: true\n"
    )
    properties = schema_of(text)["properties"]

    assert properties["count"] == {"description": "How many there are.", "type": "integer"}
    section = properties["section"]
    assert section["additionalProperties"] is False
    assert section["properties"] == {"on": {"description": "Whether it is.", "type": "boolean"}}


def test_a_map_with_a_type_is_a_value_of_its_own() -> None:
    """A default map whose type is told is no section with keys of its own."""
    schema = schema_of("# Labels.\n# @type map of string\nlabels: {a: b}\n")

    jsonschema.validate({"labels": {"c": "d"}}, schema)
    with pytest.raises(jsonschema.ValidationError, match="1 is not of type 'string'"):
        jsonschema.validate({"labels": {"c": 1}}, schema)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# Of many kinds.\nx: null\n", "x: its default tells no type: add `# @type ...`"),
        ("# Things.\nx: []\n", "x: its default tells no type"),
        ("section:\n  x: 1\n", "section.x has no description: write a comment above it"),
        ("# A thing.\n# @type sting\nx: a\n", "'sting' is no type: use one of string, integer"),
        ("# Settings.\njobs:\n  # No setting.\n  limit: null\n", "jobs.limit: its default tells no type"),
    ],
    ids=["null", "empty list", "no comment", "unknown type", "no setting of the operator"],
)
def test_keys_that_say_too_little(text: str, said: str) -> None:
    """A key of which something is missing is named, with what would be right."""
    with pytest.raises(chart.ValuesError, match="^" + said.replace("`", ".").replace("...", ".*")):
        schema_of(text)


def test_settings_of_the_operator_bring_their_bounds() -> None:
    """A value that becomes a setting may be what the operator takes, and nothing else."""
    schema = json.loads((ROOT / chart.CHART / "values.schema.json").read_text())

    jsonschema.validate({"jobs": {"limits": {"memory": "1Ti"}, "runAsUser": None}}, schema)
    for jobs in ({"limits": {"memory": "much"}}, {"runAsUser": 0}, {"imagePullPolicy": "Sometimes"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"jobs": jobs}, schema)


def test_default_values_fit_their_schema() -> None:
    """What the chart installs by itself is valid."""
    values = yaml.safe_load((ROOT / chart.CHART / "values.yaml").read_text())

    jsonschema.validate(values, json.loads((ROOT / chart.CHART / "values.schema.json").read_text()))


def test_the_readme_has_a_row_for_every_value() -> None:
    """Every value is in the README's table once, in whole rows."""
    values = chart.read_values((ROOT / chart.CHART / "values.yaml").read_text())
    lines = (ROOT / chart.CHART / "README.md").read_text().splitlines()
    rows = [line.replace(r"\|", "").split("|") for line in lines if line.startswith("| `")]

    assert [row[1].strip(" `") for row in rows] == [value.name for value in chart.leaves(values)]
    assert {len(row) for row in rows} == {6}


def test_the_definitions_template_is_the_definition() -> None:
    """Without its actions, the chart's template is the CRD, but for the labels and annotations of its release."""
    crd = (ROOT / "manifests/crd/qlora.dev_qlorajobs.yaml").read_text()
    template = (ROOT / chart.CHART / "templates/crd.yaml").read_text()
    kept = [line for line in template.splitlines() if "{{" not in line]

    added = ["  labels:", "  annotations:", "    helm.sh/resource-policy: keep"]
    assert [line for line in kept if line not in added] == crd.splitlines()


@pytest.mark.parametrize(
    "crd",
    ["metadata:\n  name: qlorajobs.qlora.dev\ndescription: '{{ x }}'\n", "metadata:\n  name: other\n"],
    ids=["an action", "another definition"],
)
def test_what_cannot_be_a_template_is_not_made_one(crd: str) -> None:
    """Text that helm would take for its own stops the generator."""
    with pytest.raises(AssertionError):
        chart.crd_template(crd)
