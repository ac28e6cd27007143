"""The files that hold a dataset's records: what readers read and transfers fetch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Container:
    """A kind of file with records."""

    name: str
    """What it is called."""
    expects: str
    """What such a file holds, for the error about an empty one."""
    compressible: bool
    """Whether it may be compressed as a whole. Parquet and Arrow compress inside."""


_JSON = "one JSON object per line, or an array of them, is expected"
_TABLE = "a line of column names and a row per record are expected"
_ROWS = "a row per record is expected"

CONTAINERS: Mapping[str, Container] = {
    ".jsonl": Container("JSONL file", _JSON, compressible=True),
    ".ndjson": Container("JSONL file", _JSON, compressible=True),
    ".json": Container("JSON file", _JSON, compressible=True),
    ".csv": Container("CSV file", _TABLE, compressible=True),
    ".tsv": Container("TSV file", _TABLE, compressible=True),
    ".txt": Container(
        "text file", "documents with a blank line between them are expected", compressible=True
    ),
    ".parquet": Container("Parquet file", _ROWS, compressible=False),
    ".arrow": Container("Arrow file", _ROWS, compressible=False),
}
"""By the suffix of a file's name."""

COMPRESSIONS = (".gz", ".zst")
"""What may follow the suffix of a container that is compressible."""

METADATA = ("README.md", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files beside the records that say how they are laid out, or describe them. They hold none."""

CACHE_PREFIX = "cache-"
"""What the datasets library calls the Arrow files of intermediate results, beside those of a saved dataset."""


def split_name(name: str) -> tuple[str, str, str] | None:
    """A file's path, or name, in three: what precedes its container's suffix, that, and the compression's.

    Suffixes are in lower case; the last is empty without compression. None: no file with records has such a name.
    """
    file = PurePosixPath(name).name
    stem, compression = name, ""
    for suffix in COMPRESSIONS:
        if name.lower().endswith(suffix):
            stem, compression = name[: -len(suffix)], suffix
    suffix = PurePosixPath(stem).suffix.lower()
    container = CONTAINERS.get(suffix)
    if container is None or (compression and not container.compressible):
        return None
    if file in METADATA or (suffix == ".arrow" and file.startswith(CACHE_PREFIX)):
        return None
    return stem[: -len(suffix)], suffix, compression
