"""What pyarrow reads: Parquet and Arrow files, and Zstandard. Imported where such a file is read, and nowhere else."""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc, parquet

from qlora_trainer.errors import DataError


def parquet_batches(path: Path, rows: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of a Parquet file, so many at once. Raises DataError."""
    with _translated(path, "Parquet"), parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=rows, use_threads=False):
            yield as_json(batch)


def arrow_batches(path: Path, rows: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of an Arrow file, or of a stream as the datasets library saves it. Raises DataError."""
    with _translated(path, "Arrow"), pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = ipc.open_file(source) if is_file else ipc.open_stream(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
        for batch in batches:
            batch.validate(full=True)  # offsets that lead out of the file would end the process
            for start in range(0, batch.num_rows, rows):
                yield as_json(batch.slice(start, rows))


def as_json(batch: Any) -> list[dict[str, Any]]:
    """Rows without the fields that are null: a table has every column, and every key, in every row."""
    rows = [_without_null(row) for row in batch.to_pylist()]
    for column, names in class_names(batch.schema.metadata or {}).items():
        for row in rows:
            number = row.get(column)
            if number == -1:  # it has none
                del row[column]
            elif isinstance(number, int) and 0 <= number < len(names):
                row[column] = names[number]
    return rows


def class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """What the numbers in columns stand for, where the datasets library has written it beside them (ClassLabel)."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: list(feature["names"])
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value


@contextmanager
def zstd_stream(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file that Zstandard has compressed. Raises DataError."""
    with _translated(path, "Zstandard"), pa.input_stream(str(path), compression="zstd") as source:
        yield io.BufferedReader(source)


@contextmanager
def _translated(path: Path, what: str) -> Iterator[None]:
    """pyarrow's errors as ours. They may quote data: only their kind is told."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: cannot be read as a {what} file: {error.strerror}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path.name}: is not a whole {what} file ({type(error).__name__}); copy or write it again"
        ) from None
