"""Whatever ends an attempt, the next one goes on from its newest checkpoint."""

import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_contract.exit_codes import ExitCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EVERY = 5
"""Steps between two checkpoints."""


def resumed_after(log: str) -> int:
    """The step that an attempt went on from; 0 when it started anew."""
    found = re.search(r"resumed after step (\d+)", log)
    return int(found.group(1)) if found else 0


def steps_of(job: Any) -> list[int]:
    """The steps in metrics.jsonl, in its order."""
    return [line["step"] for line in job.steps()]


def test_killed_job_goes_on_as_if_nothing_had_been(
    backend: str, make_job: Callable[..., Any], two: Any, assert_same_bits: Callable[..., None]
) -> None:
    """After kill -9 of a rank and of the launcher at random steps, the job ends with the undisturbed one's bits."""
    job = make_job(distributed={"backend": backend})
    at = sorted(random.Random(24).sample(range(2, 22), 2))

    with job.start(2, pods=2) as attempt:
        attempt.until_step(at[0])
        attempt.ranks()[1].kill()
        first, second = attempt.wait()
    assert first.code == ExitCode.LOST_PEER, first.log
    assert re.search(r"rank 1 on host \S+ died", first.report.cause)
    assert second.code == 128 + signal.SIGKILL
    lost_at = [steps_of(job)[-1]]

    with job.start(2) as attempt:
        attempt.until_step(max(at[1], lost_at[0] + 1))
        ranks = list(attempt.ranks().values())
        attempt.launchers[0].kill()
        _, living = psutil.wait_procs(ranks, timeout=30)
        assert len(ranks) == 2
        assert not living, "the ranks die with their launcher"
        logs = [attempt.wait_for_pod(0).log]
    lost_at.append(steps_of(job)[-1])

    end = job.run(2)

    assert end.code == 0, end.log
    logs.append(end.log)
    assert_same_bits(job, two)
    assert end.report.not_bit_exact is None
    for log, step in zip(logs, lost_at, strict=True):
        assert resumed_after(log) >= step - EVERY, "at most one interval was lost"
        assert resumed_after(log) % EVERY == 0
    assert job.leftovers() == []


def test_sigterm_stops_all_ranks_at_one_step(
    make_job: Callable[..., Any], two: Any, assert_same_bits: Callable[..., None]
) -> None:
    """SIGTERM to one pod ends both after the same step with a checkpoint, and nothing of the job is lost."""
    job = make_job()

    with job.start(2, pods=2) as attempt:
        attempt.until_step(7)
        attempt.launchers[1].send_signal(signal.SIGTERM)
        ends = attempt.wait()

    assert [end.code for end in ends] == [ExitCode.TERMINATED] * 2, ends[0].log + ends[1].log
    assert ends[0].report.step == ends[1].report.step == ends[0].report.checkpoint_step >= 7
    assert job.checkpoints()[-1] == steps_of(job)[-1] == ends[0].report.step

    end = job.run(2)

    assert resumed_after(end.log) == ends[0].report.step
    assert_same_bits(job, two)


def test_sigterm_while_evaluating_loses_nothing(
    make_job: Callable[..., Any], two: Any, assert_same_bits: Callable[..., None]
) -> None:
    """SIGTERM during the first evaluation leaves nothing behind, and during a later one a checkpoint."""
    job = make_job(evaluation={"everySteps": 6})

    with job.start(2) as attempt:
        attempt.until_stage("Starting", total_steps=24)
        attempt.launchers[0].send_signal(signal.SIGTERM)
        (end,) = attempt.wait()
    assert end.code == ExitCode.TERMINATED, end.log
    assert "before the first step" in end.report.cause
    assert job.checkpoints() == []

    with job.start(2) as attempt:
        attempt.until_stage("Evaluating")
        attempt.launchers[0].send_signal(signal.SIGTERM)
        (end,) = attempt.wait()
    assert end.code == ExitCode.TERMINATED, end.log
    assert job.checkpoints()[-1] == steps_of(job)[-1] == end.report.step

    end = job.run(2)

    assert end.code == 0, end.log
    assert_same_bits(job, two)


def test_job_goes_on_with_fewer_ranks(
    make_job: Callable[..., Any], alone: Any, assert_same_training: Callable[..., None]
) -> None:
    """From 4 to 2 ranks by another backend, and on to 1, each sample is seen once; the report says "not bit-exact"."""
    job = make_job(training={"microBatchTokens": 96})
    for ranks, step, backend in ((4, 6, "mpi"), (2, 15, "ccl")):
        job.settings["distributed"] = {"backend": backend}
        with job.start(ranks) as attempt:
            attempt.until_step(step)
            attempt.launchers[0].send_signal(signal.SIGTERM)
            (end,) = attempt.wait()
        assert end.code == ExitCode.TERMINATED, end.log
    assert "not bit-exact: backend mpi -> ccl, world_size 4 -> 2" in end.log

    end = job.run(1)

    assert end.code == 0, end.log
    assert end.report.not_bit_exact == "backend mpi -> ccl, world_size 4 -> 2; world_size 2 -> 1"
    assert job.report()["not_bit_exact"] == end.report.not_bit_exact
    assert_same_training(job, alone)
    plan = job.plan()
    steps = [plan.step(number) for number in range(plan.total_steps)]
    assert [line["tokens"] for line in job.steps()] == [sum(step.bin_tokens) for step in steps]
    seen = [sample for step in steps if step.epoch == 0 for bin_ in step.bins for sample in bin_]
    assert sorted(seen) == list(range(len(seen)))


def truncate(path: Path) -> None:
    """Cut a file's second half off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path: Path) -> None:
    """Change one byte of a file."""
    changed = bytearray(path.read_bytes())
    changed[-100] ^= 1
    path.write_bytes(changed)


def test_damaged_checkpoints_are_passed_over(
    alone: Any, tmp_path: Path, assert_same_bits: Callable[..., None]
) -> None:
    """A checkpoint with a missing, cut or changed file is named, and an older one used and kept until a new one."""
    job = alone.copy(tmp_path / "work")
    job.unpublish()
    job.settings = {**job.settings, "checkpoint": {"everySteps": EVERY, "keep": 1}}
    folder = job.folder / "checkpoints"
    (folder / "step-00000024" / "manifest.json").unlink()
    truncate(folder / "step-00000020" / "adapter.safetensors")
    flip_a_byte(folder / "step-00000015" / "optimizer.safetensors")
    assert job.checkpoints() == [5, 10]

    with job.start(1) as attempt:
        attempt.until(lambda: job.last_step() in range(17, 20))
        attempt.ranks()[0].kill()
        (end,) = attempt.wait()
    assert resumed_after(end.log) == 10
    for step in (24, 20, 15):
        assert re.search(rf"step-000000{step} is damaged", end.log)
    assert job.checkpoints() == [15]

    end = job.run(1)

    assert end.code == 0, end.log
    assert resumed_after(end.log) == 15
    assert_same_bits(job, alone)


def test_other_data_are_refused(alone: Any, tmp_path: Path) -> None:
    """A checkpoint's data position means nothing in a file that changed meanwhile."""
    job = alone.copy(tmp_path / "work")
    job.unpublish()
    changed = tmp_path / "data" / job.data.name
    changed.parent.mkdir()
    changed.write_text("".join(job.data.read_text().splitlines(keepends=True)[1:]))
    job.data = changed

    end = job.run(1)

    assert end.code == ExitCode.INVALID_DATA, end.log
    assert "the data changed since step-00000024" in end.report.cause
