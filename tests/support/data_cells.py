"""Containers x formats: the same records written to every container, for tests and for the table of docs/data.md."""

import gzip
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

_TURNS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}, é 🙂.\nSo."}]
    for n in range(3)
]
FORMATS: Mapping[str, tuple[str, Rows]] = {
    "messages": ("chat", [{"messages": turns} for turns in _TURNS]),
    "ShareGPT": (
        "chat",
        [
            {
                "conversations": [
                    {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
                    for turn in turns
                ]
            }
            for turns in _TURNS
        ],
    ),
    "prompt and completion": (
        "prompt-completion",
        [{"prompt": f"{turns[0]['content']} ", "completion": turns[1]["content"]} for turns in _TURNS],
    ),
    "prompt and completion as messages": (
        "prompt-completion",
        [{"prompt": turns[:1], "completion": turns[1:]} for turns in _TURNS],
    ),
    "Alpaca": (
        "alpaca",
        [{"instruction": turns[0]["content"], "output": turns[1]["content"]} for turns in _TURNS],
    ),
    "text": ("text", [{"text": turns[1]["content"]} for turns in _TURNS]),
}
"""What people call a format -> what dataset.format does, and records of it."""

CHATS = ("messages", "ShareGPT", "prompt and completion as messages", "Alpaca")
"""Those that become the same conversations."""
NESTED = ("messages", "ShareGPT", "prompt and completion as messages")
"""Those with lists in a record, which a table of texts has as the text of JSON."""


def _lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _separated(delimiter: str) -> Callable[[Rows], bytes]:
    def write(rows: Rows) -> bytes:
        import csv

        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
        return out.getvalue().encode()

    return write


def _parquet(rows: Rows) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def _arrow(rows: Rows) -> bytes:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    return out.getvalue()


def _zstandard(rows: Rows) -> bytes:
    import pyarrow as pa

    return bytes(pa.compress(_lines(rows), codec="zstd", asbytes=True))


CONTAINERS: Mapping[str, tuple[str, Callable[[Rows], bytes]]] = {
    "JSONL": ("d.jsonl", _lines),
    "JSON array": ("d.json", lambda rows: json.dumps(rows, indent=2).encode()),
    "JSON objects, indented": (
        "d.json",
        lambda rows: "\n".join(json.dumps(r, indent=1) for r in rows).encode(),
    ),
    "compressed by gzip": ("d.jsonl.gz", lambda rows: gzip.compress(_lines(rows))),
    "compressed by Zstandard": ("d.jsonl.zst", _zstandard),
    "CSV": ("d.csv", _separated(",")),
    "TSV": ("d.tsv", _separated("\t")),
    "Parquet": ("d.parquet", _parquet),
    "Arrow": ("d.arrow", _arrow),
    "Hub folder": ("data/train-00000-of-00001.parquet", _parquet),
    "`save_to_disk` folder": ("data-00000-of-00001.arrow", _arrow),
    "plain text": ("d.txt", lambda rows: "\n\n".join(row["text"] for row in rows).encode()),
}
"""What people call a container -> name of the file, and its bytes."""


def cell(container: str, format_: str) -> str:
    """How a container holds a format: `yes`, `as JSON` (lists as the text of JSON), or empty: not at all."""
    if container == "plain text":
        return "yes" if format_ == "text" else ""
    return "as JSON" if container in ("CSV", "TSV") and format_ in NESTED else "yes"


def write(folder: Path, container: str, format_: str) -> Path:
    """The source of a job with the records of a format in a container."""
    name, make = CONTAINERS[container]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make(FORMATS[format_][1]))
    if "folder" not in container:
        return path
    if "save_to_disk" in container:
        for file in ("state.json", "dataset_info.json"):
            (folder / file).write_text("{}")
    return folder
