"""One termination report for a pod: that of the rank whose exit code best names the cause."""

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from qlora_contract.exit_codes import ExitCode, dominant_exit_code
from qlora_contract.progress import TerminationReport
from qlora_contract.run_config import RunConfig
from qlora_contract.units import format_bytes
from qlora_trainer.launch.supervisor import Rank
from qlora_trainer.telemetry.stall_watch import stall_limit
from qlora_trainer.telemetry.termination import read_memory_plan, read_rank_report

LARGEST_PARTS = 3
"""Parts of a rank's memory that are named when it ran out."""
SIGNAL_HINTS: dict[int, str] = {
    signal.SIGKILL: ", which the launcher did not send; the pod's cgroup counts no kill for exceeding its memory limit",
    signal.SIGILL: ": it executed an instruction that this processor does not have",
    signal.SIGBUS: ": a mapped file was truncated, or /dev/shm is full",
}


@dataclass(frozen=True)
class RankExit:
    """How one rank exited."""

    rank: int
    code: int
    """As subprocess.Popen.returncode has it: negative for a death by signal."""
    killed_by_launcher: bool = False
    """The launcher ended it because its time was over, so its end is not a cause."""
    last_error: str = ""
    """The last line that it wrote to stderr."""
    report: TerminationReport | None = None
    """What it reported itself."""
    hung: bool = False
    """Its launcher killed it, since it showed no life."""
    memory_plan: Mapping[str, int] = field(default_factory=dict)
    """What it needed its memory for, bytes by part; empty where it did not come to know."""


def rank_exit(rank: Rank) -> RankExit:
    """How a rank whose process has exited did so."""
    report = read_rank_report(rank.report)
    plan = read_memory_plan(rank.report)
    code = rank.process.wait()
    hung = rank.hung_at is not None and code < 0
    return RankExit(rank.rank, code, rank.killed_by_launcher, rank.last_error, report, hung, plan)


def summarize(exits: Sequence[RankExit], run: RunConfig, oom: bool, limit: int | None) -> TerminationReport:
    """One report for the pod: that of the rank whose code best names the cause.

    A rank that the launcher had to end is not a cause, unless there is no other.

    Args:
        exits: of all ranks, in the order of time: of two causes of equal weight the first counts.
        run: the job.
        oom: the kernel has killed a process of this pod for memory. Then a SIGKILL that was not ours is that one.
        limit: the pod's memory limit in bytes; None: it has none.
    """

    def code_of(end: RankExit) -> int:
        if end.hung:
            return ExitCode.STALLED
        killed_for_memory = oom and end.code == -signal.SIGKILL and not end.killed_by_launcher
        return ExitCode.OUT_OF_MEMORY if killed_for_memory else end.code

    failures = [end for end in exits if end.code != 0 and not end.killed_by_launcher]
    candidates = failures or sorted(exits, key=lambda each: each.rank)
    code = dominant_exit_code([code_of(end) for end in candidates])
    winners = [end for end in candidates if dominant_exit_code([code_of(end)]) == code]
    winner = next((end for end in winners if end.report is not None), winners[0])
    if code == ExitCode.OUT_OF_MEMORY and winner.code < 0:
        cause = out_of_memory_cause(winner.rank, limit, run, winner.memory_plan)
    elif winner.report is not None and winner.report.exit_code == winner.code:
        cause = winner.report.cause
    else:
        cause = _cause(winner, run)
    known = ExitCode(code) if code in set(ExitCode) else ExitCode.UNEXPECTED
    reason = "Signal" if code > 128 else known.name
    base = winner.report or TerminationReport(
        exit_code=code, reason=reason, cause=cause, rank=winner.rank, host=os.uname().nodename
    )
    return base.model_copy(update={"exit_code": code, "reason": reason, "cause": cause})


def out_of_memory_cause(
    rank: int, limit: int | None, run: RunConfig, plan: Mapping[str, int] = MappingProxyType({})
) -> str:
    """The sentence for a rank that the kernel killed for memory.

    Args:
        rank: which.
        limit: the pod's memory limit in bytes; None: unknown.
        run: the job.
        plan: RankExit.memory_plan.
    """
    layout = run.layout
    largest = sorted(plan, key=lambda part: -plan[part])[:LARGEST_PARTS]
    parts = ", ".join(f"{part} {format_bytes(plan[part])}" for part in largest)
    planned = f" (planned {format_bytes(sum(plan.values()))} a rank: {parts})" if parts else ""
    allowed = "its memory limit" if limit is None else f"its memory limit of {format_bytes(limit)}"
    sharing = "ranks that share" if layout.ranks_per_pod == "auto" else f"{layout.ranks_per_pod} rank(s) of"
    return (
        f"rank {rank} was killed because the pod reached {allowed} with {sharing} "
        f"memoryPerRank {format_bytes(layout.memory_per_rank)}{planned}: raise topology.memoryPerRank, or lower "
        "training.microBatchTokens or training.maxSequenceLength"
    )


def _cause(end: RankExit, run: RunConfig) -> str:
    """The cause of a rank that left no report, or one that its exit code contradicts."""
    rank, code = end.rank, end.code
    if end.hung:
        return (
            f"nothing ran in rank {rank} for {stall_limit(run):.0f} s, not even its own watch: something keeps the "
            "interpreter's lock; the log of the rank says where"
        )
    if end.killed_by_launcher:
        return (
            f"rank {rank} was asked to stop, was still running at the end of its grace period "
            f"(terminationGracePeriodSeconds: {run.termination_grace_period_seconds}), and was killed"
        )
    if code < 0:
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
        return f"rank {rank} died of {name}{SIGNAL_HINTS.get(-code, '')}"
    if code == 0:
        return "all ranks of this pod are done"
    return f"rank {rank} exited with code {code}: {end.last_error or 'it wrote nothing to stderr'}"
