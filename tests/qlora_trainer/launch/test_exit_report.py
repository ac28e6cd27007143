"""How ranks that ended become one report."""

from collections.abc import Callable

import pytest

from qlora_contract.progress import TerminationReport
from qlora_contract.run import RunConfig
from qlora_trainer.verdict import End, conclude, out_of_memory_cause


def told(code: int, cause: str) -> TerminationReport:
    """A rank's own report."""
    return TerminationReport(exit_code=code, reason="X", cause=cause, step=3)


@pytest.mark.parametrize(
    ("ends", "oom", "code", "reason", "cause"),
    [
        pytest.param([End(0, 0), End(1, 0)], False, 0, "DONE", "all ranks", id="done"),
        pytest.param(
            [End(0, 40), End(1, 13, report=told(13, "loss is NaN"))],
            False,
            13,
            "DIVERGED",
            "loss is NaN",
            id="cause",
        ),
        pytest.param([End(0, 40), End(1, -9)], False, 137, "Signal", "rank 1 died of SIGKILL", id="killed"),
        pytest.param([End(0, -4), End(1, 40)], False, 132, "Signal", "an instruction", id="illegal"),
        pytest.param([End(0, -40)], False, 168, "Signal", "signal 40", id="nameless signal"),
        pytest.param(
            [End(0, 40), End(1, -9)], True, 15, "OUT_OF_MEMORY", "limit of 2.00 GiB", id="out of memory"
        ),
        pytest.param(
            [End(0, -9, forced=True)], True, 137, "Signal", "still ran", id="own kill is not the kernel's"
        ),
        pytest.param(
            [End(0, 50), End(1, -9, forced=True)], False, 50, "TERMINATED", "", id="own kill tells nothing"
        ),
        pytest.param([End(0, 40), End(1, 50, forced=True)], False, 40, "LOST_PEER", "", id="nor own SIGTERM"),
        pytest.param(
            [End(0, 1, last_error="KeyError: 'x'"), End(1, 40)],
            False,
            1,
            "UNEXPECTED",
            "KeyError: 'x'",
            id="trace",
        ),
        pytest.param([End(0, 3)], False, 3, "UNEXPECTED", "nothing to stderr", id="foreign code"),
        pytest.param(
            [End(0, -11, report=told(0, "done"))], False, 139, "Signal", "SIGSEGV", id="died after report"
        ),
        pytest.param(
            [End(0, 40), End(1, 40, report=told(40, "lost 3"))], False, 40, "LOST_PEER", "lost 3", id="tie"
        ),
    ],
)
def test_one_end_for_the_pod(
    a_run: Callable[..., RunConfig], ends: list[End], oom: bool, code: int, reason: str, cause: str
) -> None:
    """The pod's code and cause are those of the rank that names the cause best."""
    got = conclude(ends, a_run(), oom=oom, limit=2 << 30)

    assert (got.exit_code, got.reason) == (code, reason)
    assert cause in got.cause


def test_the_out_of_memory_sentence(a_run: Callable[..., RunConfig]) -> None:
    """It names the limit, what was asked for, and what to change."""
    run = a_run(layout={"memoryPerRank": 3 << 29})

    assert out_of_memory_cause(1, 3 << 30, run) == (
        "rank 1 was killed because the pod reached its memory limit of 3.00 GiB with 2 rank(s) of "
        "memoryPerRank 1.50 GiB: raise topology.memoryPerRank, or lower training.microBatchTokens "
        "or training.maxSequenceLength"
    )


def test_ranks_that_share_memory_are_said_to(a_run: Callable[..., RunConfig]) -> None:
    """With `auto` memoryPerRank is the pod's, and the number of ranks is not the user's to lower."""
    run = a_run(layout={"ranksPerPod": "auto", "memoryPerRank": 3 << 30})

    assert "3.00 GiB with ranks that share memoryPerRank 3.00 GiB: raise" in out_of_memory_cause(
        1, 3 << 30, run
    )
