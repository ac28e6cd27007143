"""What was probably meant by a value that has the wrong form."""

import re
from typing import Any

from qlora_contract import remote
from qlora_operator.api import quantity
from qlora_operator.api.schema import Schema

_HUB_FORM = re.compile(f"{remote.HUB_NAME}/{remote.HUB_NAME}")
_HUB_PAGE = re.compile(
    rf"(https?://)?(huggingface\.co|hf\.co)/(?P<kind>datasets/)?(?P<root>{remote.HUB_NAME}/{remote.HUB_NAME})(/.*)?"
)
_MEMORY = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?) ?(?P<letter>[kmgtp])?(i?b|i)?", re.IGNORECASE)

_UNQUOTED = {
    "integer": "[0-9]+",
    "number": r"[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?",
    "boolean": "true|false",
}
"""Type -> what is a value of it in YAML once its quotes are gone."""
_URIS = {
    remote.PVC_PATTERN: "workspace",
    remote.MODEL_PATTERN: "model",
    remote.DATASET_PATTERN: "dataset",
    remote.DESTINATION_PATTERN: "destination",
}
"""Pattern of a URI -> what it is the URI of."""


def hint(value: Any, node: Schema) -> str | None:
    """What is wrong with a value, more closely, or what was perhaps meant by it; None: nothing comes to mind.

    Args:
        value: one that does not meet the schema.
        node: the schema.
    """
    pattern = node.get("pattern")
    if pattern == quantity.MEMORY_PATTERN:
        return _memory(value)
    if not isinstance(value, str):
        return None
    if pattern in _URIS:
        return _uri(value, _URIS[pattern])
    if node.get("type") in _UNQUOTED and re.fullmatch(_UNQUOTED[node["type"]], value.strip()):
        return f"did you mean {value.strip()}, without quotes?"
    if node.get("type") == "object" and re.match(r"\w+:\S", value):
        return "a space is missing after the colon"
    return None


def _memory(value: Any) -> str | None:
    found = _MEMORY.fullmatch(str(value).strip()) if isinstance(value, int | float | str) else None
    if found is None or isinstance(value, bool):
        return None
    number, letter = found["number"], found["letter"]
    if letter is None:
        return None if isinstance(value, str) else f"did you mean {number}Gi?"
    decimal = "k" if letter in "kK" else letter.upper()
    return f"did you mean {number}{decimal} or {number}{letter.upper()}i?"


def _uri(value: str, role: str) -> str | None:
    if value.startswith("pvc://"):
        return None if role == "destination" else _claim(value)
    if value.startswith("s3://"):
        return _bucket(value)
    if page := _HUB_PAGE.fullmatch(value):
        return _of_the_hub(page["root"], role, kind=page["kind"] or "")
    if value.startswith("hf://"):
        return _hub(value.removeprefix("hf://"), role)
    if role == "destination":
        return f"did you mean hf://{value}?" if _HUB_FORM.fullmatch(value) else None
    if role != "workspace" and _HUB_FORM.fullmatch(value) and not value.startswith("."):
        return _of_the_hub(value, role)
    if value.startswith("~"):
        return f"there is no user {value.partition('/')[0].removeprefix('~')} on this machine"
    if value.startswith("file:///"):
        return f"did you mean {value.removeprefix('file://')}, as the `qlora` command reads it?"
    if value and "://" not in value:
        return "a path of one machine is for the `qlora` command alone: a cluster reads pvc://CLAIM/PATH"
    return None


def _hub(rest: str, role: str) -> str | None:
    if role == "dataset" and not rest.startswith("datasets/") and _HUB_FORM.match(rest):
        return f"did you mean hf://datasets/{rest}?"
    if role == "model" and rest.startswith("datasets/"):
        return "that is a dataset of the Hub, and a model is needed"
    if role == "workspace":
        return "a job needs a folder that it can write to"
    return None


def _of_the_hub(root: str, role: str, kind: str = "") -> str | None:
    if role == "workspace" or (role == "model" and kind):
        return _hub(f"{kind}{root}", role)
    return f"did you mean hf://{'datasets/' if role == 'dataset' else kind}{root}?"


def _claim(value: str) -> str | None:
    """Which characters of a claim's name, or what of the path, is not allowed."""
    claim, _, path = value.removeprefix("pvc://").partition("/")
    if not re.fullmatch(remote.CLAIM, claim):
        near = re.sub("[^-a-z0-9.]+", "-", claim.lower()).strip("-.")
        return (
            f"{_why(claim, '-a-z0-9.', 'a claim')}: it has lower-case letters, digits, '-' and '.', and begins and "
            f"ends with a letter or digit{f'; did you mean pvc://{near}/{path}?' if near else ''}"
        )
    if "//" in f"/{path}":
        return "the path has two slashes in a row"
    return None


def _bucket(value: str) -> str | None:
    bucket = value.removeprefix("s3://").partition("/")[0]
    if re.fullmatch(remote.BUCKET, bucket):
        return None
    why = _why(bucket, "-a-z0-9.", "a bucket")
    return f"{why}: it has 3 to 63 lower-case letters, digits, '-' and '.'"


def _why(name: str, allowed: str, what: str) -> str:
    """What is wrong with a name: the characters that it may not have, or its ends."""
    wrong = list(dict.fromkeys(re.findall(f"[^{allowed}]", name)))
    if not name:
        return f"the name of {what} is missing"
    if not wrong:
        return f"{name!r} is not the name of {what}"
    return f"{what}'s name may not have {', '.join(map(ascii, wrong))}"
