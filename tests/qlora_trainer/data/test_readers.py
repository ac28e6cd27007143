"""Files of records, whatever the records mean."""

import gzip
import json
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.containers import CONTAINERS
from qlora_trainer.data import readers
from qlora_trainer.data.readers import READERS, BadRow, Row, read_rows
from qlora_trainer.errors import DataError

ROWS = [{"prompt": f"n={i}", "completion": 'é "x",\n\ty'} for i in range(9)]
"""With what a container must quote."""


def read(path: Path) -> list[Row]:
    """All rows of a file; DataError for the first that is bad."""
    rows = []
    for row in read_rows(path):
        if isinstance(row, BadRow):
            raise DataError(str(row))
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", ["data.jsonl", "DATA.JSONL", "data.ndjson", "data.json", "data.v2", "data"])
def test_a_file_without_another_reader_is_read_as_jsonl(tmp_path: Path, name: str) -> None:
    """The suffix chooses the reader; a name that says nothing means JSONL."""
    (tmp_path / name).write_text('{"a": 1}\n')

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


def test_a_bad_line_does_not_end_the_file(tmp_path: Path) -> None:
    """The lines after it are read."""
    (tmp_path / "file.jsonl").write_bytes(b'{}\nnonsense\n{"a": 1}\n\xff\n{}')

    rows = list(read_rows(tmp_path / "file.jsonl"))

    assert [type(row).__name__ for row in rows] == ["Row", "BadRow", "Row", "BadRow", "Row"]


def write_csv(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> None:
    """As a spreadsheet does: every cell quoted, with a byte order mark."""
    cells = [[*rows[0]], *(row.values() for row in rows)]
    quoted = [['"' + str(cell).replace('"', '""') + '"' for cell in row] for row in cells]
    path.write_bytes("".join(separator.join(row) + "\r\n" for row in quoted).encode("utf-8-sig"))


def write_tables(path: Path, rows: list[dict[str, Any]]) -> None:
    """As Parquet, an Arrow file or an Arrow stream, in small pieces."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=4)
        return
    new = pa.ipc.new_file if path.name == "file.arrow" else pa.ipc.new_stream
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def write_json(path: Path, rows: list[dict[str, Any]], indent: int | None = None) -> None:
    """As one array."""
    path.write_text(json.dumps(rows, indent=indent))


def write_objects(path: Path, rows: list[dict[str, Any]]) -> None:
    """Indented, one after the other."""
    path.write_text("\n".join(json.dumps(row, indent=2) for row in rows))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """As JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gzip(path: Path, rows: list[dict[str, Any]]) -> None:
    """As JSONL, compressed."""
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_zstd(path: Path, rows: list[dict[str, Any]]) -> None:
    """As an array, compressed."""
    import pyarrow as pa

    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(json.dumps(rows).encode())


CASES: list[tuple[str, Callable[[Path, list[dict[str, Any]]], None], str]] = [
    ("d.jsonl", write_lines, "line 2"),
    ("d.json", write_lines, "line 2"),
    ("d.json", write_json, "record 2 (line 1)"),
    ("d.json", lambda path, rows: write_json(path, rows, 2), "record 2 (line 6)"),
    ("d.jsonl", write_json, "record 2 (line 1)"),
    ("d.json", write_objects, "record 2 (line 5)"),
    ("d.jsonl.gz", write_gzip, "line 2"),
    ("d.json.zst", write_zstd, "record 2 (line 1)"),
    ("d.csv", write_csv, "row 3"),
    ("d.csv", lambda path, rows: write_csv(path, rows, ";"), "row 3"),
    ("d.tsv", lambda path, rows: write_csv(path, rows, "\t"), "row 3"),
    ("d.parquet", write_tables, "row 2"),
    ("file.arrow", write_tables, "row 2"),
    ("stream.arrow", write_tables, "row 2"),
    ("no-suffix", write_lines, "line 2"),
]
IDS = [
    "jsonl", "jsonl-named-json", "array", "indented-array", "array-named-jsonl", "indented-objects", "gzip", "zstd",
    "csv", "semicolons", "tsv", "parquet", "arrow-file", "arrow-stream", "no-suffix",
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "second"), CASES, ids=IDS)
def test_the_same_rows_come_out_of_every_container(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None], second: str
) -> None:
    """Whatever must be quoted; and the place of each is told as its container has places."""
    write(tmp_path / name, ROWS)

    rows = read(tmp_path / name)

    assert [row.fields for row in rows] == ROWS
    assert rows[1].location == f"{name}: {second}"


def test_every_container_has_a_reader_and_a_test() -> None:
    """What the contract names can be read: the transfer fetches it."""
    assert set(READERS) == set(CONTAINERS)
    assert {f".{name.removesuffix('.gz').removesuffix('.zst').split('.')[-1]}" for name, _, _ in CASES} >= (
        set(CONTAINERS) - {".ndjson", ".txt"}
    )


def test_a_parquet_file_is_known_without_its_suffix(tmp_path: Path) -> None:
    """As a download without a name has it."""
    write_tables(tmp_path / "d.parquet", ROWS)
    (tmp_path / "d.parquet").rename(tmp_path / "d")

    assert [row.fields for row in read(tmp_path / "d")] == ROWS


def test_null_in_a_table_is_absent(tmp_path: Path) -> None:
    """A table has every column in every row, and every key in every object."""
    rows: list[dict[str, Any]] = [{"a": [{"x": "1"}, {"y": "2"}], "b": "3"}, {"a": []}]
    write_tables(tmp_path / "d.parquet", rows)

    assert [row.fields for row in read(tmp_path / "d.parquet")] == rows


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_numbers_of_classes_are_read_as_their_names(tmp_path: Path, suffix: str) -> None:
    """As the datasets library writes a ClassLabel: the names stand in the file's schema."""
    import pyarrow as pa
    from pyarrow import ipc, parquet

    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
    }
    schema = pa.schema(
        [("text", pa.string()), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    table = pa.table({"text": ["a", "b", "c", "d"], "label": [1, 0, -1, 7]}, schema=schema)
    path = tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with ipc.new_stream(path, schema) as stream:
            stream.write_table(table)

    assert [row.fields.get("label") for row in read(path)] == ["yes", "no", None, 7]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"info": 3}', '{"info": {"features": {"label": 3}}}'])
def test_what_is_said_of_classes_may_be_anything(text: str) -> None:
    """A file that others wrote."""
    from qlora_trainer.data.tables import class_names

    assert class_names({b"huggingface": text.encode()}) == {}


def test_a_blank_line_ends_a_document(tmp_path: Path) -> None:
    """A text file holds documents, named by their first line."""
    (tmp_path / "d.txt").write_text("\ufeff\nOne\n two\n\n \nThree", encoding="utf-8")

    assert read(tmp_path / "d.txt") == [
        Row("d.txt: line 2", {"text": "One\n two"}),
        Row("d.txt: line 6", {"text": "Three"}),
    ]


@pytest.mark.parametrize("size", [1, 7, 64], ids=str)
def test_an_array_is_read_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Where a piece ends never matters: within a number, an escape, a character or a name."""
    monkeypatch.setattr(readers, "CHUNK", size)
    rows = [
        {"n": 12345 + i, "t": '\u00e9\U0001f600\\" [1, 2] }', "l": [True, None, -1.5e-3]} for i in range(5)
    ]
    for ascii_only in (True, False):
        (tmp_path / "d.json").write_text(
            json.dumps(rows, ensure_ascii=ascii_only, indent=1), encoding="utf-8"
        )

        assert [row.fields for row in read(tmp_path / "d.json")] == rows


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("d.json", b'[{"a": 1}, {"a": }]', r"d\.json: line 1, column 18: is not JSON \(Expecting value\)"),
        ("d.json", b'[{"a": 1},\n {"a": "x', r"d\.json: line 2, column 8: is not JSON \(Unterminated string"),
        ("d.json", b'[{"a": 1}\n {"a": 2}]', r"d\.json: line 2: the JSON array is not whole: after record 1 a comma"),
        ("d.json", b'[{"a": 1}', r"d\.json: line 1: the JSON array is not whole"),
        ("d.json", b'[{"a": 1}] x', r"d\.json: line 1: something follows the JSON array"),
        ("d.json", b'[{"a": 1},\n "hunter2"]', r"d\.json: record 2 \(line 2\): is not a JSON object"),
        ("d.json", b"[" + b'{"x": ' + b"[" * 200_000 + b"]", r"d\.json: line 1: is JSON that is too large to read"),
        ("d.jsonl", b"PAR1hunter2", r"d\.jsonl: is a Parquet file; let its name end in \.parquet"),
        ("d.jsonl", b"\x1f\x8b\x08", r"d\.jsonl: is compressed with gzip; let its name end in \.gz"),
        ("d.csv", b"PK\x03\x04", r"d\.csv: is a ZIP file; unpack it, and give the file that is in it"),
        ("d.pdf", b"%PDF-1.7\n%\xe2\xe3", r"d\.pdf: is a PDF; extract its text into a \.txt file"),
        ("d.db", b"SQLite format 3\0", r"d\.db: is an SQLite database; export its rows as CSV"),
        ("d.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", r"d\.xls: is an old Excel or Word file"),
        ("d.png", b"\x89PNG\r\n\x1a\n\0\0", r"d\.png: is a PNG image"),
        ("d.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF", r"d\.jpg: is a JPEG image"),
        ("d.gif", b"GIF89a\x01\0\x01\0", r"d\.gif: is a GIF image"),
        ("d.wav", b"RIFF\x24\0\0\0WAVE", r"d\.wav: is an image, sound or video"),
        ("d.rtf", b"{\\rtf1\\ansi}", r"d\.rtf: is a rich text document"),
        ("d.jsonl.bz2", b"BZh91AY&SY\x01", r"d\.jsonl\.bz2: is compressed with bzip2; unpack it"),
        ("d.jsonl.xz", b"\xfd7zXZ\0", r"d\.jsonl\.xz: is compressed with xz; unpack it"),
        ("d.tar", b"d.jsonl".ljust(257, b"\0") + b"ustar\x0000", r"d\.tar: is a tar archive; unpack it"),
        ("d.h5", b"\x89HDF\r\n\x1a\n", r"d\.h5: is an HDF5 file; export its rows"),
        ("d.pkl", b"\x80\x04\x95", r"d\.pkl: is a Python pickle; export its rows"),
        ("d.orc", b"ORC\0\x01", r"d\.orc: is an ORC file; export its rows"),
        ("d.gguf", b"GGUF\x03\0\0\0", r"d\.gguf: is a model in GGUF"),
        ("d.bin", b"a\0b c d e", r"d\.bin: is not text, nor a kind of file that is known here; give one of \.jsonl"),
        ("d.jsonl", b"version https://git-lfs.github.com/spec/v1", r"d\.jsonl: is a pointer of Git LFS"),
        ("d.csv", "a,b".encode("utf-16-le"), r"d\.csv: line 1: byte 1 is not UTF-8, but UTF-16; save"),
        ("d.jsonl", "\ufeff{}".encode("utf-16-le"), r"d\.jsonl: line 1: byte 1 is not UTF-8, but UTF-16; save"),
        ("d.jsonl.gz", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-20], r"d\.jsonl\.gz: is not a whole gzip file"),
        ("d.jsonl.gz", b"{}", r"d\.jsonl\.gz: is not a whole gzip file"),
        ("d.jsonl.zst", b"{}hunter2", r"d\.jsonl\.zst: is not a whole Zstandard file"),
        ("d.parquet", b"PAR1hunter2PAR1", r"d\.parquet: is not a whole Parquet file"),
        ("d.arrow", b"hunter2", r"d\.arrow: is not a whole Arrow file"),
        ("d.csv", b"a,b\nhunter2\n", r"d\.csv: row 2: has 1 cells, but there are 2 columns"),
        ("d.csv", b"hunter2,hunter2\n", r"d\.csv: two columns have the same name"),
        ("d.csv", b'a,b\n1,"hunter2"x\n', r"d\.csv: row 2 \(line 2\): is not CSV"),
        ("d.csv", b"a,b\n1,\xff\n", r"d\.csv: is not UTF-8 \(invalid start byte\); save the file as UTF-8"),
        ("d.json", b'[[{"role": 1}]]', r"d\.json: record 1 \(line 1\): is a list; if it is one of messages, write \{"),
        ("d.md", b"# hunter2", r"d\.md: is not JSON, as which a file with the suffix \.md is read; let its name"),
        ("d.txt", b"\xff", r"d\.txt: is not UTF-8 \(invalid start byte\); save the file as UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_in_any_container(
    tmp_path: Path, name: str, content: bytes, error: str
) -> None:
    """By file and place, with what would be right, and without what it holds."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=f"^{error}") as caught:
        read(tmp_path / name)

    assert "hunter2" not in str(caught.value)


@pytest.mark.process
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.jsonl.gz", "d.txt"])
def test_reading_text_does_not_import_pyarrow(tmp_path: Path, name: str) -> None:
    """It takes long to import, and each rank would."""
    write = {"d.csv": write_csv, "d.json": write_json, "d.jsonl.gz": write_gzip}.get(name, write_lines)
    write(tmp_path / name, ROWS)
    program = (
        "import sys; from pathlib import Path; from qlora_trainer.data.readers import read_rows; "
        f"rows = list(read_rows(Path({str(tmp_path / name)!r}))); assert rows; print('pyarrow' in sys.modules)"
    )

    answer = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)

    assert answer.stdout == "False\n"


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """A file of 20 MB is read with less than 2 MB."""
    write = {"d.csv": write_csv, "d.json": write_json}.get(name, write_lines)
    write(tmp_path / name, [{"prompt": "p" * 1000, "completion": str(i)} for i in range(20_000)])
    assert (tmp_path / name).stat().st_size > 20_000_000

    tracemalloc.start()
    count = sum(1 for _ in read_rows(tmp_path / name))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert count == 20_000
    assert peak < 2_000_000


@given(content=st.binary(max_size=200), suffix=st.sampled_from([*CONTAINERS, ".jsonl.gz", ".jsonl.zst", ""]))
def test_any_bytes_give_rows_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    """Whatever a file holds, it is read or refused with its name."""
    path = tmp_path_factory.mktemp("any") / f"file{suffix}"
    path.write_bytes(content)

    rows: list[Row] = []
    refusal = path.name
    try:
        rows = read(path)
    except DataError as error:
        refusal = str(error)

    assert path.name in refusal
    assert all(row.location.startswith(f"{path.name}: ") for row in rows)


def test_an_error_never_quotes_the_file(tmp_path: Path) -> None:
    """Data may be private: an error says where it is, and not what it is."""
    for line in ('{"hunter2": }', '["hunter2"]', '"hunter2"'):
        (tmp_path / "file.jsonl").write_text(line)
        with pytest.raises(DataError) as caught:
            read(tmp_path / "file.jsonl")
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 16])
@pytest.mark.parametrize("wrong", ['{"a": }', '{"a": 1,, }', "x", '{"a" 1}'])
def test_the_column_is_that_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, wrong: str
) -> None:
    """However many characters are read at once, and wherever in a line a record begins."""
    monkeypatch.setattr(readers, "CHUNK", chunk)
    text = f'[{{"a": 1}}, {{"b": "é"}},\n  {{"c":\n 2}},{{"d": [3]}}, {wrong}, {{"e": "{"f" * 100}"}}]'
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)

    with pytest.raises(
        DataError, match=f"line {expected.value.lineno}, column {expected.value.colno}: is not JSON"
    ):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("inside", "what"),
    [
        (["[Content_Types].xml", "xl/workbook.xml"], "an Excel workbook (.xlsx); save its sheet as CSV"),
        (["word/document.xml"], "a Word document (.docx); extract its text"),
        (["mimetype", "META-INF/container.xml"], "an e-book (EPUB); extract its text"),
        (["content.xml"], "an OpenDocument file; save it as CSV"),
        (["archive/data.pkl"], "a file of torch.save; export its rows"),
        (["train.jsonl"], "a ZIP file; unpack it, and give the file that is in it"),
    ],
)
def test_a_zip_file_is_told_by_what_is_in_it(tmp_path: Path, inside: list[str], what: str) -> None:
    """People do not know that their workbook is one."""
    path = tmp_path / "data.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name in inside:
            archive.writestr(name, "x")

    with pytest.raises(DataError) as caught:
        read(path)
    assert f"data.bin: is {what}" in str(caught.value)


@pytest.mark.parametrize("column", ["ORC", "GGUF", "RIFF", "ID3", "GIF8"])
def test_a_column_may_be_called_as_a_kind_of_file_begins(tmp_path: Path, column: str) -> None:
    """Text is text."""
    path = tmp_path / "d.csv"
    path.write_text(f"{column},b\n1,2\n")

    assert read(path)[0].fields == {column: "1", "b": "2"}
