"""From the pydantic models to the structural schema that an API server accepts, and to the whole CRD.

What pydantic emits and a structural schema refuses is rewritten: references are inlined, `X or null` becomes
an optional X, `number or word` Kubernetes' own int-or-string, `const` a list of one value, and what says nothing to
an API server (titles, closedness) is dropped.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_contract.run_config import SINCE
from qlora_operator.api import names
from qlora_operator.api.rules import ApiModel
from qlora_operator.api.v1alpha1 import MUTABLE, MUTABLE_WHILE_SUSPENDED, QLoRAJob

Schema = dict[str, Any]

_DROPPED = (
    "title",
    "additionalProperties",
    "$ref",
    "$defs",
    "anyOf",
    "const",
    "properties",
    "items",
    "default",
)
"""Keywords that are not copied as they stand: left out, or rewritten by _structural."""
INT_OR_STRING = "x-kubernetes-int-or-string"
"""Bounds beside it are those of the number, the pattern is that of the word."""


@dataclass(frozen=True)
class ApiVersion:
    """A version of the API in the CRD."""

    name: str
    job: type[ApiModel] = QLoRAJob
    """A whole job of this version."""
    served: bool = True
    stored: bool = False
    """Objects are kept in etcd in this version: exactly one has it."""


VERSIONS = (ApiVersion(names.VERSION, stored=True),)
"""decisions/0018 says how another one is added."""


@functools.cache
def job_schema(job: type[ApiModel] = QLoRAJob) -> Schema:
    """The structural schema of a QLoRAJob, metadata included, as `qlora validate` and the field reference
    need it.

    Shared: must not be changed.
    """
    whole = job.model_json_schema(by_alias=True)
    return _structural(whole, whole["$defs"])


def _structural(node: Schema, definitions: dict[str, Schema]) -> Schema:
    node = _resolved(node, definitions)
    result = {key: value for key, value in node.items() if key not in _DROPPED}
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    if "const" in node:
        result["enum"] = [node["const"]]
    if node.get("default") is not None:
        # An object's defaults are those of its fields.
        result["default"] = {} if "properties" in node else node["default"]
    for bound, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in result:
            result[inclusive], result[bound] = result[bound], True
    if "properties" in node:
        result["properties"] = {
            key: _structural(child, definitions) for key, child in node["properties"].items()
        }
    elif isinstance(node.get("additionalProperties"), dict):
        result["additionalProperties"] = _structural(node["additionalProperties"], definitions)
    if "items" in node:
        result["items"] = _structural(node["items"], definitions)
        result.setdefault("x-kubernetes-list-type", "atomic")
    return result


def _resolved(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """The node with its reference inlined and its `or null` taken away; what it says itself wins."""
    while "$ref" in node or "anyOf" in node:
        if "$ref" in node:
            under = definitions[node["$ref"].rpartition("/")[2]]
        else:
            under, *word = [option for option in node["anyOf"] if option != {"type": "null"}]
            if word:
                assert under["type"] == "integer", "a union is of a number and a word, in this order"
                bounds = {key: value for key, value in under.items() if key != "type"}
                under = {INT_OR_STRING: True, **bounds, "pattern": f"^{word[0]['const']}$"}
        node = {**under, **{key: value for key, value in node.items() if key not in ("$ref", "anyOf")}}
    return node


def custom_resource_definition(versions: Sequence[ApiVersion] = VERSIONS) -> Schema:
    """The CRD as a manifest.

    Args:
        versions: the newest last, as `kubectl get crd` lists them.
    """
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": names.CRD_NAME},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": names.LIST_KIND,
                "plural": names.PLURAL,
                "singular": names.SINGULAR,
                "shortNames": [names.SHORT_NAME],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": version.name,
                    "served": version.served,
                    "storage": version.stored,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": printer_columns(),
                    "schema": {"openAPIV3Schema": _version_schema(version.job)},
                }
                for version in versions
            ],
        },
    }


def _version_schema(job: type[ApiModel]) -> Schema:
    """The schema as it stands in the CRD: explained, and with the rules that only an API server can check."""
    schema: Schema = _explained(job_schema(job))
    properties = schema["properties"]
    _leave_out_later_defaults(properties["spec"])
    for field in ("apiVersion", "kind"):
        properties[field] = {"type": "string", "description": properties[field]["description"]}
    # An API server has its own schema of metadata. Of ours it takes the name alone, which a rule is about.
    name = {"type": "string", "description": properties["metadata"]["properties"]["name"]["description"]}
    properties["metadata"] = {"type": "object", "properties": {"name": name}}
    # The bounds of Metadata.name as a rule: an API server does not accept bounds on metadata.
    named_rightly = (
        f"size(self.metadata.name) <= {names.MAX_JOB_NAME} && "
        f"self.metadata.name.matches('{names.JOB_NAME_PATTERN}')"
    )
    schema["x-kubernetes-validations"] = [
        {"rule": named_rightly, "message": f"must be {names.JOB_NAME_RULE}", "fieldPath": ".metadata.name"}
    ]
    properties["spec"]["x-kubernetes-validations"] += transition_rules(job)
    return schema


def _leave_out_later_defaults(spec: Schema) -> None:
    """Take away the defaults of fields that came after release 0.1.0, in place; who reads a job knows them.

    An API server adds defaults to every job that it hands out. That release refuses a job with a field that it does not
    know, and could read none any more, such as after a rollback; like this it reads all that do not set such a field.
    """
    for path in SINCE:
        fields, names_ = spec, path.partition("=")[0].split(".")
        for depth, name in enumerate(names_, start=1):
            fields = fields["properties"][name]
            # Values have no defaults. What stands by itself in spec was there, though ranks were not told of all of it.
            is_later = depth > 1 or (name in SINCE and fields["type"] == "object")
            if is_later and "=" not in path:
                fields.pop("default", None)
                _drop_defaults(fields.get("items", {}))


def _drop_defaults(node: Schema) -> None:
    """Take away a schema's default and those of its fields, in place."""
    node.pop("default", None)
    for child in node.get("properties", {}).values():
        _drop_defaults(child)


def _explained(value: Any) -> Any:
    """A copy with descriptions for `kubectl explain`, which prints backticks and leaves out defaults."""
    if isinstance(value, list):
        return [_explained(item) for item in value]
    if not isinstance(value, dict):
        return value
    copy = {key: _explained(item) for key, item in value.items()}
    if isinstance(copy.get("description"), str):
        copy["description"] = copy["description"].replace("`", "")
        default = value.get("default")
        if default not in (None, {}, []):
            values = default if isinstance(default, list) else [default]
            text = ", ".join(value if isinstance(value, str) else json.dumps(value) for value in values)
            copy["description"] += f" Default: {text}."
    return copy


def transition_rules(job: type[ApiModel] = QLoRAJob) -> list[Schema]:
    """What may not change. The rules stand on spec: one on a field would miss that it is set or unset."""
    rules = []
    spec: Any = job.model_fields["spec"].annotation
    for info in spec.model_fields.values():
        field = str(info.alias)
        if field in MUTABLE:
            continue
        now, before = f"self.{field}", f"oldSelf.{field}"
        unchanged = f"{now} == {before}"
        if not (info.is_required() or info.default is not None):
            unchanged = f"has({now}) == has({before}) && (!has({now}) || {unchanged})"
        message = f"{field} is immutable; create another job"
        if field in MUTABLE_WHILE_SUSPENDED:
            unchanged = f"self.suspend || oldSelf.suspend || {unchanged}"
            message = f"{field} may change only while the job is suspended; set suspend: true first"
        rules.append(
            {"rule": unchanged, "message": message, "fieldPath": f".{field}", "reason": "FieldValueForbidden"}
        )
    return rules


def printer_columns() -> list[Schema]:
    """The columns of `kubectl get qlj`; those of priority 1 only with `-o wide`."""
    narrow = [
        ("Phase", "string", ".status.phase"),
        ("Ranks", "string", ".status.columns.ranks"),
        ("ISA", "string", ".status.placement.isa"),
        ("Step", "string", ".status.columns.step"),
        ("Loss", "string", ".status.columns.loss"),
        ("Tok/s", "string", ".status.columns.tokensPerSecond"),
        ("ETA", "string", ".status.columns.eta"),
        ("Restarts", "string", ".status.columns.restarts"),
        ("Age", "date", ".metadata.creationTimestamp"),
    ]
    wide = [
        ("Attempt", "integer", ".status.attempt"),
        ("Dtype", "string", ".status.placement.dtype"),
        ("Checkpoint", "integer", ".status.checkpoint.step"),
        ("Adapter", "string", ".status.adapter.uri"),
        ("Window", "string", ".status.columns.window"),
        ("Message", "string", ".status.message"),
    ]
    return [
        {"name": name, "type": kind, "jsonPath": path} | ({"priority": 1} if wide_only else {})
        for columns, wide_only in ((narrow, False), (wide, True))
        for name, kind, path in columns
    ]
