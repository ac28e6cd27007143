"""What can go wrong in the middle of a job, and what is left then."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from disturbances import fill, small_disk
from qlora_contract.exit_codes import ExitCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_stopped_peer_is_waited_for(
    backend: str, make_job: Callable[..., Any], two: Any, assert_same_bits: Callable[..., None]
) -> None:
    """A rank that stands still for 10 s costs 10 s and nothing else."""
    job = make_job(distributed={"timeoutSeconds": 60, "backend": backend})

    with job.start(2) as attempt:
        attempt.until_step(6)
        attempt.ranks()[1].suspend()
        time.sleep(10)
        assert attempt.launchers[0].poll() is None
        attempt.ranks()[1].resume()
        (end,) = attempt.wait()

    assert end.code == 0, end.log
    assert_same_bits(job, two)


def test_stopped_peer_is_reported(backend: str, make_job: Callable[..., Any]) -> None:
    """A rank that stands still beyond the timeout is lost: its peer says which, where, and for how long."""
    job = make_job(distributed={"timeoutSeconds": 8, "backend": backend})

    with job.start(2, pods=2) as attempt:
        attempt.until_step(6)
        attempt.ranks()[1].suspend()
        end = attempt.wait_for_pod(0)

    assert end.code == ExitCode.LOST_PEER, end.log
    assert re.search(r"rank 1 on host \S+ gave no sign of life for 8 s", end.report.cause)
    assert job.checkpoints()[-1] == 5


@pytest.mark.parametrize("ranks", [1, 2], ids=["alone", "with a peer"])
def test_a_rank_that_hangs_is_named(make_job: Callable[..., Any], ranks: int) -> None:
    """A file never opens, as on storage that does not answer: the rank ends itself, and its peer says why it leaves."""
    job = make_job()
    job.settings["progressDeadlineSeconds"] = 20
    job.folder.mkdir(parents=True)
    os.mkfifo(job.folder / "base_losses.json")

    with job.start(ranks, pods=ranks) as attempt:
        ends = [attempt.wait_for_pod(pod) for pod in range(ranks)]

    assert ends[0].code == ExitCode.STALLED, ends[0].log
    assert re.match(r"nothing was done for 18 s, in \w+ of \w+\.py", ends[0].report.cause)
    assert "base_losses.py" in ends[0].log
    if ranks > 1:
        assert ends[1].code == ExitCode.LOST_PEER, ends[1].log
        assert "ended: STALLED: nothing was done for 18 s" in ends[1].report.cause


def test_a_rank_that_stands_still_for_long_but_not_for_ever_goes_on(make_job: Callable[..., Any]) -> None:
    """Stopped for longer than the limit of a hang, with its machine: nobody else is there to miss it."""
    job = make_job()
    job.settings["progressDeadlineSeconds"] = 10

    with job.start() as attempt:
        attempt.until_step(6)
        attempt.ranks()[0].suspend()
        time.sleep(12)
        attempt.ranks()[0].resume()
        (end,) = attempt.wait()

    assert end.code == ExitCode.DONE, end.log


def assert_rank_0_is_missed(job: Any, how: str, seen: str) -> None:
    """Both peers of a rank 0 to whom that happens leave, and say what they saw of it."""
    with job.start(3, pods=3) as attempt:
        attempt.until_step(6)
        getattr(attempt.ranks()[0], how)()
        ends = [attempt.wait_for_pod(pod) for pod in (1, 2)]

    assert [each.code for each in ends] == [ExitCode.LOST_PEER] * 2, ends[0].log + ends[1].log
    assert all(re.search(rf"rank 0 on host \S+ {seen}", each.report.cause) for each in ends)


def test_rank_0_that_dies_is_missed(backend: str, make_job: Callable[..., Any]) -> None:
    """The death of rank 0, which serves the store and the heartbeat, is named by every other rank."""
    job = make_job(distributed={"timeoutSeconds": 60, "backend": backend})

    assert_rank_0_is_missed(job, "kill", "died")


def test_rank_0_that_stands_still_is_missed(make_job: Callable[..., Any]) -> None:
    """A rank 0 that stands still is named by every other rank, too."""
    job = make_job(distributed={"timeoutSeconds": 8})

    assert_rank_0_is_missed(job, "suspend", "gave no sign of life for 8 s")


def test_fenced_attempt_writes_nothing(make_job: Callable[..., Any]) -> None:
    """Once the fence names a newer attempt, the older one leaves without a byte written."""
    job = make_job()

    with job.start(1) as attempt:
        attempt.until_step(7)
        rank = attempt.ranks()[0]
        rank.suspend()
        (job.folder / "fence.json").write_text(json.dumps({"uid": "uid-1", "attempt": 9}))
        before = job.files()
        rank.resume()
        (end,) = attempt.wait()

    assert end.code == ExitCode.TERMINATED, end.log
    assert "now belongs to attempt 9 of job uid-1" in end.report.cause
    assert job.files() == before
    assert job.leftovers() == []


def test_older_attempt_does_not_start(make_job: Callable[..., Any]) -> None:
    """An attempt that comes late, after a newer one, leaves before it writes anything."""
    job = make_job()
    job.folder.mkdir(parents=True)
    (job.folder / "fence.json").write_text(json.dumps({"uid": "uid-1", "attempt": 9}))

    end = job.run()

    assert end.code == ExitCode.TERMINATED, end.log
    assert "attempt 9 has taken over; this is attempt 0" in end.report.cause
    assert json.loads((job.folder / "fence.json").read_text())["attempt"] == 9


def poison(checkpoint: Path) -> None:
    """Make the optimizer's next step one of about 1e26, in a checkpoint that is otherwise whole."""
    path = checkpoint / "optimizer.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["exp_avg"].fill_(1e25)
    save_file(tensors, path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_divergence_keeps_the_last_checkpoint(alone: Any, tmp_path: Path) -> None:
    """Weights that grow beyond all bounds end the job at the first loss that is no number; nothing of it is saved."""
    job = alone.copy(tmp_path / "work")
    job.unpublish()
    for step in (15, 20, 24):
        shutil.rmtree(job.folder / "checkpoints" / f"step-000000{step}")
    poison(job.folder / "checkpoints" / "step-00000010")

    end = job.run(2)

    assert end.code == ExitCode.DIVERGED, end.log
    assert "of step 12 is not a finite number; the last checkpoint is kept" in end.report.cause
    assert end.log.count("DIVERGED") == 3, "each rank says so, and the launcher"
    assert job.last_step() == 11
    assert job.checkpoints() == [5, 10]
    assert not (job.folder / "adapter").exists()


@pytest.mark.parametrize("required", [True, False], ids=["required", "not required"])
def test_adapter_without_improvement_is_published_only_if_allowed(
    required: bool, make_job: Callable[..., Any]
) -> None:
    """An adapter that is no better than the base is published only when no improvement is required."""
    job = make_job(
        training={"learningRate": 1e-30, "maxSteps": 2}, evaluation={"requireImprovement": required}
    )

    end = job.run(2)

    assert end.code == (ExitCode.NO_IMPROVEMENT if required else 0), end.log
    assert (job.folder / "adapter").exists() != required
    assert (job.folder / "training_report.json").exists() != required
    assert job.leftovers() == []
    if required:
        assert "is not below the base's" in end.report.cause
    else:
        assert job.report()["eval_loss"] == job.report()["base_eval_loss_quantized"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mount(size) -> a folder with a file system of its own, of that size."""
    with contextlib.ExitStack() as mounted:
        yield lambda size: mounted.enter_context(small_disk(tmp_path / "work", size))


def test_disk_that_fills_up_keeps_the_last_checkpoint(
    make_job: Callable[..., Any],
    alone: Any,
    disk: Callable[[str], Path],
    assert_same_bits: Callable[..., None],
) -> None:
    """No space for a checkpoint ends the job with the older ones whole; with space again it goes on from them."""
    root = disk("8m")
    job = make_job(root=root)
    with job.start(1) as attempt:
        attempt.until_step(7)
        rank = attempt.ranks()[0]
        rank.suspend()
        filler = fill(root, leave=65_536)
        kept = job.checkpoints()
        rank.resume()
        (end,) = attempt.wait()

    assert end.code == ExitCode.STORAGE_FULL, end.log
    assert "no space left while writing checkpoint" in end.report.cause
    assert job.checkpoints() == kept
    assert kept
    assert job.leftovers() == []

    filler.unlink()
    job.done()

    assert_same_bits(job, alone)


def test_full_disk_is_found_before_the_first_step(
    make_job: Callable[..., Any], disk: Callable[[str], Path]
) -> None:
    """A workspace without room for the checkpoints is refused before anything is trained."""
    job = make_job(root=disk("1m"))

    end = job.run()

    assert end.code == ExitCode.STORAGE_FULL, end.log
    assert re.search(r"has [\d.]+ \S+ free; checkpoints and the adapter need [\d.]+ \S+", end.report.cause)
    assert job.metrics() == []
    assert job.checkpoints() == []
