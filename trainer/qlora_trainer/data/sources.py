"""A dataset's files, the rows in them, and which are held out; without a model, so it needs no torch."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_contract.containers import CONTAINERS
from qlora_contract.files import sha256
from qlora_contract.plan import LengthBin
from qlora_contract.run_config import DatasetSource
from qlora_trainer.data.layout import split_files
from qlora_trainer.data.readers import BadRow, Row, Rows, read_rows
from qlora_trainer.data.records import (
    COLUMN,
    RECORD_KINDS,
    Format,
    Record,
    detect_format,
    interpret,
    renamed,
    unread_label,
)
from qlora_trainer.errors import ConfigurationError, DataError

MAX_DEPTH = 3
"""Folders that a split's files may be below the dataset's."""

Interpret = Callable[[Iterable[Row | BadRow]], Iterator[Record | BadRow]]
"""Rows -> what they mean, or what is wrong with them."""


Files = tuple[list[Path], list[Path]]
"""Of a source: those to train on, and those to evaluate on."""


def find_files(source: DatasetSource, root: Path) -> Files:
    """The files to train on, and those to evaluate on where evalSplit names some."""
    if root.is_dir():
        splits = [source.train_split, *([source.eval_split] if source.eval_split else [])]
        if len(set(splits)) < len(splits):
            raise ConfigurationError(
                f"dataset.evalSplit is the split that is trained on, {splits[0]!r}; name another"
            )
        names, readme = list_folder(root)
        train, *evaluation = (
            [root / name for name in split_files(names, split, str(root), readme)] for split in splits
        )
        return train, evaluation[0] if evaluation else []
    if not root.exists():
        kinds = ", ".join(dict.fromkeys(c.name.removesuffix(" file") for c in CONTAINERS.values()))
        raise DataError(f"{root}: no such file; dataset.source is a file ({kinds}), or a folder of them")
    if not root.is_file():  # to read a pipe or a device would not end
        raise DataError(f"{root}: is neither a file nor a folder; dataset.source is one of them")
    if source.eval_split:
        raise ConfigurationError(
            f"dataset.evalSplit needs a folder of splits, but {root} is a file: give its folder as the "
            "source, or leave evalSplit out and set evalFraction"
        )
    return [root], []


def list_folder(root: Path) -> tuple[list[str], str]:
    """The files of a folder and of those below it, as paths relative to it; and the text of its README.md."""
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        within = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not name.startswith(".") and len(within.parts) < MAX_DEPTH]
        names += [
            (within / name).as_posix()
            for name in files
            if not name.startswith(".") and (Path(folder) / name).is_file()  # no pipe, no link to nothing
        ]
    readme = root / "README.md"
    try:
        return sorted(names), readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    except OSError:
        return sorted(names), ""


@contextmanager
def named(sources: Sequence[DatasetSource], number: int) -> Iterator[None]:
    """Say in an error about the data which of several sources it is about."""
    try:
        yield
    except (DataError, ConfigurationError) as error:
        if len(sources) == 1:
            raise
        raise type(error)(f"dataset.sources[{number}]: {error}") from None


def read_split(source: DatasetSource, files: Sequence[Path]) -> tuple[Rows, str, Interpret]:
    """The rows of a split's files, the format that they are in, and what makes records of them.

    Raises DataError when no format fits the first row, which names it and what would be right.
    """
    rows = chain.from_iterable(map(read_rows, files))
    columns = source.columns.model_dump(exclude_none=True)
    if source.format != "auto":
        return rows, source.format, partial(interpret, format=source.format, columns=columns)
    first: list[Row | BadRow] = []
    detected: Format | None = None
    for row in rows:
        first.append(row)
        if isinstance(row, Row):
            detected = detect_format(renamed(row.fields, columns), row.location)
            break
    return chain(first, rows), detected or "", partial(interpret, columns=columns, detected=detected)


def unread_columns(source: DatasetSource, file: Path) -> list[str]:
    """The columns of a file's first record that its format has no use for. Raises DataError."""
    form, fields = _first_record(source, file)
    return [key for key in RECORD_KINDS[form].unread(fields) if COLUMN.fullmatch(key)]


def unlearned_label(source: DatasetSource, file: Path) -> str:
    """What records.unread_label says of a file's first record. Raises DataError."""
    return unread_label(*_first_record(source, file), source.columns.model_dump(exclude_none=True))


def _first_record(source: DatasetSource, file: Path) -> tuple[Format, dict[str, Any]]:
    """The format of a file's first record, and its fields; a text without any where no record can be read."""
    columns = source.columns.model_dump(exclude_none=True)
    first = next((row for row in read_rows(file) if isinstance(row, Row)), None)
    if first is None:
        return "text", {}
    fields = renamed(first.fields, columns)
    return detect_format(fields, first.location) if source.format == "auto" else source.format, fields


def split_keys(digests: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Record.split_key of each record."""
    return (digests >> np.uint64(11)).astype(np.float64) / 2**53


def dataset_sha256(root: Path, files: Sequence[Path]) -> str:
    """sha256 of one file, or of what `sha256sum` prints for several by their names within the dataset's folder."""
    if len(files) == 1:
        return sha256(files[0])
    listing = "".join(f"{sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def joined_sha256(digests: Sequence[str]) -> str:
    """The one of one source; of several, sha256 over theirs, a line each."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def histogram(lengths: NDArray[np.int64]) -> tuple[LengthBin, ...]:
    """How many lengths are up to each power of two, and above the one before it."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(powers).tolist()
    first = next((power for power, count in enumerate(counts) if count), 0)
    return tuple(LengthBin(up_to=2**power, count=counts[power]) for power in range(first, len(counts)))
