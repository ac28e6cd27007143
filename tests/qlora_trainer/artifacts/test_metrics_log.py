"""metrics.jsonl across steps, restarts and crashes."""

import dataclasses
import errno
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_contract.units import parse_time
from qlora_trainer.artifacts.metrics_log import MetricsLog, StepMetrics, evaluation_line, read_metrics
from qlora_trainer.errors import StorageFull


def written(path: Path, *steps: int, start: int = 0) -> MetricsLog:
    """A log with a line for each of the steps."""
    log = MetricsLog(path, start)
    for step in steps:
        log.write({"step": step, "loss": 1.0 / (step + 1)})
    return log


STEP = StepMetrics(
    step=3, epoch=0.25, loss=2.0, learning_rate=1e-3, grad_norm=0.5, tokens=100, supervised_tokens=40, seconds=1.5,
    memory_peak=2**30,
)  # fmt: skip


def test_a_step_has_the_keys_of_the_release_before() -> None:
    """Scripts that read metrics.jsonl find the same keys in the same order."""
    assert list(STEP.line()) == [
        "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "seconds", "memory_peak",
    ]  # fmt: skip
    assert list(dataclasses.replace(STEP, eval_loss=1.5).line())[-2:] == ["memory_peak", "eval_loss"]
    assert evaluation_line(0, 2.5) == {"step": 0, "eval_loss": 2.5}


def test_an_objective_s_metrics_are_keys_of_their_own() -> None:
    """They stand beside the loss, and the live report passes over them."""
    metrics = dataclasses.replace(STEP, more={"reward_margin": 0.75})

    assert metrics.line()["reward_margin"] == 0.75
    assert "more" not in metrics.line()
    assert metrics.progress() == STEP.progress()


@pytest.mark.parametrize("eval_loss", [None, 1.5])
def test_the_live_report_shows_a_step(eval_loss: float | None) -> None:
    """It takes the fields that it has; the newest evaluation stays until there is another."""
    shown = {"step": 3, "epoch": 0.25, "loss": 2.0, "learning_rate": 1e-3, "memory_peak": 2**30}
    evaluated = {} if eval_loss is None else {"eval_loss": eval_loss}

    assert dataclasses.replace(STEP, eval_loss=eval_loss).progress() == shown | evaluated


def test_each_line_is_json_with_its_step_and_time(tmp_path: Path) -> None:
    """What is written is what other tools read, line by line."""
    before = datetime.now(UTC).replace(microsecond=0)
    written(tmp_path / "m", 0, 1)
    lines = [json.loads(line) for line in (tmp_path / "m").read_text().splitlines()]

    assert [(line["step"], line["loss"]) for line in lines] == [(0, 1.0), (1, 0.5)]
    assert all(before <= parse_time(line["time"]) <= datetime.now(UTC) for line in lines)


def test_a_restart_drops_the_steps_it_will_do_again(tmp_path: Path) -> None:
    """After a restart from step 2 each step has one line."""
    written(tmp_path / "m", 0, 1, 2, 3, 4)
    written(tmp_path / "m", 3, start=2)

    assert [line["step"] for line in read_metrics(tmp_path / "m")] == [0, 1, 2, 3]


def test_a_start_from_nothing_keeps_nothing(tmp_path: Path) -> None:
    """Without a checkpoint all lines come again, the base's evaluation at step 0 included."""
    written(tmp_path / "m", 0, 1)
    written(tmp_path / "m", 0)

    assert [line["step"] for line in read_metrics(tmp_path / "m")] == [0]


def test_a_missing_log_has_no_lines(tmp_path: Path) -> None:
    """A job that has not begun has no metrics yet."""
    assert read_metrics(tmp_path / "m") == []


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param('{"step": 2, "lo', id="cut"),
        pytest.param("\0\0\0\0", id="zeros"),
        pytest.param("[1]\n", id="not-an-object"),
        pytest.param('{"loss": 1}\n', id="no-step"),
    ],
)
def test_a_cut_or_foreign_line_is_dropped(tmp_path: Path, tail: str) -> None:
    """What a crash left is not taken for a line, and the next attempt's lines are whole again."""
    written(tmp_path / "m", 0, 1)
    with (tmp_path / "m").open("a") as stream:
        stream.write(tail)
    written(tmp_path / "m", 2, start=1)

    assert [json.loads(line)["step"] for line in (tmp_path / "m").read_text().splitlines()] == [0, 1, 2]


@settings(deadline=None, max_examples=50)
@given(cut=st.integers(0, 60), start=st.integers(0, 5))
def test_wherever_a_crash_cut_the_log_its_whole_lines_stay(
    tmp_path_factory: pytest.TempPathFactory, cut: int, start: int
) -> None:
    """The log after a restart is the beginning of what was written, up to the step started from."""
    path = tmp_path_factory.mktemp("log") / "m"
    written(path, 1, 2, 3)
    path.write_bytes(path.read_bytes()[:cut])
    whole = [line["step"] for line in read_metrics(path)]
    MetricsLog(path, start)

    assert whole == [1, 2, 3][: len(whole)]
    assert [line["step"] for line in read_metrics(path)] == (
        [s for s in whole if s <= start] if start else []
    )


def test_a_full_disk_has_a_code_of_its_own(tmp_path: Path) -> None:
    """A line that cannot be written ends the rank as a full disk, not as something unexpected."""
    if not Path("/dev/full").is_char_device():
        pytest.skip("/dev/full is not the device that is always full")
    log = written(tmp_path / "m", 0)
    (tmp_path / "m").unlink()
    (tmp_path / "m").symlink_to("/dev/full")

    with pytest.raises(StorageFull, match=f"writing {tmp_path / 'm'}") as raised:
        log.write({"step": 1})
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOSPC
