"""YAML and JSON as kubectl reads them: text to plain values (maps, lists, strings, numbers, booleans, null).

PyYAML parses; what its nodes mean is decided here, since `qlora validate` must give the verdict of kubectl and the API
server, and a SafeLoader with other resolvers would not: to kubectl `2e-4` is a number, a number without a fraction is
an integer however it is written (`1e3`, `4.0`), `1:30` and dates are strings, `y` and `n` are booleans, and keys are
strings whatever they look like. A loader's constructors also see neither the path of what they construct, which every
message begins with, nor how often an alias is expanded. Stricter than kubectl in one point: a key that is given twice
is refused, since one of its values would be dropped silently.
"""

import json
import math
import re
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
"""Size of a file. A job has about 2 KiB, and about 10 with all that the API server adds."""
MAX_VALUES = 20_000
"""Values of a file, aliases counted each time: this stops an alias bomb."""
MAX_DEPTH = 50

_PLAIN = "plain"
_YAML = "tag:yaml.org,2002:"
_STRING = f"{_YAML}str"
_TAGS = frozenset({_PLAIN, *(_YAML + kind for kind in ("str", "int", "float", "bool", "null", "map", "seq"))})
_BOOLEANS = {
    **{word: True for base in ("y", "yes", "true", "on") for word in (base, base.capitalize(), base.upper())},
    **{
        word: False
        for base in ("n", "no", "false", "off")
        for word in (base, base.capitalize(), base.upper())
    },
}
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_NOT_FINITE = re.compile(r"\.nan|\.NaN|\.NAN|[-+]?(\.inf|\.Inf|\.INF)")
_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO]?[0-7]+|0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

_PLAIN_PATH = re.compile(r"[-A-Za-z0-9_./]+")


class DocumentError(ValueError):
    """Text that cannot be read as a document, or that contains what a job cannot."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        """Field path as users write it; empty for the text itself."""


def child_path(path: str, part: str | int) -> str:
    """The field path of a part of what is at `path`: `spec` and `isa` give `spec.isa`, and 1 gives
    `spec[1]`."""
    if isinstance(part, int):
        return f"{path}[{part}]"
    shown = part if _PLAIN_PATH.fullmatch(part) else ascii(part[:80])
    return f"{path}.{shown}" if path else shown


def read_documents(content: bytes) -> list[Any]:
    """The documents of a YAML or JSON file, without empty ones.

    Raises:
        DocumentError: for whatever is wrong with the bytes.
    """
    text = _decode(content)
    try:
        if text.lstrip().startswith("{"):
            try:
                # Reads a number as YAML does; keeps objects as pairs until their keys are known to differ.
                value = json.loads(
                    text, object_pairs_hook=_Pairs, parse_int=_json_number, parse_float=_json_number
                )
                return [_checked(value, "", 0)]
            except json.JSONDecodeError:
                pass  # a map in YAML's flow style begins like this too
        reader = _Reader()
        values = (reader.value(node, "", 0) for node in yaml.compose_all(text, Loader=_Loader))
        return [value for value in values if value is not None]
    except yaml.YAMLError as error:
        raise DocumentError(_yaml_message(error)) from error
    except RecursionError as error:
        raise DocumentError(f"is nested deeper than {MAX_DEPTH} levels") from error


def _decode(content: bytes) -> str:
    if len(content) > MAX_BYTES:
        raise DocumentError(f"is larger than {MAX_BYTES // 1024} KiB; a job has a few")
    if b"\0" in content:
        raise DocumentError("is a binary file or not UTF-8; a job is a YAML or JSON text in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}"
        ) from error


class _Loader(yaml.BaseLoader):
    """Composes nodes, and marks plain scalars: what they mean is decided here, not by PyYAML."""

    composed = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.composed += 1
        if self.composed > MAX_VALUES:
            raise DocumentError(f"contains more than {MAX_VALUES} values")
        return super().compose_node(parent, index)


class _Reader:
    """Turns nodes into values, within the bounds of a file."""

    def __init__(self) -> None:
        self.left = MAX_VALUES

    def value(self, node: yaml.Node, path: str, depth: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise DocumentError(f"contains more than {MAX_VALUES} values, aliases counted each time")
        if depth > MAX_DEPTH:
            raise DocumentError(
                f"is nested deeper than {MAX_DEPTH} levels, or an alias contains itself", path
            )
        _check_tag(node, path)
        if isinstance(node, yaml.MappingNode):
            return self._map(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [
                self.value(item, child_path(path, index), depth + 1) for index, item in enumerate(node.value)
            ]
        return _scalar(node, path)

    def _map(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _PLAIN and key_node.value == "<<":
                merged |= self._merged(value_node, path, depth)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise DocumentError("a key is a map or a list; it must be a string", path)
            scalar = _scalar(key_node, path)
            key = scalar if isinstance(scalar, str) else json.dumps(scalar)
            if key in own:
                raise DocumentError("is given twice in the same map", child_path(path, key))
            own[key] = self.value(value_node, child_path(path, key), depth + 1)
        return {**merged, **own}

    def _merged(self, node: yaml.Node, path: str, depth: int) -> dict[str, Any]:
        """What `<<` adds: a map, or several of which the earlier ones win."""
        values = self.value(node, child_path(path, "<<"), depth + 1)
        maps = values if isinstance(values, list) else [values]
        result: dict[str, Any] = {}
        for added in reversed(maps):
            if not isinstance(added, dict):
                raise DocumentError("must be a map or a list of maps", child_path(path, "<<"))
            result |= added
        return result


def _scalar(node: yaml.Node, path: str) -> str | int | float | bool | None:
    _check_tag(node, path)
    text = str(node.value)
    return _text(text, path) if node.tag == _STRING else plain_value(text, path)


def _check_tag(node: yaml.Node, path: str) -> None:
    if node.tag not in _TAGS:
        tag = str(node.tag).replace(_YAML, "!!")[:60]
        raise DocumentError(f"has the tag {tag!a}; a job has plain values only", path)


def _text(text: str, path: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DocumentError("contains half of a surrogate pair, which is not a character", path)
    return text


def plain_value(text: str, path: str = "") -> str | int | float | bool | None:
    """The value that kubectl reads in a scalar without quotes. Raises DocumentError for what JSON cannot express."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _NOT_FINITE.fullmatch(text):
        raise DocumentError(f"is {text}; it must be a finite number", path)
    number = text.replace("_", "") if text[0] in "+-0123456789" else text
    if len(number) <= 400 and _INTEGER.fullmatch(number):
        # Go reads 0777 as octal; Python wants 0o777.
        octal = re.fullmatch(r"[-+]?0[0-7]+", number)
        return int(number, 8 if octal else 0)
    if _FLOAT.fullmatch(number) and math.isfinite(value := float(number)):
        # kubectl sends 4.0 as 4, but 1e+21 as it is.
        return int(value) if value.is_integer() and abs(value) < 1e21 else value
    return text


class _Pairs(tuple[tuple[str, Any], ...]):
    """A JSON object before its keys are known to differ."""

    __slots__ = ()


def _json_number(text: str) -> int | float:
    number = plain_value(text)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise DocumentError(f"{text[:60]} is not a number that a job can have")
    return number


def _checked(value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise DocumentError(f"is nested deeper than {MAX_DEPTH} levels", path)
    if isinstance(value, _Pairs):
        result: dict[str, Any] = {}
        for key, item in value:
            if key in result:
                raise DocumentError("is given twice in the same map", child_path(path, key))
            result[key] = _checked(item, child_path(path, key), depth + 1)
        return result
    if isinstance(value, list):
        return [_checked(item, child_path(path, index), depth + 1) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise DocumentError(f"is {value}; it must be a finite number", path)
    return _text(value, path) if isinstance(value, str) else value


def _yaml_message(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = error.problem or error.context or "cannot be read"
        began = error.context_mark
        if error.problem and error.context and began and mark and began.line != mark.line:
            what += f", {error.context} that begins in line {began.line + 1}"
        hint = "; YAML is indented with spaces" if r"'\t'" in what else ""
        return f"is not YAML: {where}{what}{hint}"
    return f"is not YAML: {' '.join(str(error).split())[:200]}"
