"""A conversation's turns, however a record spells them."""

from typing import Any

import pytest

from qlora_trainer.data.messages import ROLES, Message, parse_messages, parse_tools
from qlora_trainer.errors import DataError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def turn(**fields: Any) -> Message:
    """The one turn that these fields are."""
    [message] = parse_messages([fields], "messages")
    return message


@pytest.mark.parametrize(("spelling", "role"), ROLES.items())
def test_roles_have_many_spellings(spelling: str, role: str) -> None:
    """OpenAI's and ShareGPT's roles are those that templates know."""
    content = '{"name": "f", "arguments": {"x": 1}}'

    message = turn(**{"from": spelling, "value": content})

    assert message.role == role
    if spelling in ("function_call", "tool_call"):
        assert (message.content, message.extra) == ("", {"tool_calls": [CALL]})
    else:
        assert (message.content, message.extra) == (content, {})


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "Assistant", "content": "hi"},
        {"from": "GPT", "value": "hi"},
        {"from": "gpt", "content": "hi"},
        {"role": "assistant", "value": "hi"},
        {"role": "AI", "text": "hi"},
        {"role": "assistant", "content": "hi", "text": 7},
    ],
    ids=str,
)
def test_roles_are_in_any_case_and_keys_in_any_pair(fields: dict[str, Any]) -> None:
    """People mix the spellings of both families; the usual key of a message's text is looked at first."""
    assert turn(**fields) == Message("assistant", "hi")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hi", "hi"),
        ([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}], "hi"),
        ([{"type": "input_text", "text": "hi"}], "hi"),
        ([], ""),
    ],
    ids=["text", "parts", "responses", "no-parts"],
)
def test_content_may_come_in_parts(content: Any, text: str) -> None:
    """Parts of type text are joined as they stand."""
    assert turn(role="user", content=content) == Message("user", text)


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"tool_calls": '[{"name": "f", "parameters": {"x": 1}}]'},
        {"function_call": {"name": "f", "arguments": '{"x": 1}'}},
    ],
    ids=["object", "text", "flat", "whole-text", "legacy"],
)
@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}], ids=["null", "absent", "empty"])
def test_calls_have_arguments_as_objects(calls: dict[str, Any], content: dict[str, Any]) -> None:
    """However a call is spelled, templates read one form; content may then be null, absent or empty."""
    assert turn(role="assistant", **content, **calls) == Message("assistant", "", {"tool_calls": [CALL]})


def test_a_call_keeps_its_id_and_may_have_no_arguments() -> None:
    """Both are as OpenAI has them."""
    message = turn(
        role="assistant",
        content="Wait.",
        tool_calls=[{"id": "c1", "function": {"name": "f", "arguments": ""}}],
    )

    assert message.content == "Wait."
    assert message.extra["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {}}, "id": "c1"}
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_many_spellings(key: str) -> None:
    """Templates read one of them."""
    assert turn(role="assistant", content="4", **{key: "2 and 2"}).extra == {"reasoning_content": "2 and 2"}


def test_what_a_tool_answers_keeps_its_name_and_call() -> None:
    """A template may show them; what is null or empty is not there."""
    message = turn(
        role="tool", content="4", name="f", tool_call_id="c1", reasoning_content="", tool_calls=None
    )

    assert message == Message("tool", "4", {"name": "f", "tool_call_id": "c1"})


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"training": False}, False),
        ({"loss": False}, False),
        ({"train": True, "weight": 1}, True),
        ({}, None),
    ],
    ids=str,
)
def test_a_message_says_whether_it_is_learned(fields: dict[str, Any], trained: bool | None) -> None:
    """By OpenAI's weight, or by a boolean; one that is not may be blank."""
    assert turn(role="assistant", content="x", **fields).trained is trained
    assert turn(role="user", content="x", **{k: v for k, v in fields.items() if not v}).trained is None
    if trained is False:
        assert turn(role="assistant", content="", **fields).content == ""


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"role": "user", "content": {"x": "hunter2"}}, "content must be a string, and is an object"),
        ({"role": "user"}, "content must be a string, and is missing"),
        ({"from": "user", "value": True}, "value must be a string, and is true or false"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "hunter2"}]}, r"content\[0\] is not a text"),
        ({"role": "user", "content": ["hunter2"]}, r"content\[0\] is not a text"),
        ({"role": "user", "content": [{"type": "text", "text": 7}]}, r"content\[0\]\.text must be a string"),
        ({"role": "user", "content": None}, "content must be a string"),
        ({"from": "hunter2", "value": "x"}, "from must be one of system, developer, user, human"),
        ({"from": "gpt", "value": " "}, "value is blank"),
        ({"from": "function_call", "value": "hunter2"}, "value is a text that is not JSON"),
        ({"from": "tool_call", "value": "{'x': 'hunter2'}"}, "value is a list or dict as Python prints it"),
        ({"role": "assistant", "content": "x", "audio": {"id": "hunter2"}}, "audio cannot be trained on"),
        ({"role": "assistant", "content": "x", "train_detail": [1]}, "train_detail cannot be trained on"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "weight must be 0 or 1"),
        ({"role": "assistant", "content": "x", "weight": True}, "weight must be 0 or 1"),
        ({"role": "assistant", "content": "x", "train": "no"}, "train must be true or false"),
        ({"role": "user", "content": "x", "train": True}, "train is true, but only what the assistant says"),
        ({"role": "user", "content": "x", "thinking": "hunter2"}, "thinking belongs to a turn of the assistant"),
        ({"role": "assistant", "content": "x", "thinking": 7}, "thinking must be a string"),
        ({"role": "assistant", "content": "x", "tool_calls": ["hunter2"]}, r"tool_calls\[0\] must be"),
        ({"role": "assistant", "content": "x", "tool_calls": "hunter2"}, "tool_calls is a text that is not JSON"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "hunter2"}}]},
            r"tool_calls\[0\]\.arguments is a text that is not JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
            r"tool_calls\[0\]\.arguments must be an object",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "\ud800"}}}]},
            r"tool_calls\[0\]\.arguments holds what JSON cannot say",
        ),
    ],
)  # fmt: skip
def test_names_what_is_wrong_and_never_quotes_it(fields: dict[str, Any], error: str) -> None:
    """Errors name the key, in the record's own spelling."""
    with pytest.raises(DataError, match=rf"^messages\[0\]\.{error}") as caught:
        turn(**fields)

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (
            {"weight": 0, "train": True},
            r"messages\[0\] says both that it is to be learned and that it is not",
        ),
        ({"thinking": "a", "reasoning": "b"}, r"messages\[0\] has both reasoning and thinking"),
        (
            {"tool_calls": [CALL], "function_call": {"name": "f"}},
            r"messages\[0\] has both tool_calls and function_call",
        ),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], error: str) -> None:
    """Which of two is meant cannot be known."""
    with pytest.raises(DataError, match=error):
        turn(role="assistant", content="x", **fields)


def test_messages_may_be_the_text_of_json_or_columns() -> None:
    """As CSV has them, and as Arrow files have a sequence of features."""
    expected = (Message("user", "hi"), Message("assistant", "hello"))

    as_text = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]'
    assert parse_messages(as_text, "messages") == expected
    assert parse_messages({"from": ["human", "gpt"], "value": ["hi", "hello"]}, "conversations") == expected
    with pytest.raises(DataError, match="conversations has columns of different lengths"):
        parse_messages({"from": ["human"], "value": []}, "conversations")


@pytest.mark.parametrize(
    "tools", [[{"type": "function", "function": {"name": "f"}}], [{"name": "f"}], '[{"name": "f"}]'],
    ids=["whole", "function", "text"],
)  # fmt: skip
def test_tools_are_functions(tools: Any) -> None:
    """Whole, as the function alone, or as the text of either."""
    assert parse_tools(tools, "tools") == ({"type": "function", "function": {"name": "f"}},)
