"""Tokenized samples, end to end in flat arrays: in memory, or in files that all ranks of a machine map."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

COUNTED_SAMPLES = 4096
"""Samples whose supervised tokens are counted at once: numpy widens what it adds up, eightfold."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Tokenized samples, end to end."""

    ids: NDArray[np.int32]
    """(tokens of all samples,)"""
    mask: NDArray[np.uint8]
    """As ids: 1 where token t is supervised, predicted from those before it; never a sample's first token."""
    offsets: NDArray[np.int64]
    """(samples + 1,): sample i is ids[offsets[i]:offsets[i + 1]]."""
    group_offsets: NDArray[np.int64] | None = None
    """(groups + 1,): group g is samples group_offsets[g] to group_offsets[g + 1], at least one. Packing
    keeps them in one bin, and so in one micro-batch of one rank (a preferred answer and the other one, say). None: each
    sample stands by itself."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> NDArray[np.int64]:
        """(samples,): tokens of each sample."""
        return np.diff(self.offsets)

    def supervised_counts(self) -> NDArray[np.int64]:
        """(samples,): supervised tokens of each sample; at least one."""
        counts = [np.zeros(0, np.int64)]
        for start in range(0, len(self), COUNTED_SAMPLES):
            offsets = self.offsets[start : start + COUNTED_SAMPLES + 1]
            mask = self.mask[offsets[0] : offsets[-1]]
            counts.append(np.add.reduceat(mask, offsets[:-1] - offsets[0], dtype=np.int64))
        return np.concatenate(counts)

    def sample(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Ids and mask of sample i, as views."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span], self.mask[span]

    def digest(self) -> str:
        """sha256 of everything here: equal on two ranks exactly if they train on the same tokens."""
        hashed = hashlib.sha256()
        for array in (self.ids, self.mask, self.offsets, self.group_offsets):
            if array is not None:
                hashed.update(np.ascontiguousarray(array).data)
        return hashed.hexdigest()


ARRAYS: dict[str, np.dtype[Any]] = {
    "ids": np.dtype(np.int32),
    "mask": np.dtype(np.uint8),
    "offsets": np.dtype(np.int64),
}
"""What samples are stored as: little-endian on every machine that this runs on."""


class SampleWriter:
    """Takes samples as they come, in files or in memory, and gives them back in one piece.

    With a folder nothing of them stays in memory. What writing to it raises is the system's own OSError.
    """

    def __init__(self, folder: Path | None) -> None:
        """Write to the files ARRAYS of a new folder; None: keep them in memory."""
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True)
        self._streams: dict[str, BinaryIO] = {
            name: io.BytesIO() if folder is None else (folder / name).open("w+b") for name in ARRAYS
        }
        self._end = 0
        self._write("offsets", np.zeros(1, np.int64))

    def add(self, ids: NDArray[np.int32], mask: NDArray[np.uint8], lengths: NDArray[np.int64]) -> None:
        """Add samples end to end. `lengths`: tokens of each."""
        self._write("ids", ids)
        self._write("mask", mask)
        self._write("offsets", self._end + np.cumsum(lengths, dtype=np.int64))
        self._end += int(lengths.sum())

    def finish(self) -> Samples:
        """All samples; none can be added any more."""
        arrays: dict[str, Any] = {}
        for name, dtype in ARRAYS.items():
            stream = self._streams[name]
            if isinstance(stream, io.BytesIO):
                arrays[name] = np.frombuffer(stream.getbuffer(), dtype)
            else:
                stream.close()
        return Samples(**arrays) if self._folder is None else mapped(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            for stream in self._streams.values():
                stream.close()

    def _write(self, name: str, array: NDArray[Any]) -> None:
        self._streams[name].write(np.ascontiguousarray(array, ARRAYS[name]).data)


def mapped(folder: Path) -> Samples:
    """The samples in a folder that a SampleWriter has filled: mapped, so that all processes share their memory.

    Raises OSError or ValueError when the files are missing, or are not such arrays.
    """
    arrays: dict[str, Any] = {
        name: np.memmap(folder / name, dtype, mode="r").view(np.ndarray)
        if (folder / name).stat().st_size
        else np.zeros(0, dtype)
        for name, dtype in ARRAYS.items()
    }
    samples = Samples(**arrays)
    whole = len(samples.ids) == len(samples.mask)
    if not whole or not len(samples.offsets) or int(samples.offsets[-1]) != len(samples.ids):
        raise ValueError(f"{folder}: the arrays do not belong together")
    return samples
