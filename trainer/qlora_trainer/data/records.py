"""What the fields of a record mean: a chat, a prompt and its completion, or a text. Pure: nothing here reads a file.

A record may be private: errors name its location and key, and never quote it.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_trainer.data.messages import ROLES, check_text, json_value, parse_messages, parse_tools
from qlora_trainer.data.messages import Message as Message
from qlora_trainer.data.readers import BadRow, Row
from qlora_trainer.errors import DataError

Format = Literal["chat", "prompt-completion", "alpaca", "text"]

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Keys of a conversation, in the order in which they are looked for."""
TOOLS = ("tools", "functions")
"""Keys of what the assistant may call."""
LABELS = (
    *(
        "label",
        "labels",
        "label_text",
        "class",
        "category",
        "sentiment",
        "emotion",
        "intent",
        "topic",
        "target",
    ),
    *("rating", "score", "stars"),
)
"""Columns beside a text that say of which kind it is."""
SPEAKERS = ("role", "from")
"""Keys of who says a message."""
NO_PREFERENCES = (
    "preference data, which is not trained on: there is no preference training (DPO and the like); give the wanted "
    "answers alone, as completion or as messages"
)
NOT_HONORED: Mapping[str, str] = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "cannot be trained on"),
    **dict.fromkeys(("documents", "chat_template_kwargs"), "is not passed to the chat template"),
    **dict.fromkeys(
        ("rejected", "rejected_response", "rejected_responses"),
        f"makes it {NO_PREFERENCES}",
    ),
}
"""Keys that would change what a record means, and why it is refused."""
MAX_COLUMNS_SHOWN = 12
COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,39}")
"""What looks like a column's name: anything else may be a value, of a CSV file without a header, say."""


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


def parse_chat(fields: Mapping[str, Any]) -> Chat:
    """The conversation of a record with `messages` or `conversations`. Raises DataError."""
    key = next(key for key in CONVERSATIONS if key in fields)
    messages = parse_messages(fields[key], key)
    system = _optional_text(fields, "system")
    if system and messages[0] != Message("system", system):
        if any(message.role == "system" for message in messages):
            raise DataError(f"has a system message both in system and in {key}; leave one of them")
        messages = (Message("system", system), *messages)
    return _chat(messages, fields, key)


def _chat(messages: tuple[Message, ...], fields: Mapping[str, Any], key: str) -> Chat:
    """Messages and the record's tools. Raises DataError when there is nothing to learn."""
    turns = [message for message in messages if message.role == "assistant"]
    if not turns:
        raise DataError(f"{key} has no assistant turn, so there is nothing to learn")
    if all(message.trained is False for message in turns):
        raise DataError(f"{key} excludes every assistant turn (weight, train), so there is nothing to learn")
    tools = [parse_tools(fields[key], key) for key in TOOLS if fields.get(key)]
    if len(tools) > 1:
        raise DataError("has both tools and functions; leave one of them")
    return Chat(messages, tools[0] if tools else ())


def parse_prompt_completion(fields: Mapping[str, Any]) -> PromptCompletion | Chat:
    """A prompt and a completion: two texts, or the messages of a conversation. Raises DataError."""
    prompt, completion = (_written_messages(fields[key]) for key in ("prompt", "completion"))
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = (
            parse_messages(prompt, "prompt")
            if isinstance(prompt, list)
            else (Message("user", check_text(prompt, "prompt")),)
        )
        answer = parse_messages(
            completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}],
            "completion",
        )
        given = tuple(
            Message(turn.role, turn.content, turn.extra, trained=False if turn.role == "assistant" else None)
            for turn in asked
        )
        _chat(answer, {}, "completion")  # something to learn is in it
        return _chat(given + answer, fields, "completion")
    prompt, completion = check_text(prompt, "prompt"), check_text(completion, "completion")
    if not completion.strip():
        raise DataError("completion is blank, so there is nothing to learn")
    if fields.get("system"):
        raise DataError("system is not read beside a prompt that is a text; write it into the prompt")
    return PromptCompletion(prompt, completion)


def _written_messages(value: object) -> object:
    """A value as it is; but messages where it is the text of JSON that holds some, as a table of texts has them."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    are_messages = isinstance(found, list) and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in found
    )
    return found if are_messages and found else value


def parse_alpaca(fields: Mapping[str, Any]) -> Chat:
    """A conversation: system, the turns of history, instruction and input as the user's, output. Raises DataError."""
    instruction = check_text(fields["instruction"], "instruction")
    given = _optional_text(fields, "input")
    asked = "\n".join(text for text in (instruction, given) if text.strip())
    output = check_text(fields["output"], "output")
    if not asked:
        raise DataError("instruction is blank")
    if not output.strip():
        raise DataError("output is blank, so there is nothing to learn")
    messages = [*_history(fields.get("history")), Message("user", asked), Message("assistant", output)]
    if system := _optional_text(fields, "system"):
        messages.insert(0, Message("system", system))
    return _chat(tuple(messages), fields, "output")


def _history(value: object) -> Iterator[Message]:
    pairs = json_value(value, "history") if value and isinstance(value, str) else value
    for i, pair in enumerate(pairs if isinstance(pairs, list) else [pairs] if pairs else []):
        if not isinstance(pair, list) or len(pair) != len(("question", "answer")):
            raise DataError("history must be a list of [question, answer]")
        yield Message("user", check_text(pair[0], f"history[{i}][0]"))
        yield Message("assistant", check_text(pair[1], f"history[{i}][1]"))


def parse_text(fields: Mapping[str, Any]) -> Document:
    """A document. Raises DataError."""
    text = check_text(fields["text"], "text")
    if not text.strip():
        raise DataError("text is blank, so there is nothing to learn")
    return Document(text)


def _optional_text(fields: Mapping[str, Any], key: str) -> str:
    return check_text(fields[key], key) if fields.get(key) else ""


@dataclass(frozen=True)
class RecordKind:
    """A way to read a record's fields."""

    keys: tuple[tuple[str, ...], ...]
    """A record of this kind has one key of each. Keys without a meaning are ignored."""
    optional: tuple[str, ...]
    """What it may have besides."""
    shape: str
    """As errors show it."""
    parse: Callable[[Mapping[str, Any]], Content]
    """Fields without null -> content; raises DataError, without the location."""

    def unread(self, fields: Mapping[str, Any]) -> list[str]:
        """Keys that mean nothing to it."""
        known = {*self.optional, *(name for names in self.keys for name in names)}
        return [key for key in fields if key not in known]

    def missing(self, fields: Mapping[str, Any]) -> list[str]:
        """Keys that a record of this kind would have, and these fields do not."""
        return [names[0] for names in self.keys if not any(name in fields for name in names)]


RECORD_KINDS: dict[Format, RecordKind] = {
    "chat": RecordKind(
        (CONVERSATIONS,),
        ("system", *TOOLS),
        '{"messages": [{"role": ..., "content": ...}, ...]}',
        parse_chat,
    ),
    "prompt-completion": RecordKind(
        (("prompt",), ("completion",)),
        ("system", *TOOLS),
        '{"prompt": ..., "completion": ...}',
        parse_prompt_completion,
    ),
    "alpaca": RecordKind(
        (("instruction",), ("output",)),
        ("input", "system", "history", *TOOLS),
        '{"instruction": ..., "input": ..., "output": ...}',
        parse_alpaca,
    ),
    "text": RecordKind((("text",),), (), '{"text": ...}', parse_text),
}
"""By the names that dataset.format has for them."""


def interpret(
    rows: Iterable[Row | BadRow],
    format: Literal["auto"] | Format = "auto",  # noqa: A002 - the API's word
    columns: Mapping[str, str] | None = None,
    found: Callable[[Format], object] = lambda _: None,
    detected: Format | None = None,
) -> Iterator[Record | BadRow]:
    """The records of rows, in their order, and what is wrong with each of the others; `auto` goes by the first row.

    Args:
        rows: as a reader gives them.
        format: what they are.
        columns: name that a format has for a key -> name that the rows have for it.
        found: called once with the format of the rows.
        detected: what `auto` has found in a row before these.

    Raises DataError when no format fits the first row, which names it and what would be right.
    """
    chosen: Format | None = detected if format == "auto" else format
    why = f"as the first record is in the {detected} format, " if detected else ""
    if chosen:
        found(chosen)
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        fields = renamed(row.fields, columns or {})
        if chosen is None:
            chosen = detect_format(fields, row.location)
            found(chosen)
            why = f"as the first record is in the {chosen} format, "
        kind = RECORD_KINDS[chosen]
        if missing := kind.missing(fields):
            yield BadRow(row.location, f"has no key {missing[0]!r}; {why}it must be {kind.shape}")
            continue
        try:
            refuse_what_is_not_honored(fields)
            content = kind.parse(fields)
        except DataError as error:
            yield BadRow(row.location, str(error))
        else:
            yield Record(row.location, content, content_digest(content))


def renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Fields without those that are null, by the names that formats have for them.

    A container with a fixed set of columns has null where a record has nothing.
    """
    kept = {key: value for key, value in fields.items() if value is not None}
    found = {ours: kept[theirs] for ours, theirs in columns.items() if theirs in kept}
    return {key: value for key, value in kept.items() if key not in columns.values()} | found


def refuse_what_is_not_honored(fields: Mapping[str, Any]) -> None:
    """Raises DataError for a key that would change what the record means."""
    for key, why in NOT_HONORED.items():
        if fields.get(key):
            remedy = "" if NO_PREFERENCES in why else "; remove it if the record is right without it"
            raise DataError(f"has the key {key}, which {why}{remedy}")
    if isinstance(fields.get("label"), bool) and "completion" in fields:
        raise DataError(
            "has a label that is true or false, as data of wanted and unwanted completions have; there is no "
            "preference training: keep the wanted ones, and remove the key"
        )


def detect_format(fields: Mapping[str, Any], location: str) -> Format:
    """The one format that a record's keys fit; `text` only if nothing else does. Raises DataError."""
    fitting = [name for name, kind in RECORD_KINDS.items() if not kind.missing(fields)]
    if len(fitting) > 1 and "text" in fitting:
        fitting.remove("text")
    if len(fitting) == 1 and not (fitting == ["text"] and _is_message(fields)):
        return fitting[0]
    if len(fitting) > 1:
        raise DataError(
            f"{location}: fits more than one format, {' and '.join(fitting)}; set dataset.format (without a job file, "
            "--format)"
        )
    shapes = " or ".join(kind.shape for kind in RECORD_KINDS.values())
    raise DataError(f"{location}: fits no format{_nearest(fields)}; a record is {shapes}")


def _nearest(fields: Mapping[str, Any]) -> str:
    """What the columns of a record that fits no format are, and which format they are nearest to."""
    names = [key for key in fields if isinstance(key, str) and COLUMN.fullmatch(key)][:MAX_COLUMNS_SHOWN]
    more = len(fields) - len(names)
    told = [*names, *([f"{more} more"] if more else [])]
    if {"chosen", "rejected"} & set(names):
        return f" (its columns: {', '.join(told)}): it is {NO_PREFERENCES}"
    if not names:
        return ""
    shown = f" (its columns: {', '.join(told)})"
    if _is_message(fields):
        return f"{shown}: it is one message, and a record is a whole conversation"
    lists = [
        key
        for key in names
        if isinstance(fields[key], list) and fields[key] and isinstance(fields[key][0], dict)
    ]
    talks = [key for key in lists if _is_message(fields[key][0])]
    if len(lists) == 1 and not talks and (len(fields) == 1 or _fits_any(fields[lists[0]][0])):
        what = "it" if len(fields) == 1 else lists[0]
        return f"{shown}: {what} is a list of records within an object; write that list to the file"
    columns = {"messages": talks[0]} if len(talks) == 1 else suggested_columns(names)
    if columns:
        mapping = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
        option = ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())
        return (
            f"{shown}; did you mean dataset.columns: {{{mapping}}} (without a job file, --columns {option})?"
        )
    return f"{shown}; dataset.columns says which of them is what"


def _is_message(fields: Mapping[str, Any]) -> bool:
    """Whether these are the fields of one message rather than of a record."""
    said_by = (fields.get(key) for key in SPEAKERS)
    return any(isinstance(speaker, str) and speaker.lower() in ROLES for speaker in said_by)


def _fits_any(fields: Mapping[str, Any]) -> bool:
    return any(not kind.missing(fields) for kind in RECORD_KINDS.values())


SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "messages": ("chat", "dialog", "dialogue", "turns", "conversation_messages"),
    "instruction": ("question", "query", "problem", "user", "inputs", "input", "prompt"),
    "output": (
        "answer",
        "response",
        "solution",
        "assistant",
        "target",
        "targets",
        "outputs",
        "label",
        "completion",
    ),
    "text": ("content", "document", "body", "article", "raw_content"),
}
"""Names that columns of the same meaning often have, for the sentence about a record that fits no format."""


def suggested_columns(names: list[str]) -> dict[str, str] | None:
    """A dataset.columns that would make records with these columns readable, if one is likely."""
    lowered = {name.lower(): name for name in names}

    def column(ours: str) -> str | None:
        like = [ours, *SYNONYMS[ours]]
        exact = next((lowered[name] for name in like if name in lowered), None)
        near = difflib.get_close_matches(ours, lowered, n=1, cutoff=0.8)
        return exact or (lowered[near[0]] if near else None)

    for wanted in (("messages",), ("instruction", "output"), ("text",)):
        found = {ours: theirs for ours in wanted if (theirs := column(ours)) is not None}
        if len(found) == len(wanted) == len(set(found.values())):
            if "output" in found and "context" in lowered:
                found["input"] = lowered["context"]
            return {ours: theirs for ours, theirs in found.items() if ours != theirs}
    return None


def unread_label(format_: Format, fields: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """That a text's label is not learned, and how it is, in a sentence; empty where there is none.

    Args:
        format_: of the records.
        fields: of the first of them, by the names that formats have for them.
        columns: of dataset.columns.
    """
    label = next((key for key in fields if isinstance(key, str) and key.lower() in LABELS), None)
    if format_ != "text" or label is None or not isinstance(fields[label], str | int | float):
        return ""
    text = columns.get("text", "text")
    number = "" if isinstance(fields[label], str) else ", with a name in place of each number"
    return (
        f"the column {label} is not learned, as these records are documents: to learn it as the answer to the text, "
        f"set dataset.columns: {{instruction: {text}, output: {label}}} (without a job file, --columns "
        f"instruction={text},output={label}; prompt and completion for a model that has no chat template){number}"
    )


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
