"""How ranks that ended become one report."""

from collections.abc import Callable

import pytest

from qlora_contract.progress import TerminationReport
from qlora_contract.run_config import RunConfig
from qlora_trainer.launch.exit_report import RankExit, out_of_memory_cause, summarize


def reported(code: int, cause: str) -> TerminationReport:
    """A rank's own report."""
    return TerminationReport(exit_code=code, reason="X", cause=cause, step=3)


@pytest.mark.parametrize(
    ("exits", "oom", "code", "reason", "cause"),
    [
        pytest.param([RankExit(0, 0), RankExit(1, 0)], False, 0, "DONE", "all ranks", id="done"),
        pytest.param(
            [RankExit(0, 40), RankExit(1, 13, report=reported(13, "loss is NaN"))],
            False,
            13,
            "DIVERGED",
            "loss is NaN",
            id="cause",
        ),
        pytest.param(
            [RankExit(0, 40), RankExit(1, -9)], False, 137, "Signal", "rank 1 died of SIGKILL", id="killed"
        ),
        pytest.param(
            [RankExit(0, -4), RankExit(1, 40)], False, 132, "Signal", "an instruction", id="illegal"
        ),
        pytest.param([RankExit(0, -40)], False, 168, "Signal", "signal 40", id="nameless signal"),
        pytest.param(
            [RankExit(0, 40), RankExit(1, -9)],
            True,
            15,
            "OUT_OF_MEMORY",
            "limit of 2.00 GiB",
            id="out of memory",
        ),
        pytest.param(
            [RankExit(0, -9, killed_by_launcher=True)],
            True,
            137,
            "Signal",
            "still running",
            id="own kill is not the kernel's",
        ),
        pytest.param(
            [RankExit(0, 50), RankExit(1, -9, killed_by_launcher=True)],
            False,
            50,
            "TERMINATED",
            "",
            id="own kill is not a cause",
        ),
        pytest.param(
            [RankExit(0, 40), RankExit(1, -9, hung=True)],
            True,
            31,
            "STALLED",
            "nothing ran in rank 1 for 1620 s",
            id="hung, whatever the kernel counts",
        ),
        pytest.param(
            [RankExit(0, 40), RankExit(1, 50, killed_by_launcher=True)],
            False,
            40,
            "LOST_PEER",
            "",
            id="nor own SIGTERM",
        ),
        pytest.param(
            [RankExit(0, 1, last_error="KeyError: 'x'"), RankExit(1, 40)],
            False,
            1,
            "UNEXPECTED",
            "KeyError: 'x'",
            id="trace",
        ),
        pytest.param([RankExit(0, 3)], False, 3, "UNEXPECTED", "nothing to stderr", id="foreign code"),
        pytest.param(
            [RankExit(0, -11, report=reported(0, "done"))],
            False,
            139,
            "Signal",
            "SIGSEGV",
            id="died after report",
        ),
        pytest.param(
            [RankExit(0, 40), RankExit(1, 40, report=reported(40, "lost 3"))],
            False,
            40,
            "LOST_PEER",
            "lost 3",
            id="tie",
        ),
    ],
)
def test_the_pod_has_one_exit(
    a_run: Callable[..., RunConfig], exits: list[RankExit], oom: bool, code: int, reason: str, cause: str
) -> None:
    """The pod's code and cause are those of the rank that names the cause best."""
    got = summarize(exits, a_run(), oom=oom, limit=2 << 30)

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


def test_the_out_of_memory_sentence_names_the_largest_parts(a_run: Callable[..., RunConfig]) -> None:
    """Where the rank had come to know what it needs."""
    parts = {
        "runtime": 1 << 28,
        "base": 3 << 30,
        "adapter": 1 << 20,
        "activations": 1 << 30,
        "scratch": 1 << 26,
    }
    killed = RankExit(1, -9, memory_plan=parts)

    assert "(planned 4.31 GiB a rank: base 3.00 GiB, activations 1.00 GiB, runtime 256 MiB): raise" in (
        summarize([killed], a_run(), oom=True, limit=4 << 30).cause
    )


def test_ranks_that_share_memory_are_said_to(a_run: Callable[..., RunConfig]) -> None:
    """With `auto` memoryPerRank is the pod's, and the number of ranks is not the user's to lower."""
    run = a_run(layout={"ranksPerPod": "auto", "memoryPerRank": 3 << 30})

    assert "3.00 GiB with ranks that share memoryPerRank 3.00 GiB: raise" in out_of_memory_cause(
        1, 3 << 30, run
    )
