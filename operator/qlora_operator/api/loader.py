"""Jobs from files and from the API server.

A file is read strictly: as kubectl reads it, validated as the API server validates it. It is stricter than both in one
point: a job needs a name, where an API server would make one from generateName. It is more lenient in two: a status is
ignored whatever it holds, and of metadata only name, namespace, labels and annotations are checked.

What the API server returns is read leniently: it was validated there, perhaps by the CRD of a newer release, which sets
the defaults of fields that this operator does not know.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_contract.base import split_unknown
from qlora_operator.api import foreign, names
from qlora_operator.api.messages import described, expected, unknown_field, validation_faults
from qlora_operator.api.schema import Schema, job_schema
from qlora_operator.api.v1alpha1 import LABEL_KEY_PATTERN, LABEL_VALUE_PATTERN, QLoRAJob
from qlora_operator.api.yaml_reader import MAX_BYTES, DocumentError, child_path, read_documents
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


Amend = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes a job as a document has it, and returns it with changes. Raises InvalidJobError."""


def file_label(path: str) -> str:
    """What people are told that a file is called."""
    return "standard input" if path == STDIN else path


def load_jobs(path: str, amend: Amend = lambda document: document) -> list[QLoRAJob]:
    """The QLoRAJobs of a YAML or JSON file (`-`: standard input), in their order.

    Documents of other kinds are ignored; the items of a list count as documents.

    Args:
        path: the file.
        amend: what the command line changes of each job before it is validated.

    Raises:
        InvalidFileError: with every fault that was found, or because there is no QLoRAJob in it.
    """
    file = file_label(path)
    try:
        read = read_documents(_content(path))
    except DocumentError as error:
        raise InvalidFileError([Fault(file, error.message, error.path)]) from error
    documents: list[Any] = []
    for document in read:
        # A list as `kubectl get -o yaml` writes it stands for its items.
        is_list = isinstance(document, dict) and document.get("kind") in ("List", names.LIST_KIND)
        items = document.get("items") if is_list else None
        documents += items if isinstance(items, list) else [document]
    jobs: list[QLoRAJob] = []
    faults: list[Fault] = []
    for number, document in enumerate(documents, start=1):
        try:
            found = parse_job(document, amend)
        except InvalidJobError as error:
            label = ""
            if len(documents) > 1:
                metadata = document.get("metadata") if isinstance(document, dict) else None
                name = metadata.get("name") if isinstance(metadata, dict) else None
                named = f" ({name})" if isinstance(name, str) and name.isprintable() else ""
                label = f"document {number}{named}"
            faults += [Fault(file, message, where, label) for where, message in error.faults]
        else:
            jobs += [found] if found else []
    if not jobs and not faults:
        kinds = ", ".join(sorted({ascii(document["kind"][:60])[1:-1] for document in documents}))
        found_instead = f"does not contain a {names.KIND}, only {kinds}"
        faults.append(
            Fault(file, found_instead if documents else f"is empty; it must contain a {names.KIND}")
        )
    if faults:
        raise InvalidFileError(faults)
    return jobs


def parse_job(document: Any, amend: Amend = lambda document: document) -> QLoRAJob | None:
    """The job in a document of a file, with changes; None for an object of another kind.

    Raises:
        InvalidJobError: with every fault that was found.
    """
    if not isinstance(document, dict):
        raise InvalidJobError([("", f"the document is {described(document)}; a job is a map")])
    version, kind = document.get("apiVersion"), document.get("kind")
    of_our_group = isinstance(version, str) and version.partition("/")[0] == names.GROUP
    # What does not say what it is may well be meant to be a job.
    if not (of_our_group or kind == names.KIND or not isinstance(kind, str)):
        return None
    if version is None and kind is None and (program := foreign.program_of(document)):
        raise InvalidJobError([("", foreign.explanation(program))])
    document = amend(document)
    # Only the operator writes the status: the API server ignores it in what users send, too.
    stated = {key: value for key, value in document.items() if key != "status"}
    faults = list(_metadata_faults(stated.get("metadata")))
    try:
        job = QLoRAJob.model_validate(without_nulls(stated, job_schema()), by_alias=True, by_name=False)
    except ValidationError as error:
        faults += validation_faults(error)
    if faults:
        raise InvalidJobError(faults)
    return job


def parse_api_object(raw: Mapping[str, Any]) -> tuple[QLoRAJob, list[str]]:
    """A job as the API server returns it, and the paths of the fields that this release does not know.

    Those are ignored: the CRD of a newer release may give them defaults in every job. What has been ignored should be
    logged once for each generation of a job.

    Args:
        raw: the object, as its JSON is.

    Raises:
        ValidationError: a field that is known has a value that is not.
    """
    known, unknown = split_unknown(raw, QLoRAJob)
    return QLoRAJob.model_validate(known, by_alias=True, by_name=False), [path for path, _ in unknown]


def without_nulls(value: Any, schema: Schema) -> Any:
    """The value without known fields, and entries of maps, that are null: an API server drops them."""
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
    """The file's bytes, at most one more than it may have: an endless file ends, too."""
    if path == STDIN:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DocumentError(f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise DocumentError("cannot be read: the name contains a null character") from error


def _metadata_faults(metadata: Any) -> Iterator[tuple[str, str]]:
    """What an API server refuses of metadata. Fields of the wrong type are faults of the model."""
    if not isinstance(metadata, dict):
        return
    for name in metadata:
        if name not in OBJECT_META:
            yield child_path("metadata", name), unknown_field(name, OBJECT_META)
    label_key = expected({"type": "string", "pattern": LABEL_KEY_PATTERN})
    for field in ("labels", "annotations"):
        for key in _entries(metadata, field):
            # The prefix of an annotation may have capitals.
            lower = key.lower() if field == "annotations" else key
            # Not `match`: Python's `$` accepts a line break at the end.
            if len(key.rpartition("/")[0]) > 253 or not re.fullmatch(LABEL_KEY_PATTERN, lower):
                yield child_path("metadata", field), f"a key is {described(key)}; it must be {label_key}"
    label_value = expected({"type": "string", "pattern": LABEL_VALUE_PATTERN})
    for key, value in _entries(metadata, "labels").items():
        if isinstance(value, str) and not (len(value) <= 63 and re.fullmatch(LABEL_VALUE_PATTERN, value)):
            yield child_path("metadata.labels", key), f"is {described(value)}; it must be {label_value}"


def _entries(metadata: dict[str, Any], field: str) -> dict[str, Any]:
    entries = metadata.get(field)
    return entries if isinstance(entries, dict) else {}
