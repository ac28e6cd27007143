"""One per pod: start the ranks with their CPUs, pass signals on, fold their ends into one.

    python -m qlora_trainer.launch

Nothing here imports torch: thread counts and affinity must be set before it is.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from pydantic import ValidationError

from qlora_contract.cpus import format_cpu_list
from qlora_contract.exit_codes import COLLATERAL_DELAY_SECONDS, ExitCode, fold
from qlora_contract.places import (
    COMPLETION_INDEX_ENV,
    CPUS_ENV,
    PARENT_DEATH_ENV,
    RENDEZVOUS_PORT,
    RUN_CONFIG_ENV,
    RUN_CONFIG_PATH,
)
from qlora_contract.progress import TerminationReport
from qlora_contract.run import RUN_CONFIG_VERSION, RunConfig
from qlora_trainer import cpu, report

RANK_COMMAND = (sys.executable, "-m", "qlora_trainer")

GRACE_MARGIN_SECONDS = 5.0
"""Kept of the grace period for the launcher's own end."""
PATIENCE_MARGIN_SECONDS = 30.0
"""What ranks get beyond their own heartbeat's time-out to notice that a rank here has died."""
KILL_DELAY_SECONDS = 10.0
"""From SIGTERM to SIGKILL for ranks that outlived the patience: without peers they can save nothing."""
POLL_SECONDS = 0.1
DRAIN_SECONDS = 5.0
"""How long to wait for the last output of ranks that have ended."""
LONGEST_LINE = 65_536
"""Bytes; a longer line is passed on in parts."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


class LaunchError(Exception):
    """The ranks were not started; `code` says what kind of reason it was."""

    def __init__(self, code: ExitCode, cause: str) -> None:
        super().__init__(cause)
        self.code = code


# --- before the ranks


def load_run(path: Path) -> RunConfig:
    """run.json. Raises LaunchError when it is missing, malformed or of another version."""
    try:
        text = path.read_text()
        version = json.loads(text)["version"]
    except OSError as error:
        raise _invalid(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _invalid(f"{path} is not a JSON object with a version: {error!r}") from error
    if version != RUN_CONFIG_VERSION:
        raise _invalid(
            f"{path} has version {version!r} and this trainer reads version {RUN_CONFIG_VERSION}: "
            "operator and trainer image must be of the same release"
        )
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the object as a whole"
        raise _invalid(f"{path} is malformed at {where}: {first['msg']}") from error


def _invalid(cause: str) -> LaunchError:
    return LaunchError(ExitCode.INVALID_CONFIGURATION, cause)


def pod_index(run: RunConfig, environ: Mapping[str, str]) -> int:
    """This pod's completion index; 0 when there is one pod and nobody says."""
    text = environ.get(COMPLETION_INDEX_ENV, "0" if run.layout.pods == 1 else "")
    if not (text.isascii() and text.isdigit() and int(text) < run.layout.pods):
        raise _invalid(f"{COMPLETION_INDEX_ENV} is {text!r} and must be 0 to {run.layout.pods - 1}")
    return int(text)


def check_isa(run: RunConfig, found: cpu.Isa) -> None:
    """Raise LaunchError, naming what is missing, when this processor is below the attempt's tier."""
    if lacking := found.lacks(run.isa):
        raise LaunchError(
            ExitCode.ISA_BELOW_TIER,
            f"this node is below ISA tier {run.isa}: it lacks {', '.join(lacking)}; "
            "a node that has them is needed",
        )


def rank_cpus(run: RunConfig, environ: Mapping[str, str], root: Path = cpu.ROOT) -> list[cpu.RankCpus]:
    """What each local rank runs on, of the CPUs that this launcher was given."""
    allowed, quota = cpu.available_cpus(root)
    layout, named = run.layout, environ.get(CPUS_ENV)
    try:
        cpus = cpu.parse_cpu_list(named) if named else allowed
        if missing := sorted(set(cpus) - set(allowed)):
            raise _invalid(
                f"{CPUS_ENV} names CPUs {format_cpu_list(missing)}, which this process may not use; "
                f"it may use {format_cpu_list(allowed)}"
            )
        ordered = cpu.by_core(cpus, root)
        ranks, each = layout.ranks_per_pod, layout.cpus_per_rank
        return cpu.assign_cpus(ordered, quota, ranks, each, layout.pinning, ours_alone=bool(named))
    except cpu.CpuError as error:
        raise _invalid(str(error)) from error


def rank_environment(
    run: RunConfig, index: int, local: int, cpus: cpu.RankCpus, environ: Mapping[str, str]
) -> dict[str, str]:
    """The whole environment of local rank `local` of pod `index`, after torchrun's conventions.

    OMP_PROC_BIND stays unset: libgomp, which torch's wheels bring, would bind the first
    thread to one CPU at load, and every helper thread (gloo, heartbeat) would inherit that.
    """
    layout = run.layout
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if layout.pods == 1 else "")
    if not address:
        raise _invalid(f"MASTER_ADDR is not set, and {layout.pods} pods need the host name of rank 0")
    port = environ.get("MASTER_PORT") or str(RENDEZVOUS_PORT)
    return {
        **environ,
        "RANK": str(index * layout.ranks_per_pod + local),
        "WORLD_SIZE": str(layout.world_size),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(layout.ranks_per_pod),
        "NODE_RANK": str(index),
        "GROUP_RANK": str(index),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "PET_NNODES": str(layout.pods),
        "PET_NPROC_PER_NODE": str(layout.ranks_per_pod),
        "PET_NODE_RANK": str(index),
        "PET_MASTER_ADDR": address,
        "PET_MASTER_PORT": port,
        "OMP_NUM_THREADS": str(cpus.threads),
        "MKL_NUM_THREADS": str(cpus.threads),
        "MKL_DYNAMIC": "FALSE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


# --- the ranks


@dataclass(eq=False)
class Rank:
    """One rank's process and what became of it."""

    rank: int
    process: subprocess.Popen[bytes]
    report: Path
    pumps: list[threading.Thread] = field(default_factory=list)
    last_error: str = ""
    """The last line it wrote to stderr that was not blank."""
    forced: bool = False
    """The launcher ended it because its time was over, so its end is no cause."""

    @property
    def lives(self) -> bool:
        """Whether it still runs; keeps its exit code when it does not."""
        return self.process.poll() is None


def start_ranks(
    command: Sequence[str], environments: list[dict[str, str]], cpus: list[cpu.RankCpus], folder: Path
) -> list[Rank]:
    """Start one process per environment, bound to its CPUs, its output passed on line by line.

    All are started before the first reader thread, because they are set up after fork.
    """
    ranks = []
    for local, (environment, part) in enumerate(zip(environments, cpus, strict=True)):
        path = folder / f"rank-{local}.json"
        process = _start(command, {**environment, report.REPORT_ENV: str(path)}, part.cpus)
        ranks.append(Rank(int(environment["RANK"]), process, path))
    for rank in ranks:
        _pump(rank)
    return ranks


def _start(command: Sequence[str], environment: dict[str, str], cpus: list[int]) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def set_up() -> None:
        _die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(128 + signal.SIGKILL)
        os.sched_setaffinity(0, cpus)

    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Ctrl-C reaches the launcher alone, which asks every rank once, with SIGTERM.
        start_new_session=True,
        preexec_fn=set_up,  # noqa: PLW1509 (no thread runs yet: see start_ranks)
    )


def _die_with_parent(signal_number: int) -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)


_output = threading.Lock()


def _pump(rank: Rank) -> None:
    """Pass a rank's output on, each line with its prefix, by a thread per stream."""
    streams = ((rank.process.stdout, sys.stdout.buffer), (rank.process.stderr, sys.stderr.buffer))
    for source, sink in streams:
        assert source is not None
        remember = source is rank.process.stderr
        thread = threading.Thread(target=_pass_on, args=(rank, source, sink, remember), daemon=True)
        thread.start()
        rank.pumps.append(thread)


def _pass_on(rank: Rank, source: IO[bytes], sink: IO[bytes], remember: bool) -> None:
    prefix = f"[rank {rank.rank}] ".encode()
    with source:
        for line in iter(lambda: source.readline(LONGEST_LINE), b""):
            if remember and line.strip():
                rank.last_error = line.decode(errors="replace").strip()
            _write(sink, prefix + line if line.endswith(b"\n") else prefix + line + b"\n")


def _write(sink: IO[bytes], line: bytes) -> None:
    try:
        with _output:
            sink.write(line)
            sink.flush()
    except (OSError, ValueError):
        pass  # nobody reads any more; go on reading, or the rank would block


# --- watching over them


@dataclass(frozen=True)
class Limits:
    """Seconds that ranks may go on for."""

    grace: float
    """After the launcher was told to stop."""
    patience: float
    """After the first rank of this pod died; peers have a heartbeat of their own, which comes first."""
    kill_delay: float = KILL_DELAY_SECONDS
    """After the patience ended and they were told to stop."""


def limits_of(run: RunConfig) -> Limits:
    """The limits of a run."""
    period = float(run.termination_grace_period_seconds)
    return Limits(
        grace=max(period - GRACE_MARGIN_SECONDS, period / 2),
        patience=COLLATERAL_DELAY_SECONDS + run.distributed.timeout_seconds + PATIENCE_MARGIN_SECONDS,
    )


@dataclass
class Stop:
    """Whether, and when, the launcher was told to stop. Further signals change nothing."""

    at: float | None = None

    def __call__(self, *_: object) -> None:
        """A signal handler; also called when there is another reason to stop."""
        self.at = time.monotonic() if self.at is None else self.at


def action(
    now: float, stopped_at: float | None, died_at: float | None, limits: Limits
) -> Literal["wait", "terminate", "kill"]:
    """What the living ranks are due. Times are of one monotonic clock, in seconds; None: not yet."""
    patient_until = None if died_at is None else died_at + limits.patience
    if stopped_at is not None and now >= stopped_at + limits.grace:
        return "kill"
    if patient_until is not None and now >= patient_until + limits.kill_delay:
        return "kill"
    if stopped_at is not None or (patient_until is not None and now >= patient_until):
        return "terminate"
    return "wait"


def watch(ranks: list[Rank], limits: Limits, stop: Stop) -> list[Rank]:
    """Wait until every rank has ended, and see to it that it comes to that.

    Returns the ranks in the order in which they ended.
    """
    ended: list[Rank] = []
    died_at: float | None = None
    told = False
    while True:
        ended += [rank for rank in ranks if rank not in ended and not rank.lives]
        living = [rank for rank in ranks if rank not in ended]
        if not living:
            break
        if died_at is None and any(rank.process.returncode for rank in ended):
            died_at = time.monotonic()
            _say(f"a rank has died; the others have {limits.patience:.0f} s to notice and end")
        due = action(time.monotonic(), stop.at, died_at, limits)
        if due == "terminate" and not told:
            told = True
            _tell(living, forced=stop.at is None)
        if due == "kill":
            for rank in living:
                _kill(rank)
        time.sleep(POLL_SECONDS)
    _drain(ranks)
    return ended


def _tell(ranks: list[Rank], *, forced: bool) -> None:
    _say("sends SIGTERM to the ranks that still run")
    for rank in ranks:
        rank.forced = forced
        rank.process.send_signal(signal.SIGTERM)


def _drain(ranks: list[Rank]) -> None:
    """Let the last output through; something that a rank started may hold its pipe open."""
    deadline = time.monotonic() + DRAIN_SECONDS
    for rank in ranks:
        for thread in rank.pumps:
            thread.join(max(0.0, deadline - time.monotonic()))


def _kill(rank: Rank) -> None:
    """SIGKILL to a rank and to whatever it started."""
    if rank.lives:
        rank.forced = True
        os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()


# --- after the ranks


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
    return (
        f"rank {rank} was killed because the pod reached {allowed} with {layout.ranks_per_pod} rank(s) of "
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


# --- the whole


def launch(command: Sequence[str], environ: Mapping[str, str], stop: Stop) -> TerminationReport:
    """Start the ranks of this pod, see them end, and tell how. Raises LaunchError before the start."""
    run = load_run(Path(environ.get(RUN_CONFIG_ENV) or RUN_CONFIG_PATH))
    check_isa(run, cpu.probe())
    index, cpus = pod_index(run, environ), rank_cpus(run, environ)
    environments = [rank_environment(run, index, local, part, environ) for local, part in enumerate(cpus)]
    if stop.at is not None:
        raise LaunchError(ExitCode.TERMINATED, "told to stop before the ranks were started")
    kills_before = cpu.oom_kills()
    with tempfile.TemporaryDirectory(prefix="qlora-launch-") as folder:
        try:
            ranks = start_ranks(command, environments, cpus, Path(folder))
        except (OSError, subprocess.SubprocessError) as error:
            # Those that were started die with this process.
            raise LaunchError(ExitCode.UNEXPECTED, f"a rank could not be started: {error}") from error
        ends = [end_of(rank) for rank in watch(ranks, limits_of(run), stop)]
    return conclude(ends, run, oom=cpu.oom_kills() > kills_before, limit=cpu.memory_limit())


def main(command: Sequence[str] = RANK_COMMAND, environ: Mapping[str, str] = os.environ) -> int:
    """Launch, write the termination message, and return the pod's exit code."""
    stop = Stop()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if parent := environ.get(PARENT_DEATH_ENV):
        _die_with_parent(signal.SIGTERM)
        if int(parent) > 1 and os.getppid() != int(parent):  # it died before the line above
            stop()
    try:
        ended = launch(command, environ, stop)
    except LaunchError as error:
        host = os.uname().nodename
        ended = TerminationReport(exit_code=error.code, reason=error.code.name, cause=str(error), host=host)
    _announce(ended, environ)
    return ended.exit_code


def _announce(ended: TerminationReport, environ: Mapping[str, str]) -> None:
    """The termination message, and a last line in the log."""
    path = report.termination_log(environ)
    try:
        if path is not None:
            path.write_bytes(report.to_bytes(ended))
    except OSError as error:
        _say(f"the termination message could not be written: {error}")
    _say(f"ends with {ended.exit_code} ({ended.reason}): {ended.cause}")


def _say(text: str) -> None:
    """A line of the launcher's own in the log."""
    _write(sys.stderr.buffer, f"launcher: {text}\n".encode(errors="replace"))


if __name__ == "__main__":
    # Not sys.exit: closing a stdout that nobody reads would change the exit code.
    os._exit(main())
