"""What the fields of records mean, wherever they came from."""

import json
from typing import Any

import pytest

from qlora_trainer.data.readers import Row
from qlora_trainer.data.records import (
    RECORD_KINDS,
    Chat,
    Format,
    Message,
    PromptCompletion,
    Record,
    interpret,
)
from qlora_trainer.errors import DataError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
CHAT = {"messages": [USER, ASSISTANT]}
PAIR = {"prompt": "2+2=", "completion": "4"}


def records_of(*rows: dict[str, Any], named: Any = "auto") -> list[Record]:
    """The records that rows with these fields are."""
    numbered = (Row(f"file.x: row {number}", fields) for number, fields in enumerate(rows, start=1))
    return list(interpret(numbered, named))


def test_reads_conversations() -> None:
    """A record with messages is a conversation, told from the first record."""
    [record] = records_of(CHAT)

    assert record.content == Chat((Message("user", "hi"), Message("assistant", "hello")))
    assert record.location == "file.x: row 1"


def test_reads_prompts_and_completions() -> None:
    """A record with a prompt and a completion is such a pair; the prompt may be empty; other keys do no harm."""
    records = records_of(PAIR, {"prompt": "", "completion": "x", "id": 7})

    assert [record.content for record in records] == [
        PromptCompletion("2+2=", "4"),
        PromptCompletion("", "x"),
    ]


def test_a_format_that_is_named_decides() -> None:
    """A record that fits both formats is read as the named one."""
    both = {**CHAT, **PAIR}

    assert isinstance(records_of(both, named="chat")[0].content, Chat)
    assert isinstance(records_of(both, named="prompt-completion")[0].content, PromptCompletion)


def messages(*values: Any) -> dict[str, Any]:
    """The fields of a conversation."""
    return {"messages": list(values)}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (PAIR, "row 2: has no key 'messages'; as the first record is in the chat format"),
        ({"messages": []}, "row 2: messages must be a list with at least one message"),
        ({"messages": "hi"}, "row 2: messages must be a list with at least one message"),
        (messages(USER), "row 2: messages has no assistant turn, so there is nothing to learn"),
        (messages(USER, "x"), r"row 2: messages\[1\] must be an object"),
        (messages({"role": "gpt", "content": "x"}), r"messages\[0\].role must be one of system, user"),
        (messages({"role": ["user"], "content": "x"}), r"messages\[0\].role must be one of"),
        (messages({"content": "x"}), r"messages\[0\].role must be one of"),
        (messages(USER, {"role": "assistant", "content": None}), r"messages\[1\].content must be a string"),
        (messages(USER, {"role": "assistant", "content": " \n"}), r"messages\[1\].content is blank"),
        (messages(USER, {**ASSISTANT, "tool_calls": [{}]}), r"messages\[1\].tool_calls cannot be trained on"),
        (messages(USER, {"role": "assistant", "content": "\ud800"}), r"messages\[1\].content holds half of a"),
    ],
    ids=[
        "mixture", "no-messages", "messages-type", "no-assistant", "message-type", "role", "role-type", "no-role",
        "content-type", "blank", "tool-calls", "surrogate",
    ],
)  # fmt: skip
def test_names_what_is_wrong_in_a_conversation(fields: dict[str, Any], error: str) -> None:
    """A record that is not a conversation is named, with what would be right."""
    with pytest.raises(DataError, match=r"^file\.x: row 2.*" + error.removeprefix("row 2")):
        records_of(CHAT, fields)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (
            {"prompt": "x"},
            r"row 2: has no key 'completion'; as the first .* \{\"prompt\": ..., \"completion\": ...\}",
        ),
        ({"prompt": 1, "completion": "x"}, "row 2: prompt must be a string"),
        ({"prompt": "x", "completion": [USER]}, "row 2: completion must be a string"),
        ({"prompt": "x", "completion": ""}, "row 2: completion is blank, so there is nothing to learn"),
        ({"prompt": "\udfff", "completion": "x"}, "row 2: prompt holds half of a surrogate pair"),
    ],
    ids=["key", "prompt-type", "completion-type", "blank", "surrogate"],
)
def test_names_what_is_wrong_in_a_pair(fields: dict[str, Any], error: str) -> None:
    """A record that is not a prompt and a completion is named, with what would be right."""
    with pytest.raises(DataError, match=error):
        records_of(PAIR, fields)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"text": "x"}, "row 1: fits no format; a record is "),
        ({**CHAT, **PAIR}, "fits more than one format; set"),
    ],
    ids=["none", "both"],
)
def test_a_first_record_must_fit_one_format(fields: dict[str, Any], error: str) -> None:
    """Without a named format, the first record must fit exactly one."""
    with pytest.raises(DataError, match=error):
        records_of(fields)


def test_a_named_format_is_required_of_each_record() -> None:
    """With a named format, a record without its keys is an error from the first one on."""
    with pytest.raises(DataError, match="row 1: has no key 'messages'; it must be"):
        records_of(PAIR, named="chat")


def test_an_error_never_quotes_a_record() -> None:
    """What a record says stays out of errors: it may be private."""
    secret = messages({"role": "hunter2", "content": "hunter2"})
    for fields in (secret, {"hunter2": 1}):
        with pytest.raises(DataError) as caught:
            records_of(CHAT, fields)
        assert "hunter2" not in str(caught.value)


def test_every_format_of_the_api_has_a_kind() -> None:
    """What dataset.format may name can be interpreted."""
    assert set(RECORD_KINDS) == set(Format.__args__)


def test_the_digest_is_of_the_content_alone() -> None:
    """Other keys and escapes leave a record's digest; any change of content does not."""
    first, second, other = records_of(
        {"prompt": "é", "completion": "4"},
        json.loads('{ "completion":"4", "id": 7, "prompt": "\\u00e9"}'),
        {"prompt": "é4", "completion": "4"},
    )

    assert first.digest == second.digest != other.digest


def test_the_digest_never_changes() -> None:
    """The digest is the same in every version: which records are held out depends on it."""
    records = [records_of(fields)[0] for fields in (CHAT, PAIR)]

    assert [round(record.split_key, 6) for record in records] == [0.741894, 0.474708]
    assert [record.digest.hex()[:16] for record in records] == ["bdecbd04a291abf2", "798679c1b1915986"]
