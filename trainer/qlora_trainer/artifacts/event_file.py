"""Metrics for TensorBoard: event files, written by hand, since all they hold is numbers with names and steps.

An event file is a sequence of records, each a protobuf message of TensorFlow's `Event` between its length and two
checksums (https://www.tensorflow.org/tutorials/load_data/tfrecord). Each attempt has a file of its own, which
begins with the step from which it goes on: TensorBoard then drops what an earlier attempt had recorded beyond it.
"""

import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TAGS = {
    "loss": "loss/train",
    "eval_loss": "loss/eval",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "tokens_per_second": "tokens_per_second",
    "memory_peak": "memory_peak_bytes",
    "epoch": "epoch",
}
"""Of a line of metrics.jsonl, and `tokens_per_second`, which follows from it -> its name in TensorBoard."""
_POLYNOMIAL = 0x82F63B78
"""CRC-32C (Castagnoli), reflected."""


class EventFile:
    """The event file of one attempt."""

    def __init__(self, folder: Path, attempt: int, start_step: int) -> None:
        """Begin a file that goes on after `start_step`. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self.path = folder / f"events.out.tfevents.{attempt:06d}.{int(time.time())}"
        begin = _record(_event(0, _bytes(3, b"brain.Event:2")))
        if start_step:
            begin += _record(_event(start_step + 1, _bytes(7, _varint_field(1, 1))))  # SessionLog.START
        self.path.write_bytes(begin)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append what a line of metrics.jsonl says. Raises OSError."""
        values = b"".join(_bytes(1, _value(tag, number)) for tag, number in scalars(line))
        if values:
            with self.path.open("ab") as stream:
                stream.write(_record(_event(int(line["step"]), _bytes(5, values))))


def scalars(line: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """(tag, value) of each number in a line of metrics.jsonl that has a tag."""
    seconds, tokens = line.get("seconds"), line.get("tokens")
    speed = {"tokens_per_second": tokens / seconds} if seconds and tokens else {}
    for name, tag in TAGS.items():
        value = {**line, **speed}.get(name)
        if isinstance(value, int | float):
            yield tag, float(value)


def _value(tag: str, number: float) -> bytes:
    """Summary.Value: tag = 1, simple_value = 2."""
    return _bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", number)


def _event(step: int, content: bytes) -> bytes:
    """Event: wall_time = 1, step = 2, and one more field."""
    return b"\x09" + struct.pack("<d", time.time()) + _varint_field(2, step) + content


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint_field(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _record(event: bytes) -> bytes:
    length = struct.pack("<Q", len(event))
    return length + _masked_crc(length) + event + _masked_crc(event)


def _table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _table()


def _masked_crc(content: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
