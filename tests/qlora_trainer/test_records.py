"""Training records as their file has them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.errors import DataError
from qlora_trainer.records import Chat, Message, PromptCompletion, read_records

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
CHAT = {"messages": [USER, ASSISTANT]}
PAIR = {"prompt": "2+2=", "completion": "4"}


def _write(folder: Path, *records: Any) -> Path:
    path = folder / "file.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_reads_conversations(tmp_path: Path) -> None:
    """A record with messages is a conversation, told from the first record."""
    [record] = read_records(_write(tmp_path, CHAT))

    assert record.content == Chat((Message("user", "hi"), Message("assistant", "hello")))
    assert record.where == "file.jsonl: line 1"


def test_reads_prompts_and_completions(tmp_path: Path) -> None:
    """A record with a prompt and a completion is such a pair; the prompt may be empty."""
    records = read_records(_write(tmp_path, PAIR, {"prompt": "", "completion": "x"}))

    assert [record.content for record in records] == [
        PromptCompletion("2+2=", "4"),
        PromptCompletion("", "x"),
    ]


def test_reads_what_editors_leave_behind(tmp_path: Path) -> None:
    """A byte order mark, CRLF, blank lines, other keys and a missing last newline do no harm."""
    path = tmp_path / "file.jsonl"
    line = json.dumps({**PAIR, "id": float("nan"), "notes": "a\u2028b"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)

    records = read_records(path)

    assert [record.where for record in records] == ["file.jsonl: line 1", "file.jsonl: line 4"]


def test_a_format_that_is_named_decides(tmp_path: Path) -> None:
    """A record that fits both formats is read as the named one."""
    path = _write(tmp_path, {**CHAT, **PAIR})

    assert isinstance(read_records(path, "chat")[0].content, Chat)
    assert isinstance(read_records(path, "prompt-completion")[0].content, PromptCompletion)


def _chat(*messages: Any) -> str:
    return json.dumps({"messages": messages})


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", r"line 2: is not JSON \(Expecting property name .* at column 2\); one whole object per line"),
        ("[1]", "line 2: is no JSON object; one object per line"),
        ('{"messages": ' + "[" * 200_000 + "}", "line 2: is JSON that is too large to read"),
        ('{"x": ' + "1" * 5000 + "}", "line 2: is JSON that is too large to read"),
        (json.dumps(PAIR), "line 2: has no key 'messages'; as the first record is in the chat format"),
        ('{"messages": []}', "line 2: messages must be a list with at least one message"),
        ('{"messages": "hi"}', "line 2: messages must be a list with at least one message"),
        (_chat(USER), "line 2: messages has no turn of the assistant, so nothing would be learnt"),
        (_chat(USER, "x"), r"line 2: messages\[1\] must be an object"),
        (_chat({"role": "gpt", "content": "x"}), r"messages\[0\].role must be one of system, user"),
        (_chat({"role": ["user"], "content": "x"}), r"messages\[0\].role must be one of"),
        (_chat({"content": "x"}), r"messages\[0\].role must be one of"),
        (_chat(USER, {"role": "assistant", "content": None}), r"messages\[1\].content must be a string"),
        (_chat(USER, {"role": "assistant", "content": " \n"}), r"messages\[1\].content is blank"),
        (_chat(USER, {**ASSISTANT, "tool_calls": [{}]}), r"messages\[1\].tool_calls cannot be learnt"),
        (_chat(USER, {"role": "assistant", "content": "\ud800"}), r"messages\[1\].content holds half of a"),
    ],
    ids=[
        "json", "no-object", "deep", "long-number", "mixture", "no-messages", "messages-type", "no-assistant",
        "message-type", "role", "role-type", "no-role", "content-type", "blank", "tool-calls", "surrogate",
    ],
)  # fmt: skip
def test_names_what_is_wrong_in_a_conversation(tmp_path: Path, line: str, error: str) -> None:
    """A line that is no conversation is named, with what would be right."""
    path = _write(tmp_path, CHAT)
    path.write_text(path.read_text() + line + "\n")

    with pytest.raises(DataError, match=r"^file\.jsonl: line 2.*" + error.removeprefix("line 2")):
        read_records(path)


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (
            {"prompt": "x"},
            r"line 2: has no key 'completion'; as the first .* \{\"prompt\": ..., \"completion\": ...\}",
        ),
        ({"prompt": 1, "completion": "x"}, "line 2: prompt must be a string"),
        ({"prompt": "x", "completion": [USER]}, "line 2: completion must be a string"),
        ({"prompt": "x", "completion": ""}, "line 2: completion is blank, so nothing would be learnt"),
        ({"prompt": "\udfff", "completion": "x"}, "line 2: prompt holds half of a surrogate pair"),
    ],
    ids=["key", "prompt-type", "completion-type", "blank", "surrogate"],
)
def test_names_what_is_wrong_in_a_pair(tmp_path: Path, record: Any, error: str) -> None:
    """A line that is no prompt and completion is named, with what would be right."""
    with pytest.raises(DataError, match=error):
        read_records(_write(tmp_path, PAIR, record))


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"text": "x"}, "line 1: fits no format; a record is "),
        ({**CHAT, **PAIR}, "fits more than one format; set"),
    ],
    ids=["none", "both"],
)
def test_a_first_record_must_fit_one_format(tmp_path: Path, record: Any, error: str) -> None:
    """Without a named format, the first record must fit exactly one."""
    with pytest.raises(DataError, match=error):
        read_records(_write(tmp_path, record))


def test_a_named_format_is_required_of_each_record(tmp_path: Path) -> None:
    """With a named format, a record without its keys is an error from the first line on."""
    with pytest.raises(DataError, match="line 1: has no key 'messages'; it must be"):
        read_records(_write(tmp_path, PAIR), "chat")


def test_names_the_line_that_is_not_utf8(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are named by line and place."""
    path = _write(tmp_path, PAIR)
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}')

    with pytest.raises(DataError, match=r"file\.jsonl: line 2: byte 13 is not UTF-8; save the file as UTF-8"):
        read_records(path)


def test_an_error_never_quotes_a_record(tmp_path: Path) -> None:
    """What a record says stays out of errors: it may be private."""
    secret = {"messages": [{"role": "hunter2", "content": "hunter2"}]}
    for path in (_write(tmp_path, CHAT, secret), _write(tmp_path, CHAT, {"hunter2": 1})):
        with pytest.raises(DataError) as caught:
            read_records(path)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"], ids=["empty", "blank", "mark"])
def test_a_file_without_records_is_named(tmp_path: Path, text: str) -> None:
    """An empty file is an error that names it."""
    path = tmp_path / "file.jsonl"
    path.write_text(text)

    with pytest.raises(
        DataError, match=r"file\.jsonl: holds no record; one JSON object per line is expected"
    ):
        read_records(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file, or a folder, is an error that names it and why."""
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read as a JSONL file: No such file"):
        read_records(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="cannot be read as a JSONL file: Is a directory"):
        read_records(tmp_path)


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    """Place, spacing, other keys and escapes leave a record's digest; any change of content does not."""
    path = tmp_path / "file.jsonl"
    same = ['{"prompt":"é","completion":"4"}', '{ "completion":"4", "id": 7, "prompt": "\\u00e9"}']
    path.write_text("\n".join([*same, '{"prompt":"é4","completion":"4"}']), encoding="utf-8")
    first, second, other = (record.digest for record in read_records(path))

    assert first == second != other


def test_the_digest_never_changes(tmp_path: Path) -> None:
    """The digest is the same in every version: which records are held out depends on it."""
    records = [read_records(_write(tmp_path, record))[0] for record in (CHAT, PAIR)]

    assert [round(record.fraction, 6) for record in records] == [0.741894, 0.474708]
    assert [record.digest.hex()[:16] for record in records] == ["bdecbd04a291abf2", "798679c1b1915986"]


@given(text=st.binary(max_size=200))
def test_any_bytes_give_records_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    """Whatever a file holds, it is read or refused with its name."""
    path = tmp_path_factory.mktemp("any") / "file.jsonl"
    path.write_bytes(text)

    with pytest.raises(DataError, match=r"file\.jsonl"):
        read_records(path)
