"""One rank: read run.json, train, exit with a code of the contract.

    python -m qlora_trainer

Started by `qlora_trainer.launch`, which has set the rank's environment.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from qlora_contract.env import LAUNCHED_ENV, RANKS_ENV, RUN_CONFIG_ENV
from qlora_contract.exit_codes import COLLATERAL, COLLATERAL_DELAY_SECONDS
from qlora_contract.job_folder import job_path
from qlora_contract.paths import RUN_CONFIG_PATH, volume_map
from qlora_contract.progress import TerminationReport
from qlora_contract.run_config import RunConfig
from qlora_trainer.distributed import Group, World
from qlora_trainer.distributed.heartbeat import Heartbeat, leave
from qlora_trainer.distributed.peers import LostPeer
from qlora_trainer.errors import (
    CollectiveError,
    ConfigurationError,
    PeerLost,
    Stalled,
    TerminatedAlone,
    TrainerError,
)
from qlora_trainer.host.affinity import on_service_cpus
from qlora_trainer.run_file import RunFileError, load_run, with_rank_counts
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.telemetry.progress_server import ProgressServer, port_from_environ
from qlora_trainer.telemetry.stall_watch import stall_limit, watch
from qlora_trainer.telemetry.termination import write_rank_report
from qlora_trainer.training.context import RankContext, collective_seconds
from qlora_trainer.training.exports import export
from qlora_trainer.training.loop import train
from qlora_trainer.training.termination import failure_report, success_report

log = logging.getLogger("qlora_trainer")

CULPRIT_SECONDS = 5.0
"""How long a rank whose collective failed waits for the heartbeat to name the lost peer."""
REPORT_SECONDS = 1.0
"""How long the report of a rank that hangs may take to be written."""


def main() -> NoReturn:
    """Run one rank and end the process with its code.

    By `os._exit`, because threads of torch that still wait for a peer would keep an orderly exit from ending.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    code = run_rank()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_rank() -> int:
    """Start up, train, report; the exit code."""
    context: RankContext | None = None
    heartbeat: Heartbeat | None = None
    rank = 0
    try:
        rank = World.from_environ(os.environ).rank
        with on_service_cpus():
            context = open_context()
            heartbeat = start_heartbeat(context)
            watch_for_stalls(context, heartbeat)
        ending = train_or_export(context)
        leave_together(context, heartbeat)
    except BaseException as error:
        if not isinstance(error, TrainerError):
            traceback.print_exception(error)
        ending = failure_report(name_lost_peer(error, heartbeat, context), rank, context)
        log.error("%s: %s", ending.reason, ending.cause)  # noqa: TRY400 - an expected end needs no traceback
        if context is not None and heartbeat is not None:
            leave_after(error, ending, context, heartbeat)
    record_end(ending, context)
    if context is not None and context.tracking is not None:
        context.tracking.close(ending.exit_code)
    return ending.exit_code


def record_end(ending: TerminationReport, context: RankContext | None) -> None:
    """Tell the launcher how this rank ended, then the job's report page."""
    write_rank_report(ending)
    if context is not None:
        with contextlib.suppress(TrainerError):  # Fenced: the page is another attempt's by now
            context.books.write(ended=ending.cause)


def open_context() -> RankContext:
    """Read run.json, connect to the other ranks, start to serve progress."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, leave_at_once)  # until there are peers that must hear of it
    world = World.from_environ(os.environ)
    run = read_run(Path(os.environ.get(RUN_CONFIG_ENV, str(RUN_CONFIG_PATH))))
    volumes = volume_map()
    folder = JobFolder(job_path(run.workspace, run.job.name, volumes), run)
    imported = time.monotonic()
    group = Group.open(
        world,
        run.distributed.backend,
        collective_seconds(run),
        run.distributed.rendezvous_timeout_seconds,
    )
    context = RankContext(run, group, folder, volumes=volumes, stop=stop)
    context.progress.spent("imports", imported - float(os.environ.get(LAUNCHED_ENV, imported)))
    context.progress.spent("meeting the other ranks", time.monotonic() - imported)
    if context.is_rank_zero:
        only_here = bool(volumes)  # set by `qlora run`; in a pod the operator connects from outside
        ProgressServer(context.progress, "127.0.0.1" if only_here else "", port_from_environ(os.environ))
    return context


def leave_at_once(*_: object) -> NoReturn:
    """The signal handler of a rank that waits for the others, and has nothing to lose."""
    raise TerminatedAlone("asked to stop before all ranks had met")


def read_run(path: Path) -> RunConfig:
    """run.json, which the launcher has read before, with the number of ranks that the launchers agreed on.

    Raises:
        ConfigurationError: it is missing, malformed or of another version.
    """
    try:
        run = load_run(path)
    except RunFileError as error:
        raise ConfigurationError(str(error)) from error
    return with_rank_counts(run, [int(count) for count in os.environ.get(RANKS_ENV, "1").split(",")])


def start_heartbeat(context: RankContext) -> Heartbeat:
    """Start the heartbeat: from here on a lost peer ends this process, whatever it is doing."""
    rank = context.world.rank

    def report_loss(lost: LostPeer) -> None:
        ending = failure_report(loss_of(lost, context), rank, context)
        log.error("%s: %s", ending.reason, ending.cause)
        record_end(ending, context)

    heartbeat = Heartbeat(
        context.world,
        context.group.store,
        context.run.distributed.timeout_seconds,
        lambda lost: leave(lost, report_loss, loss_of(lost, context).exit_code),
        socket.gethostname(),
        context.stop,
    )
    heartbeat.start()
    heartbeat.stop_on_sigterm()
    return heartbeat


def watch_for_stalls(context: RankContext, heartbeat: Heartbeat) -> None:
    """From here on this process ends when its main thread hangs."""

    def leave_stalled(error: Stalled) -> None:
        ending = failure_report(error, context.world.rank, context)
        log.error("%s: %s", ending.reason, ending.cause)
        # In another thread: the report's storage may be what hangs.
        threading.Thread(target=record_end, args=(ending, context), name="report", daemon=True).start()
        heartbeat.farewell(ending.cause, ending.exit_code)
        time.sleep(REPORT_SECONDS)
        os._exit(ending.exit_code)

    watch(
        stall_limit(context.run),
        lambda: context.progress.activity,
        lambda: context.group.waiting,
        leave_stalled,
    )


def loss_of(lost: LostPeer, context: RankContext) -> TrainerError:
    """What a lost peer is to this rank: once all are asked to stop, one that goes first is no failure."""
    if context.stop.is_set():
        return TerminatedAlone(f"asked to stop; {lost}")
    return PeerLost(str(lost))


def train_or_export(context: RankContext) -> TerminationReport:
    """What run.json asks for: train, unless an earlier attempt has finished this very job; or export what is not
    exported yet. Raises TrainerError."""
    if context.is_rank_zero:
        context.folder.acquire()
    if context.group.all_gather_object(context.is_rank_zero and context.folder.finished())[0]:
        log.info("already finished: %s", context.folder.adapter)
        report = context.folder.report()
    elif context.run.stage == "export":
        raise ConfigurationError(
            f"{context.folder.path} has no finished adapter: run the job to its end first"
        )
    else:
        if context.is_rank_zero:
            context.books.open()
        context.progress.update(ranks=context.group.all_gather_object(context.rank_info()))
        report = train(context)
    if context.run.stage == "export":
        context.books.open()
        export(context)
        report = context.folder.report()
    return success_report(context, report)


def name_lost_peer(
    error: BaseException, heartbeat: Heartbeat | None, context: RankContext | None
) -> BaseException:
    """For a failed collective the peer that caused it, where the heartbeat knows it; else the error itself."""
    if isinstance(error, CollectiveError) and heartbeat is not None and context is not None:
        lost = heartbeat.lost(CULPRIT_SECONDS)
        if lost is not None:
            return loss_of(lost, context)
    return error


def leave_after(
    error: BaseException, ending: TerminationReport, context: RankContext, heartbeat: Heartbeat
) -> None:
    """Leave the group after an error: together if all ranks do, later if a peer is the cause, else saying why."""
    if isinstance(error, TrainerError) and error.agreed:
        with contextlib.suppress(TrainerError):
            leave_together(context, heartbeat)
    elif ending.exit_code in set(COLLATERAL):
        time.sleep(COLLATERAL_DELAY_SECONDS)
    else:
        heartbeat.farewell(ending.cause, ending.exit_code)


def leave_together(context: RankContext, heartbeat: Heartbeat) -> None:
    """Leave the group as all ranks do, after a last barrier."""
    context.group.barrier()
    heartbeat.goodbye()
    context.group.close()


if __name__ == "__main__":
    main()
