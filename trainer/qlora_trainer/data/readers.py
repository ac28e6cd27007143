"""Files of records by their container: where each record came from, and its fields. What they mean is records.py's.

Every reader streams: it holds a record, or a batch of them, and never the file. A record may be private: errors name
where it is, and never quote it.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qlora_contract.containers import CONTAINERS, Container, split_name
from qlora_trainer.errors import DataError

CHUNK = 1 << 16
"""Characters of a JSON array that are read at once."""
JSON_BEGINS = re.compile(rb"(\xef\xbb\xbf)?\s*([{\[]|$)")
WHITE_SPACE = re.compile(r"\s*")
MAX_RECORD = 1 << 25
"""Bytes of the longest line, or characters of the longest record: millions of tokens, of which no sample has as many.
A file that was made to fill the memory is refused by it, and so is one whose line ends are not what they should be."""
TOO_LONG = f"is longer than {MAX_RECORD >> 20} MiB; one record a line is expected, and no sample is as long"
BATCH_ROWS = 16
"""Rows of a Parquet or Arrow file that are read at once: few, as each may be long."""
MAGIC = {
    b"PAR1": ("a Parquet file", ".parquet"),
    b"ARROW1": ("an Arrow file", ".arrow"),
    b"\x1f\x8b": ("compressed with gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", ".zst"),
}
"""How files begin that readers read -> what they are, and the suffix by which they would be read."""
AS_ROWS = "export its rows as CSV, or as JSONL"
UNPACK = "unpack it, and give the file that is in it"
AS_TEXT = "extract its text into a .txt file, or records into JSONL"
FOREIGN: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "fetch it with `git lfs pull`"),
    b"%PDF-": ("a PDF", AS_TEXT),
    b"{\\rtf": ("a rich text document", AS_TEXT),
    b"SQLite format 3\0": ("an SQLite database", AS_ROWS),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Excel or Word file", AS_ROWS),
    b"PK\x05\x06": ("an empty ZIP file", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", UNPACK),
    b"Rar!\x1a\x07": ("a RAR archive", UNPACK),
    **{b"BZh%d1AY&SY" % level: ("compressed with bzip2", UNPACK) for level in range(1, 10)},
    b"\xfd7zXZ\0": ("compressed with xz", UNPACK),
    b"\x04\x22\x4d\x18": ("compressed with LZ4", UNPACK),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", AS_ROWS),
    b"\x93NUMPY": ("a NumPy array", AS_ROWS),
    b"ORC": ("an ORC file", AS_ROWS),
    b"Obj\x01": ("an Avro file", AS_ROWS),
    b"\x80\x02": ("a Python pickle", AS_ROWS),
    b"\x80\x03": ("a Python pickle", AS_ROWS),
    b"\x80\x04": ("a Python pickle", AS_ROWS),
    b"\x80\x05": ("a Python pickle", AS_ROWS),
    b"GGUF": ("a model in GGUF", "give data here, and the model as model.source"),
    b"\x89PNG\r\n": ("a PNG image", AS_TEXT),
    b"\xff\xd8\xff": ("a JPEG image", AS_TEXT),
    b"GIF8": ("a GIF image", AS_TEXT),
    b"RIFF": ("an image, sound or video (RIFF)", AS_TEXT),
    b"ID3": ("an MP3 sound", AS_TEXT),
    b"\x7fELF": ("a program", "give data"),
}
"""How other files begin that are taken for data -> what they are, and what to do."""
TAR_MAGIC_AT = 257
ZIP = b"PK\x03\x04"
ZIP_CONTENTS = {
    "xl/": ("an Excel workbook (.xlsx)", "save its sheet as CSV (UTF-8)"),
    "word/": ("a Word document (.docx)", AS_TEXT),
    "ppt/": ("a PowerPoint presentation (.pptx)", AS_TEXT),
    "content.xml": ("an OpenDocument file", "save it as CSV, or its text as .txt"),
    "META-INF/container.xml": ("an e-book (EPUB)", AS_TEXT),
    "data.pkl": ("a file of torch.save", AS_ROWS),
}
"""What a ZIP file holds -> what it is, and what to do."""
BEGINNING = 512
"""Bytes by which a file is told from text."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record, not interpreted yet."""

    location: str
    """`file.jsonl: line 17`, for errors."""
    fields: dict[str, Any]
    """Values are as JSON has them: str, int, float, bool, None, list, dict."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A record that cannot be read; those after it can."""

    location: str
    """As a Row's."""
    reason: str
    """What is wrong with it, and what would be right. Never quotes it."""

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


Rows = Iterator[Row | BadRow]
Bytes = io.BufferedReader | gzip.GzipFile
"""A file's bytes, without its compression."""


def read_rows(path: Path) -> Rows:
    """The records of a file, in its order.

    A name without a known suffix is read as JSON, or by how the file begins.

    Raises DataError, with the location, when no further record can be read.
    """
    _, suffix, compression = split_name(path.name) or ("", "", "")
    container = container_of(path)
    try:
        with path.open("rb") as file:
            start = file.read(BEGINNING)
        if not suffix and start.startswith((b"PAR1", b"ARROW1")):
            suffix = ".parquet" if start.startswith(b"PAR1") else ".arrow"
        read = READERS.get(suffix, json_rows)
        if suffix in TABLE_FORMATS:
            yield from read(path, path.name)
            return
        if not compression:
            _refuse_other_content(start, path)
        if not suffix and path.suffix and not JSON_BEGINS.match(start):
            raise DataError(
                f"{path.name}: is not JSON, as which a file with the suffix {path.suffix} is read; let its name end in "
                f"one of {', '.join(CONTAINERS)}"
            )
        with _opened(path, compression) as stream:
            yield from read(stream, path.name)
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path.name}: is not a whole gzip file; compress or copy it again") from None
    except OSError as error:
        why = error.strerror or "it is damaged"
        raise DataError(f"{path}: cannot be read as a {container.name}: {why}") from error


def container_of(path: Path) -> Container:
    """What a file is by its name; JSONL if that says nothing."""
    parts = split_name(path.name)
    return CONTAINERS[parts[1] if parts else ".jsonl"]


def _refuse_other_content(start: bytes, path: Path) -> None:
    """Raises DataError when a file that should be text begins as something else does."""
    name = path.name
    for magic, (what, suffix) in MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"{name}: is {what}; let its name end in {suffix}")
    if start.startswith(ZIP):
        what, remedy = _what_a_zip_is(path)
        raise DataError(f"{name}: is {what}; {remedy}")
    for magic, (what, remedy) in FOREIGN.items():
        # A table's first column may be called ORC.
        if start.startswith(magic) and (b"\0" in start or not magic.isalnum()):
            raise DataError(f"{name}: is {what}; {remedy}")
    if start[TAR_MAGIC_AT:].startswith(b"ustar"):
        raise DataError(f"{name}: is a tar archive; {UNPACK}")
    zeros = start.count(b"\0")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 2 * zeros >= len(start) > 1:
        raise DataError(f"{name}: line 1: byte 1 is not UTF-8, but UTF-16; save the file as UTF-8")
    if zeros and not start.lstrip().startswith((b"{", b"[")):  # else it may be one bad record
        kinds = ", ".join(CONTAINERS)
        raise DataError(f"{name}: is not text, nor a kind of file that is known here; give one of {kinds}")


def _what_a_zip_is(path: Path) -> tuple[str, str]:
    """(what it is, what to do)."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        inside = []
    for mark, found in ZIP_CONTENTS.items():
        if any(name.startswith(mark) or name.endswith(f"/{mark}") for name in inside):
            return found
    return "a ZIP file", UNPACK


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[Bytes]:
    """The bytes of a file, without its compression."""
    if compression == ".zst":
        from qlora_trainer.data.tables import zstd_stream

        with zstd_stream(path) as stream:
            yield stream
    elif compression == ".gz":
        with gzip.open(path, "rb") as zipped:
            yield zipped
    else:
        with path.open("rb") as plain:
            yield plain


def content_of(path: Path) -> str:
    """What is in a file, such as `a JSON array, compressed`: for people, who may have lost track."""
    _, _, compression = split_name(path.name) or ("", "", "")
    what = container_of(path).name
    if what.startswith("JSON") and path.is_file():
        with _opened(path, compression) as stream:
            what = JSON_CONTENTS[_json_reader(stream)]
    article = "" if what.endswith("s") else "an " if what.startswith("Arrow") else "a "
    return f"{article}{what}{', compressed' if compression else ''}"


def json_rows(stream: Bytes, name: str) -> Rows:
    """Objects: one a line, in one array, or over several lines each. Blank lines, a BOM and CRLF are fine."""
    return _json_reader(stream)(stream, name)


def _json_reader(stream: Bytes) -> Callable[[Bytes, str], Rows]:
    start = bytes(stream.peek(CHUNK)).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        return _array_rows
    if start.split(b"\n", 1)[0].strip() == b"{":  # indented
        return _object_rows
    return _line_rows


def _line_rows(stream: Bytes, name: str) -> Rows:
    """The objects of lines."""
    for number, line in enumerate(iter(lambda: stream.readline(MAX_RECORD), b""), start=1):
        location = f"{name}: line {number}"
        if len(line) == MAX_RECORD and not line.endswith(b"\n"):
            raise DataError(f"{location}: {TOO_LONG}")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield Row(location, json_object(text))
        except UnicodeDecodeError as error:
            yield BadRow(location, f"byte {error.start + 1} is not UTF-8; save the file as UTF-8")
        except DataError as error:
            yield BadRow(location, str(error))


def json_object(text: str) -> dict[str, Any]:
    """The object that a line holds. Raises DataError."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"is not JSON ({error.msg} at column {error.colno}); one whole object per line is expected"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or nesting as deep
        raise DataError("is JSON that is too large to read: a number or its nesting") from None
    if not isinstance(value, dict):
        raise DataError("is not a JSON object; one object per line is expected")
    return value


class _JsonText:
    """A stream of JSON values, read as far as is needed."""

    def __init__(self, stream: Bytes, name: str) -> None:
        self._stream, self._name, self.line = stream, name, 1
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self._whole = "", 0, False
        self._cut, self._cut_line = 0, 1
        """Characters of the line that the text begins in which are not in it any more, and which line that is."""
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            space = WHITE_SPACE.match(self._text, self._at)
            assert space is not None
            self._skip(space.end())
            if self._at < len(self._text) or self._whole:
                return self._text[self._at : self._at + 1]
            self._more(CHUNK)

    def take(self) -> None:
        """Pass over the character that was peeked at."""
        self._skip(self._at + 1)

    def value(self) -> Any:
        """The value that begins here. Raises DataError."""
        size = CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._whole:
                    self._skip(end)
                    return value
            except json.JSONDecodeError as error:
                # What breaks off is reported where it begins, or within a literal or escape of the end.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - len(
                    r"\u0000\u0000"
                )
                if self._whole or not cut:
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    column = error.pos - self._text.rfind("\n", 0, error.pos)
                    where = f"line {line}, column {column + self._cut * (line == self._cut_line)}"
                    raise DataError(f"{self._name}: {where}: is not JSON ({error.msg})") from None
            except (ValueError, RecursionError):
                raise DataError(
                    f"{self._name}: line {self.line}: is JSON that is too large to read: a number or its nesting"
                ) from None
            if len(self._text) - self._at > MAX_RECORD:
                raise DataError(f"{self._name}: line {self.line}: a record {TOO_LONG}")
            self._more(size)
            size *= 2

    def _skip(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _more(self, size: int) -> None:
        data = self._stream.read(size)
        self._whole = not data
        line_begins = self._text.rfind("\n", 0, self._at) + 1
        self._cut = self._at - line_begins + (self._cut if not line_begins else 0)
        self._cut_line = self.line
        self._text, self._at = self._text[self._at :] + self._decode(data, not data), 0


def _array_rows(stream: Bytes, name: str) -> Rows:
    """The objects of an array."""
    text = _JsonText(stream, name)
    text.peek()
    text.take()
    number = 0
    while text.peek() not in ("]", ""):
        if number:
            if text.peek() != ",":
                break
            text.take()
            text.peek()
        number += 1
        location = f"{name}: record {number} (line {text.line})"
        yield _row(text.value(), location, "an array of objects is expected")
    if text.peek() != "]":
        raise DataError(
            f"{name}: line {text.line}: the JSON array is not whole: after record {number} a comma and another record, "
            "or the closing bracket, is expected"
        )
    text.take()
    if text.peek():
        raise DataError(f"{name}: line {text.line}: something follows the JSON array; one array is expected")


def _object_rows(stream: Bytes, name: str) -> Rows:
    """Objects over several lines each, one after the other."""
    text = _JsonText(stream, name)
    number = 0
    while text.peek():
        number += 1
        location = f"{name}: record {number} (line {text.line})"
        yield _row(text.value(), location, "objects are expected")


def _row(value: Any, location: str, expected: str) -> Row | BadRow:
    """A value of a JSON text as a record, if it is an object."""
    if isinstance(value, dict):
        return Row(location, value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return BadRow(location, 'is a list; if it is one of messages, write {"messages": [...]} in its place')
    return BadRow(location, f"is not a JSON object; {expected}")


JSON_CONTENTS: dict[Callable[[Bytes, str], Rows], str] = {
    _line_rows: "JSONL file",
    _array_rows: "JSON array",
    _object_rows: "JSON file with one object after the other",
}
"""What a file is by how it is read."""


def csv_rows(stream: Bytes, name: str) -> Rows:
    """Rows under a line of column names, separated by commas, semicolons or tabs. Rows are numbered as in a table."""
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        lines = _text_lines(text, name)
        head = next(lines, "")
        csv.field_size_limit(MAX_RECORD)
        reader = csv.reader(chain([head], lines), delimiter=max(",;\t", key=head.count), strict=True)
        number = 1
        try:
            columns = [cell.strip() for cell in next(reader, [])]
            if len(set(columns)) < len(columns):
                raise DataError(
                    f"{name}: two columns have the same name; the first line must name each column"
                )
            for number, cells in enumerate(reader, start=2):
                location = f"{name}: row {number}"
                if len(cells) == len(columns):
                    yield Row(location, dict(zip(columns, cells, strict=True)))
                elif cells:
                    yield BadRow(location, f"has {len(cells)} cells, but there are {len(columns)} columns")
        except csv.Error as error:
            raise DataError(
                f"{name}: row {number + 1} (line {reader.line_num}): is not CSV: {error}"
            ) from None


def text_rows(stream: Bytes, name: str) -> Rows:
    """Documents as `text`: a blank line ends one."""
    lines: list[str] = []
    start, length = 0, 0
    with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        for number, line in enumerate(chain(_text_lines(text, name), [""]), start=1):
            length += len(line)
            if line.strip():
                start = start if lines else number
                lines.append(line)
                if length > MAX_RECORD:
                    raise DataError(
                        f"{name}: line {start}: the document is longer than {MAX_RECORD >> 20} MiB; "
                        "a blank line ends one"
                    )
            else:
                if lines:
                    yield Row(f"{name}: line {start}", {"text": "".join(lines).rstrip()})
                lines, length = [], 0


def _text_lines(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    """The lines of a text. Raises DataError for one without end."""
    for number, line in enumerate(iter(lambda: text.readline(MAX_RECORD), ""), start=1):
        if len(line) == MAX_RECORD and not line.endswith("\n"):
            raise DataError(f"{name}: line {number}: {TOO_LONG}")
        yield line


def parquet_rows(path: Path, name: str) -> Rows:
    """Rows of a Parquet file."""
    from qlora_trainer.data.tables import parquet_batches

    return _numbered(parquet_batches(path, BATCH_ROWS), name)


def arrow_rows(path: Path, name: str) -> Rows:
    """Rows of an Arrow file or stream, as the datasets library saves them."""
    from qlora_trainer.data.tables import arrow_batches

    return _numbered(arrow_batches(path, BATCH_ROWS), name)


def _numbered(batches: Iterator[list[dict[str, Any]]], name: str) -> Rows:
    for number, fields in enumerate(chain.from_iterable(batches), start=1):
        yield Row(f"{name}: row {number}", fields)


TABLE_FORMATS = (".parquet", ".arrow")
"""Read from a path, not from a stream, by pyarrow: nothing else imports it."""

READERS: dict[str, Callable[[Any, str], Rows]] = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".txt": text_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
"""By the suffixes of qlora_contract.containers: (stream of bytes, or path, and the file's name) -> rows."""
