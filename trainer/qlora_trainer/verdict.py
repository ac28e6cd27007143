"""How the ranks of a pod ended, as one report: that of the rank whose code names the cause best."""

import os
import signal
from dataclasses import dataclass

from qlora_contract.exit_codes import ExitCode, fold
from qlora_contract.progress import TerminationReport
from qlora_contract.run import RunConfig
from qlora_trainer import report
from qlora_trainer.supervise import Rank


@dataclass(frozen=True)
class End:
    """How one rank ended."""

    rank: int
    code: int
    """As a process has it: negative for a death by signal."""
    forced: bool = False
    """The launcher ended it because its time was over, so its end is no cause."""
    last_error: str = ""
    report: TerminationReport | None = None


def out_of_memory_cause(rank: int, limit: int | None, run: RunConfig) -> str:
    """The sentence for a rank that the kernel killed for want of memory."""
    layout = run.layout
    allowed = "its memory limit" if limit is None else f"its memory limit of {_gib(limit)}"
    sharing = "ranks that share" if layout.ranks_per_pod == "auto" else f"{layout.ranks_per_pod} rank(s) of"
    return (
        f"rank {rank} was killed because the pod reached {allowed} with {sharing} "
        f"memoryPerRank {_gib(layout.memory_per_rank)}: raise topology.memoryPerRank, or lower "
        "training.microBatchTokens or training.maxSequenceLength"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def conclude(ends: list[End], run: RunConfig, oom: bool, limit: int | None) -> TerminationReport:
    """One report for the pod: that of the rank whose code names the cause best.

    `ends` is in the order of time: of two causes that weigh the same, the first one is it.
    A rank that the launcher had to end tells no cause, unless no other rank does.
    With `oom`, a SIGKILL that was not the launcher's is the kernel's, for want of memory.
    """

    def code_of(end: End) -> int:
        killed_for_memory = oom and end.code == -signal.SIGKILL and not end.forced
        return ExitCode.OUT_OF_MEMORY if killed_for_memory else end.code

    telling = [end for end in ends if end.code != 0 and not end.forced] or sorted(
        ends, key=lambda end: end.rank
    )
    code = fold([code_of(end) for end in telling])
    winners = [end for end in telling if fold([code_of(end)]) == code]
    end = next((end for end in winners if end.report is not None), winners[0])
    if code == ExitCode.OUT_OF_MEMORY and end.code < 0:
        cause = out_of_memory_cause(end.rank, limit, run)
    elif end.report is not None and end.report.exit_code == end.code:
        cause = end.report.cause
    else:
        cause = _cause(end, run)
    base = end.report or TerminationReport(
        exit_code=code, reason="", cause="", rank=end.rank, host=os.uname().nodename
    )
    return base.model_copy(update={"exit_code": code, "reason": _reason(code), "cause": cause})


def _reason(code: int) -> str:
    if code > 128:
        return "Signal"
    return ExitCode(code).name if code in set(ExitCode) else ExitCode.UNEXPECTED.name


def _cause(end: End, run: RunConfig) -> str:
    """What can be said of a rank that left no report, or one that its end contradicts."""
    if end.forced:
        return (
            f"rank {end.rank} was told to stop, still ran when its time was over "
            f"(terminationGracePeriodSeconds: {run.termination_grace_period_seconds}), and was killed"
        )
    if end.code < 0:
        name = next((known.name for known in signal.Signals if known == -end.code), f"signal {-end.code}")
        return f"rank {end.rank} died of {name}{_SIGNAL_HINTS.get(-end.code, '')}"
    if end.code == 0:
        return "all ranks of this pod are done"
    return f"rank {end.rank} exited with code {end.code}: {end.last_error or 'it wrote nothing to stderr'}"


_SIGNAL_HINTS: dict[int, str] = {
    signal.SIGKILL: ", which the launcher did not send; the memory group counted no kill for want of memory",
    signal.SIGILL: ": it met an instruction that this processor lacks",
    signal.SIGBUS: ": a mapped file shrank, or /dev/shm is full",
}


def end_of(rank: Rank) -> End:
    """How a rank whose process is over ended."""
    code = rank.process.wait()
    return End(rank.rank, code, rank.forced, rank.last_error, report.read_rank_report(rank.report))
