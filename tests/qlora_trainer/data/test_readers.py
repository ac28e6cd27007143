"""Files of records, whatever the records mean."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.readers import READERS, Row, reader_for
from qlora_trainer.errors import DataError


def read(path: Path) -> list[Row]:
    """All rows of a file."""
    return list(reader_for(path).rows(path))


@pytest.mark.parametrize("name", ["data.jsonl", "DATA.JSONL", "data.json", "data"])
def test_a_file_without_another_reader_is_read_as_jsonl(tmp_path: Path, name: str) -> None:
    """The suffix chooses the reader; a name that says nothing means JSONL."""
    (tmp_path / name).write_text('{"a": 1}\n')

    assert reader_for(tmp_path / name) is READERS[".jsonl"]
    assert read(tmp_path / name) == [Row(f"{name}: line 1", {"a": 1})]


def test_reads_what_editors_leave_behind(tmp_path: Path) -> None:
    """A byte order mark, CRLF, blank lines and a missing last newline do no harm; lines are counted as editors do."""
    path = tmp_path / "file.jsonl"
    line = json.dumps({"id": float("nan"), "notes": "a\u2028b"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)

    rows = read(path)

    assert [row.location for row in rows] == ["file.jsonl: line 1", "file.jsonl: line 4"]
    assert [row.fields["notes"] for row in rows] == ["a\u2028b"] * 2


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"], ids=["empty", "blank", "mark"])
def test_a_file_without_records_has_no_rows(tmp_path: Path, text: str) -> None:
    """Nothing is made of nothing."""
    (tmp_path / "file.jsonl").write_text(text)

    assert read(tmp_path / "file.jsonl") == []


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", r"is not JSON \(Expecting property name .* at column 2\); one whole object per line"),
        ("[1]", "is not a JSON object; one object per line"),
        ('{"messages": ' + "[" * 200_000 + "}", "is JSON that is too large to read"),
        ('{"x": ' + "1" * 5000 + "}", "is JSON that is too large to read"),
    ],
    ids=["json", "no-object", "deep", "long-number"],
)
def test_names_the_line_that_is_not_an_object(tmp_path: Path, line: str, error: str) -> None:
    """A line that holds no JSON object is named, with what would be right."""
    (tmp_path / "file.jsonl").write_text(f"{{}}\n{line}\n")

    with pytest.raises(DataError, match=rf"^file\.jsonl: line 2: {error}"):
        read(tmp_path / "file.jsonl")


def test_names_the_line_that_is_not_utf8(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are named by line and place."""
    (tmp_path / "file.jsonl").write_bytes(b'{}\n{"prompt": "\xff"}')

    with pytest.raises(DataError, match=r"file\.jsonl: line 2: byte 13 is not UTF-8; save the file as UTF-8"):
        read(tmp_path / "file.jsonl")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file, or a folder, is an error that names it and why."""
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read as a JSONL file: No such file"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="cannot be read as a JSONL file: Is a directory"):
        read(tmp_path)


@given(content=st.binary(max_size=200))
def test_any_bytes_give_rows_or_an_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Whatever a file holds, it is read or refused with its name."""
    path = tmp_path_factory.mktemp("any") / "file.jsonl"
    path.write_bytes(content)

    rows: list[Row] = []
    refusal = "file.jsonl"
    try:
        rows = read(path)
    except DataError as error:
        refusal = str(error)

    assert "file.jsonl" in refusal
    assert all(row.location.startswith("file.jsonl: line ") for row in rows)


def test_an_error_never_quotes_the_file(tmp_path: Path) -> None:
    """Data may be private: an error says where it is, and not what it is."""
    for line in ('{"hunter2": }', '["hunter2"]', '"hunter2"'):
        (tmp_path / "file.jsonl").write_text(line)
        with pytest.raises(DataError) as caught:
            read(tmp_path / "file.jsonl")
        assert "hunter2" not in str(caught.value)
