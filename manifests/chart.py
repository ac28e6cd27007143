"""What is made from the chart's values.yaml, its schema and its README, and from the chart: install.yaml.

The comment above a key is its description. Its type is that of the operator's setting of the same name, that of its
default, or what a line `# @type ...` in the comment says: `string`, `integer`, `object` and so on, `list of T`,
`set of T`, `map of T`, `T or null`, or the choices `a | b`.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_operator.api import names
from qlora_operator.settings import Settings

CHART = "charts/qlora-operator"
INSTALL = "manifests/install.yaml"
NAMESPACE = "qlora-system"
SETTINGS_PATHS = ("jobs", "timing")
"""The values that hold the operator's settings under their own names."""
SCALARS = ("string", "integer", "number", "boolean", "object")

_CRD_METADATA = """\
  labels:
    {{- include "qlora-operator.labels" . | nindent 4 }}
  {{- if .Values.crds.keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
"""

Schema = dict[str, Any]


@dataclass(frozen=True)
class Value:
    """A key of values.yaml."""

    path: tuple[str, ...]
    description: str
    type: str | None
    """What `# @type` says."""
    default: Any
    """Of a section: None; its keys have their own."""
    children: tuple["Value", ...] = ()
    """Of a section: its keys."""

    @property
    def name(self) -> str:
        """As in `--set`."""
        return ".".join(self.path)


class ValuesError(Exception):
    """values.yaml does not say what is needed of a key: which, and what would be right."""


def read_values(text: str) -> tuple[Value, ...]:
    """The keys of a values.yaml, with their comments."""
    return tuple(_values(yaml.compose(text, Loader=yaml.SafeLoader), text.splitlines(), ()))


def _values(node: Any, lines: list[str], parent: tuple[str, ...]) -> Iterator[Value]:
    for key, value in node.value:
        path = (*parent, key.value)
        comment = _comment_above(lines, key.start_mark.line)
        types = [line.removeprefix("@type ") for line in comment if line.startswith("@type ")]
        description = " ".join(line for line in comment if not line.startswith("@type "))
        kind = types[0] if types else None
        if isinstance(value, yaml.MappingNode) and value.value and kind is None:
            yield Value(path, description, None, None, tuple(_values(value, lines, path)))
        else:
            default = yaml.safe_load(yaml.serialize(value, Dumper=yaml.SafeDumper))
            yield Value(path, description, kind, default)


def _comment_above(lines: list[str], line: int) -> list[str]:
    first = line
    while first > 0 and lines[first - 1].strip().startswith("#"):
        first -= 1
    return [text.strip().removeprefix("#").strip() for text in lines[first:line]]


def parse_type(text: str) -> Schema:
    """The schema that `# @type` names. Raises ValuesError."""
    if text.endswith(" or null"):
        schema = parse_type(text.removesuffix(" or null"))
        return {**schema, "type": [schema["type"], "null"]}
    if text.startswith("list of "):
        return {"type": "array", "items": parse_type(text.removeprefix("list of "))}
    if text.startswith("set of "):
        return {**parse_type(text.replace("set", "list", 1)), "uniqueItems": True}
    if text.startswith("map of "):
        return {"type": "object", "additionalProperties": parse_type(text.removeprefix("map of "))}
    if " | " in text:
        return {"type": "string", "enum": text.split(" | ")}
    if text not in SCALARS:
        raise ValuesError(
            f"{text!r} is no type: use one of {', '.join(SCALARS)}, `list of T`, `map of T`, ..."
        )
    return {"type": text}


def values_schema(values: tuple[Value, ...]) -> Schema:
    """A closed JSON schema of the values."""
    schema = _section_schema(values)
    schema["properties"]["global"] = {
        "type": "object",
        "description": "What a parent chart tells all its charts.",
    }
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema}


def _section_schema(values: tuple[Value, ...]) -> Schema:
    properties = {value.path[-1]: _schema(value) for value in values}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _schema(value: Value) -> Schema:
    about = {"description": value.description} if value.description else {}
    if value.children:
        return {**about, **_section_schema(value.children)}
    if not about:
        raise ValuesError(f"{value.name} has no description: write a comment above it")
    return {**about, **leaf_schema(value)}


def leaf_schema(value: Value) -> Schema:
    """What a key without keys of its own may be. Raises ValuesError when nothing tells."""
    setting = _setting(value.path)
    if setting is not None:
        return setting
    if value.type is not None:
        return parse_type(value.type)
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    if type(value.default) not in kinds:
        raise ValuesError(f"{value.name}: its default tells no type: add `# @type ...` to its comment")
    return {"type": kinds[type(value.default)]}


def _setting(path: tuple[str, ...]) -> Schema | None:
    """The schema of the operator's setting at the path, if it is one."""
    if path[0] not in SETTINGS_PATHS:
        return None
    whole = Settings.model_json_schema(by_alias=True)
    node: Schema | None = whole
    for part in path[1:]:
        node = _followed(node, whole).get("properties", {}).get(part) if node else None
    return _plain(node, whole) if node else None


def _followed(node: Schema, whole: Schema) -> Schema:
    while "$ref" in node:
        node = whole["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def _plain(node: Schema, whole: Schema) -> Schema:
    """Without what the comment or values.yaml says; `X or null` as a list of types."""
    node = {
        key: item
        for key, item in _followed(node, whole).items()
        if key not in ("title", "description", "default")
    }
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            node[key] = _plain(node[key], whole)
    if "properties" in node:
        node["properties"] = {name: _plain(child, whole) for name, child in node["properties"].items()}
    if "anyOf" in node:
        (under,) = [option for option in node.pop("anyOf") if option != {"type": "null"}]
        under = _plain(under, whole)
        return {**node, **under, "type": [under["type"], "null"]}
    return node


def leaves(values: tuple[Value, ...]) -> Iterator[Value]:
    """The keys that have no keys of their own."""
    for value in values:
        yield from leaves(value.children) if value.children else (value,)


def readme(values: tuple[Value, ...], chart: dict[str, Any]) -> str:
    """README.md of the chart."""
    lines = [
        f"# {chart['name']}",
        "",
        f"{chart['description']}. [How to install, upgrade and remove it](../../docs/install.md).",
        "",
        "```sh",
        "kubectl create namespace qlora-system",
        f"helm install {chart['name']} charts/{chart['name']} --namespace qlora-system",
        "```",
        "",
        "Generated by `manifests/generate.py` from the comments in `values.yaml`; do not edit.",
        "",
        "| Value | Type | Default | Meaning |",
        "|---|---|---|---|",
        *(_row(value) for value in leaves(values)),
    ]
    return "\n".join(lines) + "\n"


def _row(value: Value) -> str:
    default = json.dumps(value.default, ensure_ascii=False)
    cells = (f"`{value.name}`", type_name(leaf_schema(value)), f"`{default}`", value.description)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def type_name(schema: Schema) -> str:
    """A schema in a word or two."""
    kind = schema.get("type", "object")
    if isinstance(kind, list):
        return f"{type_name({**schema, 'type': kind[0]})} or null"
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if kind == "array":
        return f"{'set' if schema.get('uniqueItems') else 'list'} of {type_name(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"map of {type_name(schema['additionalProperties'])}"
    return str(kind)


def crd_template(crd: str) -> str:
    """The chart's template of the CRD, from its text. Nothing in it is taken for a template's action."""
    head = f"metadata:\n  name: {names.PLURAL}.{names.GROUP}\n"
    assert crd.count(head) == 1, "the CRD's metadata is not where it was"
    assert "{{" not in crd, "a description in the CRD looks like a template's action"
    return f"{{{{- if .Values.crds.enabled }}}}\n{crd.replace(head, head + _CRD_METADATA)}{{{{- end }}}}\n"


def generated(root: Path, crd: str) -> dict[str, str]:
    """Path from the repository's root -> text."""
    values = read_values((root / CHART / "values.yaml").read_text(encoding="utf-8"))
    chart = yaml.safe_load((root / CHART / "Chart.yaml").read_text(encoding="utf-8"))
    schema = json.dumps(values_schema(values), indent=2, ensure_ascii=False)
    return {
        f"{CHART}/templates/crd.yaml": crd_template(crd),
        f"{CHART}/values.schema.json": f"{schema}\n",
        f"{CHART}/README.md": readme(values, chart),
    }


def install(root: Path, helm: Path) -> str:
    """manifests/install.yaml: a namespace and the chart as helm renders it with its default values."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    metadata = {"name": NAMESPACE, "labels": labels}
    namespace = yaml.safe_dump(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}, sort_keys=False
    )
    arguments = ["template", Path(CHART).name, str(root / CHART), "--namespace", NAMESPACE, "--skip-tests"]
    done = subprocess.run([helm, *arguments], capture_output=True, text=True, check=True)
    head = f"# {CHART} with its default values; made by manifests/generate.py, do not edit.\n---\n"
    return f"{head}{namespace}{done.stdout}"
