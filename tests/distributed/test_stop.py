"""A stop is heeded within the grace period, whatever the ranks are doing, and wherever it is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.exit_codes import ExitCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GRACE_SECONDS = 20
LAST_STEP = 2

RANK = """
import os, time
from pathlib import Path
from qlora_trainer.__main__ import main
from qlora_trainer.artifacts import adapter
from qlora_trainer.telemetry.progress import Progress

MOMENT, SECONDS = os.environ["TEST_MOMENT"], float(os.environ["TEST_SECONDS"])
there = Path(os.environ["TEST_THERE"])
advance, publish = Progress.advance, adapter.publish

def slow(progress, amount):
    advance(progress, amount)
    report = progress.report
    doing = report.work.name if report.work else report.stage
    if doing == MOMENT and (doing != "Training" or report.step > 0):
        there.touch()
        time.sleep(SECONDS)

def slow_publish(*args):
    there.touch()
    time.sleep(SECONDS if MOMENT == "publishing" else 0)
    return publish(*args)

Progress.advance, adapter.publish = slow, slow_publish
main()
"""
"""A rank that takes its time at one moment, each time that it has done a little of that."""
LAUNCH = "import os, sys; from qlora_trainer.launch.__main__ import main; os._exit(main([sys.executable, {rank!r}]))"

BEFORE, AFTER_A_STEP, AFTER_ALL, DONE = (
    "before the first step",
    "after step 1",
    "after the last step",
    "published",
)
MOMENTS = {
    "tokenizing": BEFORE,
    "loading the model": BEFORE,
    "Training": AFTER_A_STEP,
    "evaluating the base": AFTER_A_STEP,
    "evaluating the adapter": AFTER_ALL,
    "loading the unquantized base": AFTER_ALL,
    "evaluating the adapter on the unquantized base": AFTER_ALL,
    "publishing": DONE,
}
"""What the ranks do when one of their pods is asked to stop, and what they say then."""
LAYOUTS = {"1 rank": (1, 1), "2 pods": (2, 2), "4 pods": (4, 4)}
"""Ranks and pods."""


@pytest.mark.parametrize(
    ("moment", "ranks", "pods"),
    [
        pytest.param(
            moment, *layout, id=f"{moment}, {name}", marks=[] if name == "2 pods" else pytest.mark.soak
        )
        for moment in MOMENTS
        for name, layout in LAYOUTS.items()
    ],
)
def test_a_stop_of_one_pod_is_heeded_by_all(
    moment: str, ranks: int, pods: int, make_job: Callable[..., Any], tmp_path: Path
) -> None:
    """Nobody is killed: each rank leaves at the next boundary, with the last whole step saved.

    The step is longer than the grace period. What is being published is published.
    """
    (tmp_path / "rank.py").write_text(RANK)
    job = make_job(training={"maxSteps": LAST_STEP, "globalBatchTokens": 2000, "microBatchTokens": 96})
    job.settings["terminationGracePeriodSeconds"] = GRACE_SECONDS
    job.program = ["-c", LAUNCH.format(rank=str(tmp_path / "rank.py"))]
    there = tmp_path / "there"
    seconds = GRACE_SECONDS / 5 if moment == "Training" else 1.0
    job.extra_environ = {"TEST_MOMENT": moment, "TEST_SECONDS": str(seconds), "TEST_THERE": str(there)}

    with job.start(ranks, pods) as attempt:
        attempt.until(there.exists)
        attempt.launchers[-1].terminate()
        ends = attempt.wait()

    log = "\n".join(end.log for end in ends)
    if MOMENTS[moment] == DONE:
        assert [end.code for end in ends] == [ExitCode.DONE] * pods, log
        assert (job.folder / "adapter").exists()
        return
    assert [end.code for end in ends] == [ExitCode.TERMINATED] * pods, log
    assert any(MOMENTS[moment] in end.report.cause for end in ends), log
    saved = {BEFORE: 0, AFTER_A_STEP: 1, AFTER_ALL: LAST_STEP}[MOMENTS[moment]]
    assert job.checkpoints()[-1:] == [saved][: saved > 0]
    assert not (job.folder / "adapter").exists()
