"""What the fields of a record mean: a chat, or a prompt and its completion. Pure: nothing here reads a file.

A record may be private: errors name its location and key, and never quote it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_trainer.data.readers import Row
from qlora_trainer.errors import DataError

Format = Literal["chat", "prompt-completion"]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    """Empty where a turn of the assistant is its tool calls alone."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What a template may read besides: `tool_calls` (a list of {"type": "function", "function": {"name",
    "arguments"}}, arguments as an object, `id` where the record has one), `name`, `tool_call_id`,
    `reasoning_content`. Whatever a record calls them; absent rather than null or empty."""
    trained: bool | None = None
    """False: a turn of the assistant that the record excludes from what is learned. None: the record does not say."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation with at least one turn of the assistant that is supervised."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """What the assistant may call, as templates read it: {"type": "function", "function": {...}}."""


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A text and what follows it, which is supervised."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Document:
    """A text to learn as a whole; the end of text that follows it is tokenization's to add."""

    text: str


Content = Chat | PromptCompletion | Document


@dataclass(frozen=True, slots=True)
class Record:
    """What one sample is made from."""

    location: str
    """`file.jsonl: line 17`, for errors."""
    content: Content
    digest: bytes
    """sha256 of the content alone: not of where it stands, its spacing or its other keys."""

    @property
    def split_key(self) -> float:
        """A number in [0, 1), spread evenly over records and fixed by the content: decides what is held out."""
        return (int.from_bytes(self.digest[:8], "big") >> 11) / 2**53


def parse_chat(fields: dict[str, Any], location: str) -> Chat:
    """The conversation of a record with `messages`. Raises DataError."""
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{location}: messages must be a list with at least one message")
    chat = Chat(tuple(_message(value, f"{location}: messages[{i}]") for i, value in enumerate(messages)))
    if all(message.role != "assistant" for message in chat.messages):
        raise DataError(f"{location}: messages has no assistant turn, so there is nothing to learn")
    return chat


def _message(value: object, location: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f'{location} must be an object {{"role": ..., "content": ...}}')
    role = value.get("role")
    if role not in ROLES:
        raise DataError(f"{location}.role must be one of {', '.join(ROLES)}")
    if value.get("tool_calls"):
        raise DataError(
            f"{location}.tool_calls cannot be trained on; write the call into content as the model would"
        )
    content = _text(value.get("content"), f"{location}.content")
    if role == "assistant" and not content.strip():
        raise DataError(f"{location}.content is blank; what the assistant says must not be")
    return Message(role, content)


def parse_prompt_completion(fields: dict[str, Any], location: str) -> PromptCompletion:
    """The two texts of a record with `prompt` and `completion`. Raises DataError."""
    prompt = _text(fields["prompt"], f"{location}: prompt")
    completion = _text(fields["completion"], f"{location}: completion")
    if not completion.strip():
        raise DataError(f"{location}: completion is blank, so there is nothing to learn")
    return PromptCompletion(prompt, completion)


def _text(value: object, location: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{location} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{location} holds half of a surrogate pair (\\ud800 to \\udfff), which is not text"
        ) from None
    return value


@dataclass(frozen=True)
class RecordKind:
    """A way to read a record's fields."""

    keys: tuple[str, ...]
    """A record of this kind has all of these. Keys without a meaning are ignored."""
    shape: str
    """As errors show it."""
    parse: Callable[[dict[str, Any], str], Content]
    """(fields, location) -> content; raises DataError."""


RECORD_KINDS: dict[Format, RecordKind] = {
    "chat": RecordKind(("messages",), '{"messages": [{"role": ..., "content": ...}, ...]}', parse_chat),
    "prompt-completion": RecordKind(
        ("prompt", "completion"), '{"prompt": ..., "completion": ...}', parse_prompt_completion
    ),
}
"""By the names that dataset.format has for them."""


def interpret(rows: Iterable[Row], format: Literal["auto"] | Format = "auto") -> Iterator[Record]:  # noqa: A002 - the API's word
    """The records of rows, in their order; `auto` goes by the first row.

    Raises DataError, which names the row and what would be right.
    """
    chosen: Format | None = None if format == "auto" else format
    for row in rows:
        chosen = chosen or detect_format(row)
        kind = RECORD_KINDS[chosen]
        for key in kind.keys:
            if key not in row.fields:
                why = f"as the first record is in the {chosen} format, " if format == "auto" else ""
                raise DataError(f"{row.location}: has no key {key!r}; {why}it must be {kind.shape}")
        content = kind.parse(row.fields, row.location)
        yield Record(row.location, content, content_digest(content))


def detect_format(row: Row) -> Format:
    """The one format that a row's keys fit. Raises DataError when none or several do."""
    fitting = [name for name, kind in RECORD_KINDS.items() if all(key in row.fields for key in kind.keys)]
    if len(fitting) == 1:
        return fitting[0]
    problem = "fits more than one format; set dataset.format" if fitting else "fits no format"
    shapes = " or ".join(kind.shape for kind in RECORD_KINDS.values())
    raise DataError(f"{row.location}: {problem}; a record is {shapes}")


def content_digest(content: Content) -> bytes:
    """sha256 of what a record says. It must never change: which records are held out depends on it."""
    parts: list[Any]
    match content:
        case Chat():
            parts = ["chat", *map(_message_parts, content.messages)]
            if content.tools:
                parts.append({"tools": content.tools})
        case PromptCompletion():
            parts = ["prompt-completion", content.prompt, content.completion]
        case Document():
            parts = ["text", content.text]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":"), sort_keys=True).encode()).digest()


def _message_parts(message: Message) -> list[Any]:
    """A role and a content as ever; what releases after 0.1.0 read besides only where there is some."""
    excluded = message.trained is False
    more = [message.extra, *(["excluded"] if excluded else [])] if message.extra or excluded else []
    return [message.role, message.content, *more]
