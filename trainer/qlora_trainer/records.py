"""Training records as their JSONL file has them: read, checked, hashed.

A record may be private: errors name its line and key, and never quote it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_trainer.errors import DataError

Format = Literal["chat", "prompt-completion"]

ROLES = ("system", "user", "assistant", "tool")
SHAPES: dict[Format, str] = {
    "chat": '{"messages": [{"role": ..., "content": ...}, ...]}',
    "prompt-completion": '{"prompt": ..., "completion": ...}',
}
KEYS: dict[Format, tuple[str, ...]] = {"chat": ("messages",), "prompt-completion": ("prompt", "completion")}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation with at least one turn of the assistant, whose turns are learnt."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A text and what follows it, which is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a file."""

    where: str
    """`file.jsonl: line 17`, for errors."""
    content: Chat | PromptCompletion
    digest: bytes
    """sha256 of the content alone: not of where it stands, its spacing or its other keys."""

    @property
    def fraction(self) -> float:
        """A number in [0, 1), spread evenly over records and fixed by the content."""
        return (int.from_bytes(self.digest[:8], "big") >> 11) / 2**53


def read_records(path: Path, format: Literal["auto"] | Format = "auto") -> list[Record]:  # noqa: A002 - the API's word
    """All records of a JSONL file, in its order; `auto` goes by the first record.

    Blank lines, a byte order mark and CRLF are fine, keys without a meaning here
    are ignored. Raises DataError, which names the line and what would be right.
    """
    records: list[Record] = []
    found: Format | None = None if format == "auto" else format
    for number, line in _lines(path):
        where = f"{path.name}: line {number}"
        fields = _fields(line, where)
        found = found or _tell(fields, where)
        _check_keys(fields, found, where, told=format == "auto" and bool(records))
        content = _chat(fields, where) if found == "chat" else _prompt_completion(fields, where)
        records.append(Record(where, content, _digest(content)))
    if not records:
        raise DataError(f"{path}: holds no record; one JSON object per line is expected")
    return records


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                text = _decode(raw, number, f"{path.name}: line {number}").strip()
                if text:
                    yield number, text
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a JSONL file: {error.strerror}") from error


def _decode(raw: bytes, number: int, where: str) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None


def _fields(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
        raise DataError(f"{where}: is not JSON ({problem}); one whole object per line is expected") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or nesting as deep
        raise DataError(f"{where}: is JSON that is too large to read: a number or its nesting") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: is no JSON object; one object per line is expected")
    return value


def _tell(fields: dict[str, Any], where: str) -> Format:
    fitting = [name for name, keys in KEYS.items() if all(key in fields for key in keys)]
    if len(fitting) == 1:
        return fitting[0]
    problem = "fits more than one format; set dataset.format" if fitting else "fits no format"
    raise DataError(f"{where}: {problem}; a record is {' or '.join(SHAPES.values())}")


def _check_keys(fields: dict[str, Any], format: Format, where: str, *, told: bool) -> None:  # noqa: A002
    for key in KEYS[format]:
        if key not in fields:
            why = f"as the first record is in the {format} format, " if told else ""
            raise DataError(f"{where}: has no key {key!r}; {why}it must be {SHAPES[format]}")


def _chat(fields: dict[str, Any], where: str) -> Chat:
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list with at least one message")
    chat = Chat(tuple(_message(m, f"{where}: messages[{i}]") for i, m in enumerate(messages)))
    if all(message.role != "assistant" for message in chat.messages):
        raise DataError(f"{where}: messages has no turn of the assistant, so nothing would be learnt")
    return chat


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f'{where} must be an object {{"role": ..., "content": ...}}')
    role = value.get("role")
    if role not in ROLES:
        raise DataError(f"{where}.role must be one of {', '.join(ROLES)}")
    if value.get("tool_calls"):
        raise DataError(
            f"{where}.tool_calls cannot be learnt; write the call into content as the model would"
        )
    content = _text(value.get("content"), f"{where}.content")
    if role == "assistant" and not content.strip():
        raise DataError(f"{where}.content is blank; what the assistant says must not be")
    return Message(role, content)


def _prompt_completion(fields: dict[str, Any], where: str) -> PromptCompletion:
    prompt = _text(fields["prompt"], f"{where}: prompt")
    completion = _text(fields["completion"], f"{where}: completion")
    if not completion.strip():
        raise DataError(f"{where}: completion is blank, so nothing would be learnt")
    return PromptCompletion(prompt, completion)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
        ) from None
    return value


def _digest(content: Chat | PromptCompletion) -> bytes:
    parts: list[Any] = (
        ["chat", *([m.role, m.content] for m in content.messages)]
        if isinstance(content, Chat)
        else ["prompt-completion", content.prompt, content.completion]
    )
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).digest()
