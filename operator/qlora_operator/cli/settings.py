"""`--set FIELD=VALUE`: a field of a job changed on the command line."""

import copy
from collections.abc import Sequence
from typing import Any

from qlora_operator.api.messages import no_such_field, schema_at
from qlora_operator.api.schema import Schema
from qlora_operator.api.yaml_reader import DocumentError, read_documents
from qlora_operator.errors import USAGE, CommandError

_EITHER = {"training.epochs": "training.maxSteps", "training.maxSteps": "training.epochs"}
"""Of two fields of which a job has one, the other."""


class Setting:
    """A field, by its path in spec, and its new value."""

    def __init__(self, text: str) -> None:
        """Read FIELD=VALUE, the value as YAML; without a value the field gets its default.

        Raises:
            CommandError: there is no such field, or the value is no YAML.
        """
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise CommandError(
                f"--set {text}: must be FIELD=VALUE, such as training.learningRate=1e-4", USAGE
            )
        self.path = tuple(name.removeprefix("spec.").split("."))
        schema = _schema_of(text, self.path)
        self.value = _value(text, value, schema)

    def apply(self, spec: dict[str, Any]) -> None:
        """Set it in a spec, which is changed."""
        *parents, last = self.path
        if (other := _EITHER.get(".".join(self.path))) and self.value is not None:
            section, name = other.split(".")
            if isinstance(fields := spec.get(section), dict):
                fields.pop(name, None)
        for name in parents:
            inner = spec.get(name)
            if not isinstance(inner, dict):
                spec[name] = inner = {}
            spec = inner
        if self.value is None:
            spec.pop(last, None)
        else:
            spec[last] = self.value


def with_settings(document: dict[str, Any], settings: Sequence[Setting]) -> dict[str, Any]:
    """A copy of a job's document with these fields set, in their order."""
    if not settings:
        return document
    changed = copy.deepcopy(document)
    if not isinstance(changed.get("spec"), dict):
        changed["spec"] = {}
    for setting in settings:
        setting.apply(changed["spec"])
    return changed


def _schema_of(text: str, path: Sequence[str]) -> Schema:
    node = schema_at(["spec"])
    for number, name in enumerate(path):
        if "properties" in node:
            if name not in node["properties"]:
                raise CommandError(f"--set {text}: {_no_such(path[: number + 1])}", USAGE)
            node = node["properties"][name]
        elif "additionalProperties" in node:
            node = node["additionalProperties"]
        else:
            whole = ".".join(path[:number])
            raise CommandError(f"--set {text}: {whole} has no fields; set it as a whole", USAGE)
    return node


def _no_such(path: Sequence[str]) -> str:
    if path[0] == "metadata":
        return "only fields of spec can be set; change metadata in the file"
    return f"{'.'.join(path)}: {no_such_field(['spec', *path])}"


def _value(text: str, value: str, schema: Schema) -> Any:
    """The value as YAML has it; for a field of text, the text itself, whatever it looks like."""
    try:
        documents = read_documents(f"value: {value}".encode())
        found = documents[0]["value"] if len(documents) == 1 and set(documents[0]) == {"value"} else ...
    except DocumentError as error:
        found, why = ..., f": it {error.message}"
    else:
        why = ""
    if schema.get("type") == "string" and not isinstance(found, str | None):
        return value
    if found is ...:
        raise CommandError(f"--set {text}: the value is not YAML{why}; put it in quotes if it is text", USAGE)
    return found
