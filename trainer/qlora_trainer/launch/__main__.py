"""One launcher per pod: start the ranks on their CPUs, pass signals on, report their exits as one.

    python -m qlora_trainer.launch

Nothing here imports torch: thread counts and affinity must be set before it is loaded.
"""

import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_contract.descriptors import open_standard_descriptors
from qlora_contract.entry_points import RANK
from qlora_contract.env import LAUNCHED_ENV, PARENT_DEATH_ENV, RUN_CONFIG_ENV
from qlora_contract.exit_codes import ExitCode
from qlora_contract.paths import RUN_CONFIG_PATH
from qlora_contract.progress import TerminationReport
from qlora_contract.run_config import MAX_RANKS, RunConfig
from qlora_contract.scratch import scratch_folder
from qlora_contract.signals import stop_by
from qlora_contract.units import first_line
from qlora_trainer.errors import ConfigurationError, RendezvousError, Terminated, TrainerError, expected
from qlora_trainer.host.cgroups import memory_limit, oom_kills
from qlora_trainer.host.isa import Isa, probe
from qlora_trainer.host.numa import huge_pages
from qlora_trainer.host.process import die_with_parent, started_at
from qlora_trainer.launch.environment import (
    allocator,
    master_address,
    memory_settings,
    pod_index,
    rank_environment,
)
from qlora_trainer.launch.exit_report import rank_exit, summarize
from qlora_trainer.launch.fork_server import SpawnError
from qlora_trainer.launch.pod_layout import pod_layout
from qlora_trainer.launch.supervisor import Stop, limits_of, log, start_ranks, watch
from qlora_trainer.launch.world_size import JoinRequest, Stopped, WorldSizeError, agree_on_rank_counts
from qlora_trainer.run_file import RunFileError, load_run
from qlora_trainer.telemetry.stall_watch import stall_limit
from qlora_trainer.telemetry.termination import write_termination_message

RANK_COMMAND = (sys.executable, "-m", RANK)


class IsaBelowTier(TrainerError):  # noqa: N818 - named for what happened
    """This node's processor lacks instructions that the attempt was started for."""

    exit_code = ExitCode.ISA_BELOW_TIER


def main(command: Sequence[str] = RANK_COMMAND, environ: Mapping[str, str] = os.environ) -> int:
    """Launch, write the termination message, and return the pod's exit code."""
    open_standard_descriptors()
    stop = Stop()
    stop_by(stop)
    parent = environ.get(PARENT_DEATH_ENV)
    if parent and not die_with_parent(signal.SIGTERM, int(parent)):
        stop()
    try:
        report = launch(command, environ, stop)
    except TrainerError as error:
        report = _failure(error.exit_code, str(error))
    except RunFileError as error:
        report = _failure(error.code, str(error))
    except Exception as error:
        # Whatever it is: who waits for this pod reads no log.
        known = expected(error, "starting the ranks")
        if known is None:
            for line in "".join(traceback.format_exception(error)).splitlines():
                log(line)
            known = TrainerError(f"unexpected {type(error).__name__}: {first_line(error)}")
        report = _failure(known.exit_code, str(known))
    write_termination_message(report, environ, log)
    return report.exit_code


def _failure(code: ExitCode, cause: str) -> TerminationReport:
    """The report of a launch that ended before there were ranks."""
    return TerminationReport(exit_code=code, reason=code.name, cause=cause, host=os.uname().nodename)


def launch(command: Sequence[str], environ: Mapping[str, str], stop: Stop) -> TerminationReport:
    """Start the ranks of this pod, supervise them, and report how they ended.

    Args:
        command: what a rank runs, as `python -m MODULE` or `python SCRIPT`.
        environ: the launcher's environment.
        stop: set when the launcher is asked to stop.

    Raises:
        RunFileError: run.json cannot be used.
        TrainerError: another reason why no rank was started.
    """
    run = load_run(Path(environ.get(RUN_CONFIG_ENV) or RUN_CONFIG_PATH))
    check_isa(run, probe())
    index, layout = pod_index(run, environ), pod_layout(run, environ)
    for line in layout.lines():
        log(line)
    counts = rank_counts(run, index, len(layout.ranks), environ, stop)
    with_allocator = {
        **environ,
        **memory_settings(environ, huge_pages(), allocator()),
        LAUNCHED_ENV: str(started_at()),
    }
    environments = [
        rank_environment(run, counts, index, local, assignment, with_allocator)
        for local, assignment in enumerate(layout.ranks)
    ]
    if stop.is_requested:
        raise _stopped()
    kills_before = oom_kills()
    with scratch_folder("launch") as folder:
        try:
            ranks = start_ranks(command, environments, layout.ranks, folder, lambda: stop.is_requested)
        except SpawnError as error:
            if stop.is_requested:
                raise _stopped() from error
            raise TrainerError(f"the ranks could not be started: {error}") from error
        exits = [rank_exit(rank) for rank in watch(ranks, limits_of(run), stop, stall_limit(run))]
    return summarize(exits, run, oom=oom_kills() > kills_before, limit=memory_limit())


def check_isa(run: RunConfig, isa: Isa) -> None:
    """Raise IsaBelowTier, naming what is missing, when this processor is below the attempt's tier."""
    if lacking := isa.lacks(run.isa):
        raise IsaBelowTier(
            f"this node is below ISA tier {run.isa}: it lacks {', '.join(lacking)}; "
            "the attempt needs a node that has them"
        )


def rank_counts(run: RunConfig, index: int, own: int, environ: Mapping[str, str], stop: Stop) -> list[int]:
    """How many ranks each pod has: as the job says or, with ranksPerPod auto, as the launchers tell each other.

    Args:
        run: the job.
        index: this pod.
        own: how many ranks it will start.
        environ: the launcher's environment.
        stop: set when the launcher is asked to stop.

    Raises:
        RendezvousError: a pod did not come in time, or this one is of another job.
        ConfigurationError: there are more ranks than a job may have.
        Terminated: asked to stop meanwhile.
    """
    pods = run.layout.pods
    if run.layout.ranks_per_pod != "auto":
        return [own] * pods
    request = JoinRequest(job=run.job.uid, attempt=run.job.attempt, pods=pods, pod=index, ranks=own)
    host, port = master_address(run, environ)
    timeout = run.distributed.rendezvous_timeout_seconds
    try:
        counts = agree_on_rank_counts(request, host, port, timeout, lambda: stop.is_requested)
    except WorldSizeError as error:
        raise RendezvousError(str(error)) from error
    except Stopped as error:
        raise _stopped() from error
    if sum(counts) > MAX_RANKS:
        raise ConfigurationError(
            f"topology.ranksPerPod auto makes {sum(counts)} ranks of {pods} pods, more than the limit of {MAX_RANKS}: "
            "set it to a number, or lower topology.pods"
        )
    return counts


def _stopped() -> Terminated:
    return Terminated("asked to stop before the ranks were started")


if __name__ == "__main__":
    # Not sys.exit: closing a stdout whose reader is gone would change the exit code.
    os._exit(main())
