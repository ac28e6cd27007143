"""The CRD: what a real API server accepts, and what it will then accept itself."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

from qlora_contract.run_config import SINCE
from qlora_operator.api import names
from qlora_operator.api.schema import (
    INT_OR_STRING,
    VERSIONS,
    ApiVersion,
    custom_resource_definition,
    job_schema,
    transition_rules,
)
from qlora_operator.api.v1alpha1 import MUTABLE, MUTABLE_WHILE_SUSPENDED, QLoRAJob, QLoRAJobSpec
from qlora_operator.api.yaml_reader import read_documents

Wrong = Callable[[dict[str, Any]], object]

SAMPLES = Path(__file__).parents[3] / "manifests/samples"

STRUCTURAL = frozenset(
    {
        "type",
        "description",
        "format",
        "enum",
        "default",
        "pattern",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "items",
        "properties",
        "required",
        "additionalProperties",
        "x-kubernetes-list-type",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-int-or-string",
        "x-kubernetes-map-type",
        "x-kubernetes-validations",
    }
)
"""The keywords that the CRD uses; all of them are among those of a structural schema."""


def crd_schema() -> dict[str, Any]:
    """The schema as it stands in the CRD."""
    (version,) = custom_resource_definition()["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    assert isinstance(schema, dict)
    return schema


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within the schema, itself included, with the path of its fields."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for part in ("items", "additionalProperties"):
        if part in schema:
            yield from nodes(schema[part], f"{path}.{part}")


def offenders(wrong: Wrong, schema: dict[str, Any]) -> list[str]:
    """Where in the schema something is wrong."""
    return [path for path, node in nodes(schema) if wrong(node)]


def is_number(value: object) -> bool:
    """Whether it is a number, which True is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


NOT_STRUCTURAL: dict[str, Wrong] = {
    "keyword unknown to structural schemas": lambda node: set(node) - STRUCTURAL,
    "no type, or several": lambda node: (
        isinstance(node.get("type"), str) == node.get("x-kubernetes-int-or-string", False)
    ),
    "numeric exclusiveMinimum": lambda node: is_number(node.get("exclusiveMinimum")),
    "numeric exclusiveMaximum": lambda node: is_number(node.get("exclusiveMaximum")),
    "exclusiveMinimum of nothing": lambda node: "exclusiveMinimum" in node and "minimum" not in node,
    "exclusiveMaximum of nothing": lambda node: "exclusiveMaximum" in node and "maximum" not in node,
    "closed object": lambda node: not isinstance(node.get("additionalProperties", {}), dict),
    "both kinds of object": lambda node: {"properties", "additionalProperties"} <= set(node),
    "list of anything": lambda node: node.get("type") == "array" and "items" not in node,
    "list of no kind": lambda node: node.get("type") == "array" and "x-kubernetes-list-type" not in node,
    "default null": lambda node: node.get("default", 0) is None,
    "null among values": lambda node: None in node.get("enum", []),
    "required, but unknown": lambda node: set(node.get("required", [])) - set(node.get("properties", {})),
}


@pytest.mark.parametrize("wrong", NOT_STRUCTURAL.values(), ids=NOT_STRUCTURAL)
def test_the_schema_is_structural(wrong: Wrong) -> None:
    """Nothing that an API server refuses stands anywhere in the schema."""
    assert offenders(wrong, crd_schema()) == []


@pytest.mark.parametrize(
    ("construct", "pydantic"),
    [
        ("$ref", '"$ref"'),
        ("anyOf null", '"null"'),
        ("const", '"const"'),
        ("title", '"title"'),
        ("additionalProperties false", '"additionalProperties": false'),
        ("$defs", '"$defs"'),
    ],
)
def test_constructs_of_pydantic_are_rewritten(construct: str, pydantic: str) -> None:
    """What the models' own JSON schema is full of does not get into the CRD."""
    assert pydantic in json.dumps(QLoRAJob.model_json_schema(by_alias=True))
    assert pydantic not in json.dumps(crd_schema())


def test_everything_in_spec_is_bounded() -> None:
    """Strings, lists and maps have a maximum, so that the cost of every rule has one."""
    spec = crd_schema()["properties"]["spec"]
    limits = {
        INT_OR_STRING: ("pattern",),
        "string": ("maxLength", "enum"),
        "array": ("maxItems",),
        "object": ("maxProperties", "properties"),
    }

    assert (
        offenders(lambda node: not set(limits.get(node.get("type", INT_OR_STRING), node)) & set(node), spec)
        == []
    )


def test_every_number_in_spec_is_bounded() -> None:
    """Integers and numbers have a minimum and a maximum, or a list of values."""
    spec = crd_schema()["properties"]["spec"]
    kinds = ("integer", "number", INT_OR_STRING)
    numbers = [(path, node) for path, node in nodes(spec) if node.get("type", INT_OR_STRING) in kinds]

    assert [
        path for path, node in numbers if "enum" not in node and not {"minimum", "maximum"} <= set(node)
    ] == []


def test_every_field_is_described() -> None:
    """`kubectl explain` has a sentence for every field."""
    schema = crd_schema()
    undescribed = [
        f"{path}.{name}"
        for path, node in nodes(schema)
        for name, child in node.get("properties", {}).items()
        if not child.get("description", "").endswith((".", ".)"))
    ]

    # An API server describes metadata itself, and accepts nothing but its type.
    assert undescribed == [".metadata"]


def test_descriptions_are_for_a_terminal() -> None:
    """`kubectl explain` prints backticks and hides defaults: the CRD has none of the former, and says the latter."""
    spec = crd_schema()["properties"]["spec"]["properties"]

    assert offenders(lambda node: "`" in node.get("description", ""), crd_schema()) == []
    assert spec["training"]["properties"]["packing"]["description"].endswith(" Default: true.")
    assert spec["isa"]["properties"]["allowed"]["description"].endswith(" avx512, avx2.")
    assert "Default:" not in spec["image"]["description"]
    assert "Default:" not in spec["adapter"]["description"]


def test_parents_of_defaults_have_a_default() -> None:
    """An object that may be left out is {} by default: an API server fills in no field of an absent object.

    Not one of a later release, which the release before would not know.
    """
    spec = crd_schema()["properties"]["spec"]
    optional = {
        name: node
        for name, node in spec["properties"].items()
        if "properties" in node and name not in spec["required"] and "required" not in node
    }

    assert {
        name for name, node in optional.items() if node.get("default") != {}
    } == optional.keys() & SINCE.keys()
    assert "adapter" in optional


def test_defaults_satisfy_their_own_schema() -> None:
    """No default is a value that the API server would refuse from a user."""
    for path, node in nodes(crd_schema()):
        if "default" in node:
            jsonschema.Draft4Validator(node).validate(node["default"])
            assert path


def test_members_of_exactly_one_have_no_default() -> None:
    """A default for epochs would make every job with maxSteps wrong."""
    training = crd_schema()["properties"]["spec"]["properties"]["training"]

    assert [name for name in ("epochs", "maxSteps") if "default" in training["properties"][name]] == []


@pytest.mark.parametrize("sample", ["minimal.yaml", "full.yaml"])
def test_samples_satisfy_the_schema(sample: str) -> None:
    """What a user copies passes the schema alone, without any Python of ours."""
    (job,) = read_documents((SAMPLES / sample).read_bytes())

    jsonschema.Draft4Validator(crd_schema()).validate(job)


def test_the_schema_refuses_what_is_out_of_bounds() -> None:
    """The schema is no formality: a value beyond its bounds fails."""
    (job,) = read_documents((SAMPLES / "minimal.yaml").read_bytes())
    job["spec"]["training"]["learningRate"] = 0

    with pytest.raises(jsonschema.ValidationError, match="0 is less than or equal to the minimum"):
        jsonschema.Draft4Validator(crd_schema()).validate(job)


def test_every_field_but_the_mutable_ones_has_a_transition_rule() -> None:
    """No field of spec changes under a running attempt by omission."""
    ruled = [rule["fieldPath"].removeprefix(".") for rule in transition_rules()]
    fields = [str(info.alias) for info in QLoRAJobSpec.model_fields.values()]

    assert ruled == [field for field in fields if field not in MUTABLE]


def test_transition_rules_say_how_to_change_the_field() -> None:
    """What may change while suspended says so; an optional field's coming and going counts as a change."""
    rules = {rule["fieldPath"]: rule for rule in transition_rules()}

    assert rules[".model"]["rule"] == "self.model == oldSelf.model"
    assert rules[".image"]["rule"] == (
        "has(self.image) == has(oldSelf.image) && (!has(self.image) || self.image == oldSelf.image)"
    )
    for field in MUTABLE_WHILE_SUSPENDED:
        rule = rules[f".{field}"]
        assert rule["rule"] == f"self.suspend || oldSelf.suspend || self.{field} == oldSelf.{field}"
        assert "set suspend: true first" in rule["message"]


def test_rules_read_only_fields_that_exist() -> None:
    """A field path of a rule leads somewhere: a CRD with any other is refused."""
    for _, node in nodes(crd_schema()):
        for rule in node.get("x-kubernetes-validations", []):
            place = node
            for part in rule.get("fieldPath", "").split(".")[1:]:
                place = place["properties"][part]


def test_the_printer_columns_are_the_documented_ones() -> None:
    """`kubectl get qlj` shows what the design shows; the rest is for -o wide."""
    columns = custom_resource_definition()["spec"]["versions"][0]["additionalPrinterColumns"]
    narrow = [column["name"].upper() for column in columns if "priority" not in column]

    assert narrow == ["PHASE", "RANKS", "ISA", "STEP", "LOSS", "TOK/S", "ETA", "RESTARTS", "AGE"]
    assert {column.get("priority", 1) for column in columns} == {1}


def test_printer_columns_show_fields_that_exist() -> None:
    """A column's path leads to a field of the column's type."""
    schema = crd_schema()
    for column in custom_resource_definition()["spec"]["versions"][0]["additionalPrinterColumns"]:
        parts = column["jsonPath"].split(".")[1:]
        if parts[0] == "metadata":
            continue
        node = schema
        for part in parts:
            node = node["properties"][part]
        assert node["type"] == column["type"], column


def test_the_definition_has_the_names_of_the_api() -> None:
    """The CRD's name is what an API server requires: the plural and the group."""
    crd = custom_resource_definition()

    assert crd["metadata"]["name"] == f"{crd['spec']['names']['plural']}.{crd['spec']['group']}"
    assert crd["spec"]["names"]["shortNames"] == [names.SHORT_NAME]
    assert crd["spec"]["versions"][0]["subresources"] == {"status": {}}


def test_every_reason_is_named_in_a_description() -> None:
    """A reason that no description explains would not be found by the user who meets it."""
    text = json.dumps(crd_schema())

    assert [reason for reason in names.Reason if reason not in text] == []
    assert [condition for condition in names.ConditionType if condition not in text] == []


def test_making_the_definition_does_not_change_the_shared_schema() -> None:
    """The cached schema is the same after a CRD was made from it."""
    before = copy.deepcopy(job_schema())
    custom_resource_definition()

    assert job_schema() == before


# --- versions


class LaterSpec(QLoRAJobSpec):
    """What a later version of the API may have."""

    notify: bool = False
    """Whom to tell."""


class LaterJob(QLoRAJob):
    """A job of that version."""

    api_version: Literal["qlora.dev/v1beta1"]  # type: ignore[assignment]
    """Its name."""
    spec: LaterSpec


def test_the_definition_has_room_for_another_version() -> None:
    """Each version has the schema and the rules of its own model; one of them is stored."""
    later = ApiVersion("v1beta1", LaterJob, stored=True)
    before = ApiVersion("v1alpha1", QLoRAJob)
    old, new = custom_resource_definition([before, later])["spec"]["versions"]

    assert [(version["name"], version["served"], version["storage"]) for version in (old, new)] == [
        ("v1alpha1", True, False),
        ("v1beta1", True, True),
    ]
    specs = [version["schema"]["openAPIV3Schema"]["properties"]["spec"] for version in (old, new)]
    assert specs[1]["properties"].keys() - specs[0]["properties"].keys() == {"notify"}
    rules = [
        [rule["fieldPath"] for rule in spec["x-kubernetes-validations"] if "fieldPath" in rule]
        for spec in specs
    ]
    assert ".notify" in rules[1]
    assert ".notify" not in rules[0]


def test_one_version_is_stored() -> None:
    """An API server takes exactly one version as that of etcd, and it must be served while jobs are in it."""
    assert [version.served for version in VERSIONS if version.stored] == [True]
    assert len({version.name for version in VERSIONS}) == len(VERSIONS)


def test_no_later_field_has_a_default_in_the_definition() -> None:
    """An API server would add it to every job, and an operator of release 0.1.0 could read none any more."""
    (version,) = custom_resource_definition()["spec"]["versions"]
    dataset = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["dataset"][
        "properties"
    ]

    assert "default" not in dataset["onBadRecord"]
    assert "default" not in dataset["columns"]
    assert dataset["format"]["default"] == "auto"


def without_words(schema: Any) -> Any:
    """A schema without what only people read."""
    if isinstance(schema, list):
        return [without_words(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: without_words(value)
        for key, value in schema.items()
        if not (key in ("description", "message") and isinstance(value, str))
    }


PINNED = {"v1alpha1": "f4b5a2670360b864"}
"""Stored version of the API -> hash over its schema."""


def test_another_schema_of_what_is_stored_is_noticed() -> None:
    """Objects of this version are in etcd, and operators of other releases read them."""
    (stored,) = [
        version for version in custom_resource_definition()["spec"]["versions"] if version["storage"]
    ]
    text = json.dumps(without_words(stored["schema"]), sort_keys=True)
    found = hashlib.sha256(text.encode()).hexdigest()[:16]

    assert found == PINNED.get(stored["name"]), (
        f"the schema of {stored['name']} has changed. If every stored job stays valid and means the same, as with a "
        f"new field that has a default (tests/releases says so), put {found!r} here; if not, this is another version "
        "of the API: docs/decisions/0018 says how it is added"
    )
