"""Files of training data that are damaged, or made to harm: read, or refused by one sentence."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from hostile import INPUTS, NESTED, VALUES, attack, damaged_bytes, damaged_json, json_text, nested, survive
from qlora_contract.run_config import Dataset
from qlora_trainer.data.readers import BadRow
from qlora_trainer.data.records import Record
from qlora_trainer.data.sources import find_files, read_split
from qlora_trainer.errors import DataError

pytestmark = pytest.mark.process

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B.", "weight": 1, "reasoning_content": "so"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        {"role": "assistant", "content": [{"type": "text", "text": "C."}]},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}  # fmt: skip
RECORDS: list[dict[str, Any]] = [
    CHAT,
    {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}], "system": "Be brief."},
    {"prompt": "A?", "completion": "B."},
    {"prompt": [{"role": "user", "content": "A?"}], "completion": [{"role": "assistant", "content": "B."}]},
    {"instruction": "A?", "input": "b", "output": "C.", "history": [["D?", "E."]]},
    {"text": "A."},
]  # fmt: skip
TABLE_CHAT = {"messages": [*CHAT["messages"][:2], {"role": "assistant", "content": "B."}]}
FLAT = [{"prompt": f"question {n}", "completion": "answer"} for n in range(8)]


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    """Rows with the same keys as a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet_of(rows: list[dict[str, Any]], **how: Any) -> bytes:
    """Rows as a Parquet file."""
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink, **how)
    return bytes(sink.getvalue())


def arrow_of(rows: list[dict[str, Any]], new: Callable[..., Any]) -> bytes:
    """Rows as an Arrow file, or a stream."""
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def lines_of(rows: list[Any]) -> bytes:
    """Rows as JSONL."""
    return "".join(json_text(row) + "\n" for row in rows).encode()


RIGHT = {
    ".jsonl": [lines_of([record] * 3) for record in RECORDS],
    ".json": [json.dumps([record] * 3).encode() for record in RECORDS]
    + [b"".join(json.dumps(record, indent=1).encode() for record in RECORDS[2:3] * 3)],
    ".csv": [csv_of(FLAT), csv_of([{"text": "A, 'b'"}, {"text": 'C\n"d"'}])],
    ".txt": [b"A.\nB.\n\nC.\n"],
    ".parquet": [parquet_of(FLAT), parquet_of([TABLE_CHAT] * 3), parquet_of(FLAT, compression="zstd")],
    ".arrow": [arrow_of(FLAT, ipc.new_file), arrow_of([TABLE_CHAT] * 3, ipc.new_stream)],
    ".jsonl.gz": [gzip.compress(lines_of(FLAT))],
    ".jsonl.zst": [bytes(pa.compress(lines_of(FLAT), codec="zstd"))],
}
"""By how a file's name ends: files that are right."""


@pytest.fixture
def read(place: Path) -> Callable[[str, bytes], int]:
    """read(suffix, data) -> how many records a file of this content holds."""

    def read(suffix: str, data: bytes) -> int:
        path = place / f"train{suffix}"
        path.write_bytes(data)
        dataset = Dataset(source="pvc://team/d")
        files, _ = find_files(dataset, path)
        rows, _, interpretation = read_split(dataset, files)
        records = 0
        for each in interpretation(rows):  # none is kept
            assert isinstance(each, Record | BadRow)
            records += isinstance(each, Record)
        return records

    return read


@pytest.mark.parametrize("suffix", RIGHT)
def test_what_is_damaged_below_is_right(read: Callable[[str, bytes], int], suffix: str) -> None:
    """Each of the files that are damaged holds records."""
    assert all(read(suffix, data) for data in RIGHT[suffix])


@INPUTS
@pytest.mark.parametrize("suffix", RIGHT)
def test_a_damaged_file_is_read_or_refused(
    read: Callable[[str, bytes], int], suffix: str, inputs: int
) -> None:
    """Whatever happened to a file's bytes, its records are read, or it is refused by a DataError."""
    attack(inputs, damaged_bytes(RIGHT[suffix]), lambda data: read(suffix, data))


@INPUTS
def test_records_of_any_form_are_read_or_refused(read: Callable[[str, bytes], int], inputs: int) -> None:
    """Records whose fields hold anything are read, or refused by their place and why."""
    records = st.one_of([damaged_json(record) for record in RECORDS])
    attack(inputs, st.lists(records, min_size=1, max_size=3), lambda rows: read(".jsonl", lines_of(rows)))


@INPUTS
def test_tables_of_any_columns_are_read_or_refused(read: Callable[[str, bytes], int], inputs: int) -> None:
    """Columns of a table that hold other types than a record has are read, or refused."""
    cells = st.sampled_from(
        [*(v for v in VALUES if not isinstance(v, str) or "\ud800" not in v), b"\xff", pa.scalar(1)]
    )
    names = st.sampled_from(["prompt", "completion", "messages", "text", "x"])
    columns = st.dictionaries(names, cells, min_size=1, max_size=3)

    def table(cells: dict[str, Any]) -> bytes | None:
        try:
            return parquet_of(
                [{name: v.as_py() if isinstance(v, pa.Scalar) else v for name, v in cells.items()}] * 3
            )
        except (pa.ArrowException, OverflowError, ValueError):
            return None  # Parquet has no type for it

    attack(inputs, columns.map(table).filter(bool), lambda data: read(".parquet", data or b""))


DEEP = '{"text": ' + nested() + "}"
LISTS_DEEP = '{"messages": ' + nested() + "}"
BOMB = parquet_of([{"text": "x" * 2**20}] * 900, compression="zstd", row_group_size=1000)
"""0.9 GiB in some kilobytes, in one row group."""


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        pytest.param(".jsonl", DEEP.encode(), id="JSON nested deep"),
        pytest.param(".jsonl", LISTS_DEEP.encode(), id="messages nested deep"),
        pytest.param(".json", b"[" * NESTED, id="arrays nested deep"),
        pytest.param(".json", b'[{"text": ' + b"[" * NESTED, id="a value nested deep, and cut"),
        pytest.param(".json", b'{\n"a":' * NESTED, id="objects nested deep"),
        pytest.param(".jsonl", b'{"text": ' + b"9" * 100_000 + b"}", id="a number of 100,000 digits"),
        pytest.param(".json", b"[" + b'{"a":1},' * 50_000, id="an array without end"),
        pytest.param(".csv", b"a," * 100_000 + b"\n", id="100,000 columns"),
        pytest.param(".csv", b'text\n"' + b"x" * 10_000_000, id="a quote that does not end"),
        pytest.param(".jsonl", b"\x00" * 1_000_000, id="zeros"),
        pytest.param(".jsonl", b"\n" * 1_000_000 + b"x", id="blank lines"),
        pytest.param(".parquet", b"PAR1" + b"\xff" * 8 + b"PAR1", id="a footer of 4 GiB"),
    ],
)
def test_what_was_made_to_harm_is_refused(
    read: Callable[[str, bytes], int], suffix: str, data: bytes
) -> None:
    """Files that would break a simple parser, or fill its memory, are refused, or none of their records is read."""
    error = survive(lambda content: read(suffix, content) and pytest.fail("it holds records"), data)

    assert error is None or isinstance(error, DataError)


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        pytest.param(".parquet", BOMB, id="Parquet"),
        pytest.param(".jsonl.gz", gzip.compress(b'{"text": "' + b"x" * 900_000_000 + b'"}\n', 1), id="gzip"),
        pytest.param(".jsonl.zst", bytes(pa.compress(b"x" * 900_000_000, codec="zstd")), id="Zstandard"),
    ],
)
def test_a_small_file_does_not_become_gigabytes(
    read: Callable[[str, bytes], int], suffix: str, data: bytes
) -> None:
    """A file that unpacks to a thousand times its size needs memory for its rows as they come, or is refused."""
    assert len(data) < 10_000_000

    survive(lambda content: read(suffix, content), data)
