"""A conversation's turns, however a record spells them: OpenAI's messages, ShareGPT's conversations, tools. Pure.

Errors name the key, and never quote what it holds.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_trainer.errors import DataError

ROLES: Mapping[str, str] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "ai": "assistant", "bot": "assistant", "chatbot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""The roles that templates know, by the spellings of them, in whatever case."""
CALLS = ("function_call", "tool_call")
"""Roles of a turn of the assistant whose content is the call itself, as JSON."""
EXCLUDING = ("train", "training", "loss")
"""Keys by which a message says, with a boolean, whether it is learned."""
REASONING = ("reasoning_content", "reasoning", "thinking")
NOT_HONORED = ("audio", "images", "refusal", "train_detail", "training_detail")
"""Keys of a message that would change what it means, and that nothing here reads."""
TEXT_PARTS = ("text", "input_text", "output_text")
CONTENTS = ("content", "value", "text")
"""Keys of what a message says, in the order in which they are looked for."""
KINDS = {
    bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes",
    type(None): "missing",
}  # fmt: skip
"""What a value is that should be text."""


PRINTED_BY_PYTHON = re.compile(r"\s*\[?\s*\{\s*'")
"""How lists and dicts begin in a table that was written without a thought of JSON."""


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


def parse_messages(value: object, key: str) -> tuple[Message, ...]:
    """The turns of a list, or of the text of one as CSV has it. Raises DataError."""
    listed = json_value(value, key) if isinstance(value, str) else value
    if isinstance(listed, dict) and all(isinstance(column, list) for column in listed.values()):
        # As Arrow files have a list of messages that was declared as a sequence of features.
        listed = [dict(zip(listed, turn, strict=True)) for turn in _rows_of(listed, key)]
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{key} must be a list with at least one message")
    return tuple(_message(turn, f"{key}[{i}]") for i, turn in enumerate(listed))


def _rows_of(columns: dict[str, list[Any]], key: str) -> list[tuple[Any, ...]]:
    if len({len(column) for column in columns.values()}) > 1:
        raise DataError(f"{key} has columns of different lengths")
    return list(zip(*columns.values(), strict=True))


def parse_tools(value: object, key: str) -> tuple[dict[str, Any], ...]:
    """Declared tools: a list, or the text of one; each as it stands or as its `function` alone. Raises DataError."""
    listed = json_value(value, key) if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise DataError(f"{key} must be a list of objects")
    tools = [tool if "function" in tool or "name" not in tool else _as_function(tool) for tool in listed]
    check_json(tools, key)
    return tuple(tools)


def _as_function(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {k: v for k, v in function.items() if k != "type"}}


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f'{where} must be an object {{"role": ..., "content": ...}}')
    role_key, usual = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    content_key = next((key for key in (usual, *CONTENTS) if key in value), usual)
    spelling = value.get(role_key)
    spelling = spelling.lower() if isinstance(spelling, str) else None
    role = None if spelling is None else ROLES.get(spelling)
    if role is None:
        known = ", ".join(
            ROLES if role_key == "from" else ("system", "developer", "user", "assistant", "tool")
        )
        raise DataError(f"{where}.{role_key} must be one of {known}")
    for key in NOT_HONORED:
        if value.get(key):
            raise DataError(f"{where}.{key} cannot be trained on")
    content_where = f"{where}.{content_key}"
    content, extra = value.get(content_key), _extra(value, role, where)
    if spelling in CALLS:
        calls = json_value(content, content_where)
        extra["tool_calls"] = _tool_calls(calls if isinstance(calls, list) else [calls], content_where)
        content = None
    if content is None and "tool_calls" in extra:
        content = ""
    text = _content(content, content_where)
    trained = _trained(value, role, where)
    if role == "assistant" and trained is not False and not text.strip() and "tool_calls" not in extra:
        raise DataError(f"{content_where} is blank; what the assistant says must not be")
    return Message(role, text, extra, trained)


def _extra(value: dict[str, Any], role: str, where: str) -> dict[str, Any]:
    """What a template may read of a message besides role and content."""
    extra: dict[str, Any] = {}
    for key in ("name", "tool_call_id"):
        if value.get(key):
            extra[key] = check_text(value[key], f"{where}.{key}")
    reasoning = {key: value[key] for key in REASONING if value.get(key)}
    calls = {key: value[key] for key in ("tool_calls", "function_call") if value.get(key)}
    for kind in (reasoning, calls):
        if kind and role != "assistant":
            raise DataError(f"{where}.{next(iter(kind))} belongs to a turn of the assistant")
        if len(kind) > 1:
            raise DataError(f"{where} has both {' and '.join(kind)}; leave one of them")
    for key, text in reasoning.items():
        extra["reasoning_content"] = check_text(text, f"{where}.{key}")
    for key, listed in calls.items():
        extra["tool_calls"] = _tool_calls(listed if key == "tool_calls" else [listed], f"{where}.{key}")
    return extra


def _tool_calls(value: object, where: str) -> list[dict[str, Any]]:
    listed = json_value(value, where) if isinstance(value, str) else value
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{where} must be a list of calls")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(listed)]


def _tool_call(value: object, where: str) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict) or not function.get("name"):
        raise DataError(f'{where} must be {{"function": {{"name": ..., "arguments": {{...}}}}}}')
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        arguments = json_value(arguments, f"{where}.arguments")
    arguments = arguments or {}
    if not isinstance(arguments, dict):
        raise DataError(f"{where}.arguments must be an object, or the text of one")
    check_json(arguments, f"{where}.arguments")
    name = check_text(function["name"], f"{where}.name")
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call | ({"id": check_text(value["id"], f"{where}.id")} if value.get("id") else {})


def _content(value: object, where: str) -> str:
    """A message's text: a string, or parts that are all text."""
    if not isinstance(value, list):
        return check_text(value, where)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
            raise DataError(f"{where}[{i}] is not a text; images, audio and files cannot be trained on")
        texts.append(check_text(part.get("text"), f"{where}[{i}].text"))
    return "".join(texts)


def _trained(value: dict[str, Any], role: str, where: str) -> bool | None:
    """Whether a message says that it is to be learned, or not."""
    said: set[bool] = set()
    if (weight := value.get("weight")) is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise DataError(f"{where}.weight must be 0 or 1")
        said.add(weight == 1)
    for key in EXCLUDING:
        if (flag := value.get(key)) is None:
            continue
        if not isinstance(flag, bool):
            raise DataError(f"{where}.{key} must be true or false")
        if flag and role != "assistant":
            raise DataError(f"{where}.{key} is true, but only what the assistant says can be learned")
        said.add(flag)
    if len(said) > 1:
        raise DataError(f"{where} says both that it is to be learned and that it is not")
    return said.pop() if said and role == "assistant" else None


def json_value(text: object, where: str) -> Any:
    """What the JSON in a text says. Raises DataError."""
    text = check_text(text, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if PRINTED_BY_PYTHON.match(text):
            raise DataError(
                f"{where} is a list or dict as Python prints it, which is not JSON; write it with json.dumps"
            ) from None
        raise DataError(f"{where} is a text that is not JSON") from None


def check_json(value: object, where: str) -> None:
    """Raises DataError for a value that JSON, or UTF-8, cannot say."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        raise DataError(f"{where} holds what JSON cannot say") from None


def check_text(value: object, where: str) -> str:
    """The value, if it is text. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{where} must be a string, and is {KINDS.get(type(value), 'something else')}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is not text"
        ) from None
    return value
