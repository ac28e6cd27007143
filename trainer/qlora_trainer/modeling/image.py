"""The image of a quantized model: its weights in the form that they are multiplied in, in one file that ranks map.

    weights        the numbers of all tensors, one after another, each at a multiple of ALIGNMENT
    meta.json      which tensor is where, and digests of all

The embedding, the head, norms and biases are in their stored dtype, so an image serves every compute dtype.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from qlora_contract.files import read_json
from qlora_trainer.quantization.frozen_weight import FrozenWeight
from qlora_trainer.quantization.parts import Parts, parts_of, weight_of
from qlora_trainer.storage.cache import META

WEIGHTS = "weights"
FORMAT = 1
ALIGNMENT = 64
"""Bytes: what torch aligns its own memory to. Sums may depend on it."""
TENSOR = "tensor"
"""The kind of what is not quantized."""
CHUNK_BYTES = 1 << 24
"""Bytes of a digest, so that threads can share the work."""
SYNC_BYTES = 1 << 28
"""Bytes after which they are made durable, so that neither the page cache nor the end of the work is flooded."""

Kept = Tensor | FrozenWeight
Table = list[dict[str, Any]]
"""Of each weight: name, kind, facts, and of each of its tensors dtype, shape and place in the file."""


class Damaged(ValueError):  # noqa: N818 - what is so, not what to do
    """What is there is not what was written; the message says what is not."""


class ImageWriter:
    """Writes the weights of an image, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.table: Table = []
        self._file = (folder / WEIGHTS).open("wb")
        self._synced = 0

    def add(self, name: str, value: Kept) -> None:
        """Write a weight. Raises OSError."""
        parts = Parts(TENSOR, {}, {TENSOR: value}) if isinstance(value, Tensor) else parts_of(value)
        places = {part: self._write(tensor) for part, tensor in parts.tensors.items()}
        self.table.append({"name": name, "kind": parts.kind, "facts": parts.facts, "tensors": places})
        if self._file.tell() - self._synced > SYNC_BYTES:
            self._sync()

    def _write(self, tensor: Tensor) -> list[Any]:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        place = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), self._file.tell()]
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return place

    def _sync(self) -> None:
        self._file.flush()
        os.fdatasync(self._file.fileno())
        self._synced = self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._sync()
        self._file.close()


def describe(folder: Path, key: str, weights_sha256: str, table: Table, threads: int) -> dict[str, Any]:
    """The meta.json of an image that was written.

    Args:
        folder: where its weights are.
        key: what the image is called, by all that decides about its content.
        weights_sha256: WeightsHash of the model that it was made of.
        table: of ImageWriter.
        threads: that take digests.
    """
    mapped = _map(folder / WEIGHTS)
    meta = {
        "format": FORMAT,
        "key": key,
        "weights_sha256": weights_sha256,
        "table": table,
        "bytes": len(mapped),
        "digests": list(_digests(mapped, threads)),
    }
    return {**meta, "digest": _digest_of(meta)}


class Image:
    """An image that is mapped."""

    def __init__(self, meta: Mapping[str, Any], mapped: mmap.mmap) -> None:
        self.weights_sha256: str = meta["weights_sha256"]
        """WeightsHash of the model that it was made of."""
        self.nbytes = len(mapped)
        self._table: Table = meta["table"]
        self._expected: list[str] = meta["digests"]
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)

    @classmethod
    def open(cls, folder: Path, key: str) -> "Image":
        """Map an image and check its meta.json, but not its weights: see `check`.

        Raises:
            FileNotFoundError: there is none.
            Damaged: it is not what was written, or another one.
        """
        try:
            meta = read_json(folder / META)
            kept = {name: value for name, value in meta.items() if name != "digest"}
            if meta["digest"] != _digest_of(kept) or (meta["format"], meta["key"]) != (FORMAT, key):
                raise Damaged(META)
            mapped = _map(folder / WEIGHTS)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(str(error) if isinstance(error, Damaged) else META) from error
        if len(mapped) != meta["bytes"]:
            raise Damaged(f"{len(mapped)} bytes of {meta['bytes']}")
        return cls(meta, mapped)

    def check(self, threads: int, advance: Callable[[int], None] = lambda _: None) -> None:
        """Read all weights, and compare their digests. They are in the page cache afterwards.

        Args:
            threads: that take digests.
            advance: called after each piece, with 0; it may raise.

        Raises:
            Damaged: a number is not what was written.
        """
        found = []
        for digest in _digests(memoryview(self._bytes.numpy().data), threads):
            advance(0)
            found.append(digest)
        if found != self._expected:
            raise Damaged(WEIGHTS)

    def weights(self) -> Iterator[tuple[str, Kept]]:
        """Every weight by its name in the graph, mapped."""
        for entry in self._table:
            tensors = {part: self._tensor(*place) for part, place in entry["tensors"].items()}
            if entry["kind"] == TENSOR:
                yield entry["name"], tensors[TENSOR]
            else:
                yield entry["name"], weight_of(Parts(entry["kind"], entry["facts"], tensors))

    def _tensor(self, name: str, shape: list[int], offset: int) -> Tensor:
        dtype: torch.dtype = getattr(torch, name)
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._bytes[offset : offset + size].view(dtype).view(shape)


def _map(path: Path) -> mmap.mmap:
    """A file, mapped; torch asks for memory that may be written to, which would be a copy of this process's own."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _digests(mapped: Any, threads: int) -> Iterator[str]:
    """sha256 of each CHUNK_BYTES; hashlib holds no lock meanwhile."""
    view = memoryview(mapped)
    starts = range(0, len(view), CHUNK_BYTES)
    with ThreadPoolExecutor(threads, thread_name_prefix="image-digest") as pool:
        yield from pool.map(
            lambda start: hashlib.sha256(view[start : start + CHUNK_BYTES]).hexdigest(), starts
        )


def _digest_of(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
