"""What the fields of records mean, wherever they came from."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.readers import BadRow, Row
from qlora_trainer.data.records import (
    RECORD_KINDS,
    Chat,
    Document,
    Format,
    Message,
    PromptCompletion,
    Record,
    interpret,
    unread_label,
)
from qlora_trainer.errors import DataError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
CHAT = {"messages": [USER, ASSISTANT]}
PAIR = {"prompt": "2+2=", "completion": "4"}


def records_of(
    *rows: dict[str, Any], named: Any = "auto", columns: dict[str, str] | None = None
) -> list[Record]:
    """The records that rows with these fields are."""
    numbered = (Row(f"file.x: row {number}", fields) for number, fields in enumerate(rows, start=1))
    records = []
    for item in interpret(numbered, named, columns):
        if isinstance(item, BadRow):
            raise DataError(str(item))
        records.append(item)
    return records


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
        ({"messages": 7}, "row 2: messages must be a list with at least one message"),
        ({"messages": "hi"}, "row 2: messages is a text that is not JSON"),
        (messages(USER), "row 2: messages has no assistant turn, so there is nothing to learn"),
        (messages(USER, "x"), r"row 2: messages\[1\] must be an object"),
        (messages({"role": "captain", "content": "x"}), r"messages\[0\].role must be one of system, developer"),
        (messages({"role": ["user"], "content": "x"}), r"messages\[0\].role must be one of"),
        (messages({"content": "x"}), r"messages\[0\].role must be one of"),
        (messages(USER, {"role": "assistant", "content": None}), r"messages\[1\].content must be a string"),
        (messages(USER, {"role": "assistant", "content": " \n"}), r"messages\[1\].content is blank"),
        (messages(USER, {**ASSISTANT, "tool_calls": [{}]}), r"messages\[1\].tool_calls\[0\] must be"),
        (messages(USER, {"role": "assistant", "content": "\ud800"}), r"messages\[1\].content holds half of a"),
    ],
    ids=[
        "mixture", "no-messages", "messages-type", "messages-text", "no-assistant", "message-type", "role",
        "role-type", "no-role", "content-type", "blank", "tool-calls", "surrogate",
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
        ({"prompt": "x", "completion": [USER]}, "row 2: completion has no assistant turn"),
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
        ({}, "row 1: fits no format; a record is "),
        ({**CHAT, **PAIR}, "fits more than one format, chat and prompt-completion; set dataset.format"),
        (
            {"question": "x", "answer": "y", "id": 1},
            r"\(its columns: question, answer, id\); did you .*--columns instruction=question,output=answer\)\?; a rec",
        ),
        ({"Content": "x"}, r"did you mean dataset\.columns: \{text: Content\} "),
        ({"a": 1, "b": 2}, r"\(its columns: a, b\); dataset\.columns says which of them is what"),
        (
            {"prompt": "x", "chosen": "y", "rejected": "z"},
            "it is preference data, which is not trained on: there is no preference training",
        ),
        ({"data": [{"a": 1}]}, "it is a list of records within an object; write that list to the file"),
        (
            {"version": "1", "data": [PAIR]},
            "data is a list of records within an object; write that list to the",
        ),
        (
            {"instruction": "x", "context": "y", "response": "z"},
            r"dataset\.columns: \{output: response, input: context\} ",
        ),
        ({"chats": [USER]}, r"did you mean dataset\.columns: \{messages: chats\} "),
        (
            USER,
            r"\(its columns: role, content\): it is one message, and a record is a whole conversation; a record is",
        ),
        ({"text": "x", "role": "Prompter"}, "it is one message, and a record is a whole conversation"),
    ],
    ids=[
        *(
            "none",
            "both",
            "question",
            "content",
            "unknown",
            "preference",
            "nested",
            "nested with more",
            "context",
        ),
        *("list of messages", "one message", "one message with a text"),
    ],
)
def test_a_first_record_must_fit_one_format(fields: dict[str, Any], error: str) -> None:
    """Without a named format, the first record must fit exactly one."""
    with pytest.raises(DataError, match=error):
        records_of(fields)


def test_a_text_may_say_where_it_is_from() -> None:
    """Only a speaker's name makes a message of it."""
    [record] = records_of({"text": "x", "from": "the web"})

    assert record.content == Document("x")


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


def test_columns_are_named_only_if_they_look_like_names() -> None:
    """A table without a line of names has a record there: only what cannot be text of one is told."""
    with pytest.raises(DataError, match=r"\(its columns: id, 1 more\)") as caught:
        records_of({"id": 1, "What is the password, hunter2?": 2})

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        ({"instruction": "Sort.", "input": "b a", "output": "a b"}, ["user: Sort.\nb a", "assistant: a b"]),
        ({"instruction": "Sort.", "input": "", "output": "a b"}, ["user: Sort.", "assistant: a b"]),
        (
            {"instruction": "More", "output": "z", "system": "Be brief.", "history": [["hi", "hello"]]},
            ["system: Be brief.", "user: hi", "assistant: hello", "user: More", "assistant: z"],
        ),
        (
            {
                "instruction": "More",
                "output": "z",
                "input": None,
                "history": '[["hi", "hello"]]',
                "system": "",
            },
            ["user: hi", "assistant: hello", "user: More", "assistant: z"],
        ),
    ],
    ids=["input", "empty-input", "history", "history-as-text"],
)
def test_alpaca_is_a_conversation(fields: dict[str, Any], turns: list[str]) -> None:
    """Instruction and input are what the user says, output the answer; system and history stand before them."""
    [record] = records_of(fields)

    assert isinstance(record.content, Chat)
    assert [f"{turn.role}: {turn.content}" for turn in record.content.messages] == turns


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"instruction": " ", "output": "x"}, "instruction is blank"),
        ({"instruction": "x", "output": " "}, "output is blank, so there is nothing to learn"),
        ({"instruction": "x", "input": 1, "output": "x"}, "input must be a string"),
        ({"instruction": "x", "output": "x", "history": [["a"]]}, r"history must be a list of \[question, answer\]"),
        ({"instruction": "x", "output": "x", "history": "a"}, "history is a text that is not JSON"),
        ({"text": " "}, "text is blank"),
        ({"text": 1}, "text must be a string"),
        ({**CHAT, "images": ["hunter2"]}, "has the key images, which cannot be trained on; remove it if"),
        ({**CHAT, "rejected": "x"}, "has the key rejected, which makes it preference data"),
        ({**CHAT, "chat_template_kwargs": {"a": 1}}, "has the key chat_template_kwargs, which is not passed"),
        ({**PAIR, "label": False}, "has a label that is true or false"),
        ({**PAIR, "system": "x"}, "system is not read beside a prompt that is a text"),
        (
            {"system": "x", "messages": [{**USER, "role": "system"}, ASSISTANT]},
            "has a system message both in system and in messages; leave one",
        ),
        ({**CHAT, "tools": [1]}, "tools must be a list of objects"),
        ({**CHAT, "tools": [{"name": "a"}], "functions": [{"name": "a"}]}, "has both tools and functions"),
        (messages(USER, {**ASSISTANT, "weight": 0}), "messages excludes every assistant turn"),
        ({"prompt": [USER], "completion": [USER]}, "completion has no assistant turn"),
    ],
)  # fmt: skip
def test_what_would_change_the_meaning_is_refused_by_name(fields: dict[str, Any], error: str) -> None:
    """A key that is not honored, or that has no meaning where it stands, is named; what it holds is not."""
    with pytest.raises(DataError, match=rf"^file\.x: row 1: {error}") as caught:
        records_of(fields)

    assert "hunter2" not in str(caught.value)


def test_a_text_is_a_document() -> None:
    """A record with nothing but a text is learned as a whole; beside a format of its own, text is just another key."""
    assert records_of({"text": "Once."})[0].content == Document("Once.")
    assert isinstance(records_of({"instruction": "a", "output": "b", "text": "all of it"})[0].content, Chat)


@pytest.mark.parametrize("prompt", [[USER], USER["content"]], ids=["messages", "text"])
@pytest.mark.parametrize("completion", [[ASSISTANT], ASSISTANT["content"]], ids=["messages", "text"])
def test_a_prompt_of_messages_is_a_conversation(prompt: Any, completion: Any) -> None:
    """If one of the two is a list of messages, both are turns."""
    [record] = records_of({"prompt": prompt, "completion": completion})

    if isinstance(prompt, str) and isinstance(completion, str):
        assert record.content == PromptCompletion("hi", "hello")
    else:
        assert record.content == Chat((Message("user", "hi"), Message("assistant", "hello")))


def test_what_the_assistant_says_in_a_prompt_is_not_learned() -> None:
    """Only the completion is: the prompt's turns of the assistant are excluded."""
    [record] = records_of(
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT], "tools": [{"name": "f"}]}
    )

    assert isinstance(record.content, Chat)
    assert [turn.trained for turn in record.content.messages] == [None, False, None, None]
    assert record.content.tools == ({"type": "function", "function": {"name": "f"}},)


def test_a_system_column_is_the_first_message() -> None:
    """As ShareGPT files of some tools have it; one that repeats the system message does no harm."""
    system = {"role": "system", "content": "Be brief."}

    records = records_of(
        {**CHAT, "system": "Be brief."}, {**messages(system, USER, ASSISTANT), "system": "Be brief."}
    )

    assert records[0].content == records[1].content
    assert records[0].content == Chat(
        (Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "hello"))
    )


def test_columns_may_have_other_names() -> None:
    """dataset.columns says which column is which; the format is told by the names that it gives."""
    question = {"instruction": "question", "output": "answer"}

    [chat] = records_of({"question": "2+2?", "answer": "4", "text": "x"}, columns=question)
    [pair] = records_of({"q": "2+2=", "completion": "4"}, columns={"prompt": "q"})

    assert chat.content == Chat((Message("user", "2+2?"), Message("assistant", "4")))
    assert pair.content == PromptCompletion("2+2=", "4")


def test_null_is_as_good_as_absent() -> None:
    """A table has every column in every row, and a message of one every key: what is null is not there."""
    empty = {"name": None, "tool_calls": None, "weight": None}
    plain, of_table = records_of(CHAT, {**messages({**USER, **empty}, {**ASSISTANT, **empty}), "tools": None})

    assert plain.digest == of_table.digest
    assert plain.content == of_table.content


def test_a_bad_record_does_not_end_the_others() -> None:
    """Each record is read or told; the format is that of the first that could be read at all."""
    rows = [
        BadRow("f: line 1", "is not JSON"),
        Row("f: line 2", PAIR),
        Row("f: line 3", {}),
        Row("f: line 4", PAIR),
    ]
    formats: list[str] = []

    items = list(interpret(rows, found=formats.append))

    assert [type(item).__name__ for item in items] == ["BadRow", "Record", "BadRow", "Record"]
    assert [str(item).split(";")[0] for item in items if isinstance(item, BadRow)] == [
        "f: line 1: is not JSON",
        "f: line 3: has no key 'prompt'",
    ]
    assert formats == ["prompt-completion"]


KEYS = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "history",
    "system",
]
KEYS += [
    "text",
    "tools",
    "images",
    "label",
    "role",
    "content",
    "from",
    "value",
    "name",
    "arguments",
    "function",
]
KEYS += ["tool_calls", "function_call", "weight", "train", "reasoning_content", "type"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.sampled_from(["", " ", "user", "gpt", "text", "{}", "[]", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(
    fields=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5),
    named=st.sampled_from([*RECORD_KINDS, "auto"]),
)
def test_any_fields_are_a_record_or_told(fields: dict[str, Any], named: Any) -> None:
    """Whatever JSON a record holds, it is read or refused in a sentence, and a record has a digest."""
    told = "file.x: row 1: "
    records: list[Record] = []
    try:
        records = records_of(fields, named=named)
    except DataError as error:
        told = str(error)

    assert told.startswith("file.x: row 1: ")
    assert all(len(record.digest) == 32 for record in records)


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


@pytest.mark.parametrize(
    ("format_", "fields", "columns", "says"),
    [
        pytest.param(
            "text", {"text": "a", "label": "b"}, {}, "{instruction: text, output: label} ", id="label"
        ),
        pytest.param(
            "text",
            {"text": "a", "Sentiment": "b"},
            {"text": "review"},
            "instruction=review,output=Sentiment; ",
            id="its own names",
        ),
        pytest.param(
            "text", {"text": "a", "label": 1}, {}, "with a name in place of each number", id="a number"
        ),
        pytest.param("text", {"text": "a", "source": "b"}, {}, "", id="another column"),
        pytest.param("text", {"text": "a", "labels": ["b"]}, {}, "", id="a list"),
        pytest.param(
            "alpaca", {"instruction": "a", "output": "b", "label": "c"}, {}, "", id="not a document"
        ),
    ],
)
def test_a_label_beside_a_text_is_said_with_the_columns_that_learn_it(
    format_: Any, fields: dict[str, Any], columns: dict[str, str], says: str
) -> None:
    """In the words of who has the data; nothing of any other column."""
    said = unread_label(format_, fields, columns)

    assert says in said if says else said == ""
