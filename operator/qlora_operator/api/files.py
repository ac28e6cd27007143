"""Files of jobs: read as kubectl reads them, judged as the API server judges them.

Stricter in one point: a job needs a name, where an API server would make one from generateName. Milder in two:
a status is passed over whatever it holds, and of metadata only name, namespace, labels and annotations are
looked into.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_operator.api import names
from qlora_operator.api.documents import MAX_BYTES, DocumentError, child_path, read_documents
from qlora_operator.api.faults import described, expected, unknown_field, validation_faults
from qlora_operator.api.schema import Schema, job_schema
from qlora_operator.api.types import LABEL_KEY_PATTERN, LABEL_VALUE_PATTERN, QLoRAJob
from qlora_operator.errors import Fault, InvalidFileError, InvalidJobError

STDIN = "-"

OBJECT_META = (
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
)
"""The fields of Kubernetes' ObjectMeta."""


def load_jobs(path: str) -> list[QLoRAJob]:
    """The QLoRAJobs of a YAML or JSON file (`-`: standard input), in their order.

    Documents of other kinds are passed over, lists of jobs are opened. Raises InvalidFileError with every
    fault that was found, also when there is no QLoRAJob at all.
    """
    file = "standard input" if path == STDIN else path
    try:
        documents = [item for document in read_documents(_content(path)) for item in _items(document)]
    except DocumentError as error:
        raise InvalidFileError([Fault(file, error.message, error.path)]) from error
    jobs: list[QLoRAJob] = []
    faults: list[Fault] = []
    for number, document in enumerate(documents, start=1):
        try:
            found = parse_job(document)
        except InvalidJobError as error:
            label = _label(number, document) if len(documents) > 1 else ""
            faults += [Fault(file, message, where, label) for where, message in error.faults]
        else:
            jobs += [found] if found else []
    if not jobs and not faults:
        faults.append(Fault(file, _no_job(documents)))
    if faults:
        raise InvalidFileError(faults)
    return jobs


def parse_job(document: Any) -> QLoRAJob | None:
    """The job that a document is; None for an object of another kind. Raises InvalidJobError."""
    if not isinstance(document, dict):
        raise InvalidJobError([("", f"the document is {described(document)}; a job is a map")])
    if not _is_ours(document):
        return None
    # What the operator wrote is not for the user to set: the API server passes over it as well.
    stated = {key: value for key, value in document.items() if key != "status"}
    faults = _metadata_faults(stated.get("metadata"))
    try:
        job = QLoRAJob.model_validate(without_nulls(stated, job_schema()), by_alias=True, by_name=False)
    except ValidationError as error:
        faults += validation_faults(error)
    if faults:
        raise InvalidJobError(faults)
    return job


def without_nulls(value: Any, schema: Schema) -> Any:
    """The value without the known fields, and entries of maps, that are null: to an API server they are not
    given."""
    if isinstance(value, dict):
        known, entry = schema.get("properties", {}), schema.get("additionalProperties")
        return {
            key: without_nulls(item, known.get(key, entry or {}))
            for key, item in value.items()
            if not (item is None and (key in known or entry))
        }
    if isinstance(value, list):
        return [without_nulls(item, schema.get("items", {})) for item in value]
    return value


def _content(path: str) -> bytes:
    """At most a byte more than a file may have, so that an endless one ends too."""
    if path == STDIN:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DocumentError(f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise DocumentError("cannot be read: the name holds a null character") from error


def _items(document: Any) -> list[Any]:
    """The document itself, or what is in it if it is a list as `kubectl get -o yaml` writes it."""
    if isinstance(document, dict) and document.get("kind") in ("List", names.LIST_KIND):
        items = document.get("items")
        if isinstance(items, list):
            return items
    return [document]


def _is_ours(document: dict[str, Any]) -> bool:
    """Whether it is meant to be a QLoRAJob: by its kind, by its group, or because it does not say what it
    is."""
    version = document.get("apiVersion")
    in_group = isinstance(version, str) and version.partition("/")[0] == names.GROUP
    return in_group or document.get("kind") == names.KIND or not isinstance(document.get("kind"), str)


def _metadata_faults(metadata: Any) -> list[tuple[str, str]]:
    if not isinstance(metadata, dict):
        return []
    unknown = [
        (child_path("metadata", name), unknown_field(name, OBJECT_META))
        for name in metadata
        if name not in OBJECT_META
    ]
    return [*unknown, *_key_faults(metadata), *_label_faults(metadata)]


def _key_faults(metadata: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of labels and annotations that an API server refuses."""
    right = expected({"type": "string", "pattern": LABEL_KEY_PATTERN})
    for field in ("labels", "annotations"):
        for key in _entries(metadata, field):
            # An annotation's prefix may have capitals.
            if not _is_key(key.lower() if field == "annotations" else key):
                yield child_path("metadata", field), f"a key is {described(key)}; it must be {right}"


def _label_faults(metadata: dict[str, Any]) -> Iterator[tuple[str, str]]:
    right = expected({"type": "string", "pattern": LABEL_VALUE_PATTERN})
    for key, value in _entries(metadata, "labels").items():
        # Other types are faults of the model.
        if isinstance(value, str) and not (len(value) <= 63 and _matches(LABEL_VALUE_PATTERN, value)):
            yield child_path("metadata.labels", key), f"is {described(value)}; it must be {right}"


def _entries(metadata: dict[str, Any], field: str) -> dict[str, Any]:
    entries = metadata.get(field)
    return entries if isinstance(entries, dict) else {}


def _is_key(key: str) -> bool:
    return len(key.rpartition("/")[0]) <= 253 and _matches(LABEL_KEY_PATTERN, key)


def _matches(pattern: str, text: str) -> bool:
    # Not `match`: Python's `$` takes a line break at the end.
    return re.fullmatch(pattern, text) is not None


def _label(number: int, document: Any) -> str:
    metadata = document.get("metadata") if isinstance(document, dict) else None
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return (
        f"document {number} ({name})"
        if isinstance(name, str) and name.isprintable()
        else f"document {number}"
    )


def _no_job(documents: list[Any]) -> str:
    if not documents:
        return f"is empty; it must hold a {names.KIND}"
    kinds = sorted({ascii(document["kind"][:60])[1:-1] for document in documents})
    return f"holds no {names.KIND}, only {', '.join(kinds)}"
