"""Event files, as TensorBoard reads them."""

import struct
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.artifacts.event_file import TAGS, EventFile, _masked_crc, scalars


def line(step: int, **fields: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    known = {"step": step, "loss": 2.5, "learning_rate": 0.1, "grad_norm": 1.5, "tokens": 100, "seconds": 2.0}
    return {**known, "supervised_tokens": 40, "memory_peak": 7, "epoch": 0.5, **fields}


def test_a_line_has_a_scalar_for_each_number_that_has_a_tag() -> None:
    """Speed follows from tokens and seconds; what is not there is left out."""
    assert dict(scalars(line(1, eval_loss=2.0))) == {
        "loss/train": 2.5, "loss/eval": 2.0, "learning_rate": 0.1, "gradient_norm": 1.5, "tokens_per_second": 50.0,
        "memory_peak_bytes": 7.0, "epoch": 0.5,
    }  # fmt: skip
    assert dict(scalars({"step": 0, "loss": None, "eval_loss": 3.0})) == {"loss/eval": 3.0}
    assert dict(scalars({"step": 1, "seconds": 0.0, "tokens": 5})) == {}


@pytest.mark.parametrize(
    ("content", "crc"),
    [
        pytest.param(b"123456789", 0xE3069283, id="the check value of CRC-32C"),
        pytest.param(bytes(32), 0x8A9136AA, id="zeros (RFC 3720)"),
        pytest.param(bytes([255] * 32), 0x62A8AB43, id="ones (RFC 3720)"),
    ],
)
def test_checksums_are_those_of_the_standard(content: bytes, crc: int) -> None:
    """CRC-32C, rotated and shifted as such files have it."""
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    assert struct.unpack("<I", _masked_crc(content)) == (masked,)


def test_records_follow_one_another(tmp_path: Path) -> None:
    """Length, its checksum, the event, its checksum: to the end of the file."""
    events = EventFile(tmp_path, 3, 0)
    events.write(line(300))
    events.write({"step": 301, "loss": None})  # nothing to say
    content, found = events.path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert content[8:12] == _masked_crc(content[:8])
        found.append(content[12 : 12 + length])
        assert content[12 + length : 16 + length] == _masked_crc(found[-1])
        content = content[16 + length :]

    assert len(found) == 2
    assert b"brain.Event:2" in found[0]
    assert all(tag.encode() in found[1] for tag in TAGS.values() if tag != "loss/eval")
    assert b"\x10\xac\x02" in found[1]  # step 300


def test_attempts_come_in_order_and_keep_their_files(tmp_path: Path) -> None:
    """TensorBoard reads by name."""
    paths = [EventFile(tmp_path / "new", attempt, 0).path for attempt in (2, 10, 999_999)]

    assert sorted(paths) == paths
    assert all(path.name.startswith("events.out.tfevents.") for path in paths)


@pytest.mark.process
def test_tensorboard_reads_the_attempts_of_a_job_as_one_curve(tmp_path: Path) -> None:
    """With its own reader: what an attempt had done since the checkpoint from which the next went on is gone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = EventFile(tmp_path, 0, 0)
    first.write({"step": 0, "loss": None, "eval_loss": 9.0})
    for step in range(1, 8):
        first.write(line(step, loss=float(step)))
    with first.path.open("ab") as stream:
        stream.write(b"\x18\x00\x00")  # killed while it wrote
    second = EventFile(tmp_path, 1, 5)
    for step in range(6, 9):
        second.write(line(step, loss=10.0 * step))
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()

    curve = [(each.step, each.value) for each in events.Scalars("loss/train")]
    assert curve == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 60.0), (7, 70.0), (8, 80.0)]
    assert [(each.step, each.value) for each in events.Scalars("loss/eval")] == [(0, 9.0)]
    assert events.Scalars("gradient_norm")[0].value == 1.5
    assert abs(events.Scalars("loss/train")[0].wall_time - second.path.stat().st_mtime) < 60
