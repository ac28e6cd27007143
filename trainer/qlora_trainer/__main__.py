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

from qlora_contract import places
from qlora_contract.exit_codes import COLLATERAL, COLLATERAL_DELAY_SECONDS
from qlora_contract.progress import ProgressReport, TerminationReport
from qlora_contract.run import RunConfig
from qlora_trainer import cpu, report
from qlora_trainer.checkpoint import now
from qlora_trainer.distributed import Group, World
from qlora_trainer.errors import CollectiveError, ConfigurationError, PeerLost, TrainerError
from qlora_trainer.heartbeat import Heartbeat, leave
from qlora_trainer.launch import LaunchError, load_run, settled
from qlora_trainer.memory_watch import MemoryWatch
from qlora_trainer.outcome import done, failed
from qlora_trainer.peers import LostPeer
from qlora_trainer.progress import Progress, ProgressServer, port_from_environ
from qlora_trainer.session import Session
from qlora_trainer.storage import JobFolder
from qlora_trainer.topology.helpers import on_helpers
from qlora_trainer.train import train

log = logging.getLogger("qlora_trainer")

CULPRIT_SECONDS = 5.0
"""How long a rank whose collective failed waits for the heartbeat to name the lost peer."""
STUCK_FACTOR = 12
"""A collective may take so many times timeoutSeconds: a dead or stopped peer is the heartbeat's business, and one
that lives may be slow, as with a checkpoint on slow storage."""


def main() -> NoReturn:
    """Run one rank and end the process with its code.

    `os._exit`, because threads of torch that still wait for a peer would keep
    an orderly exit from ending.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    code = run_rank()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_rank() -> int:
    """Start up, train, report. Returns the exit code."""
    session: Session | None = None
    heartbeat: Heartbeat | None = None
    rank = World.from_environ(os.environ).rank
    try:
        with on_helpers():
            session = open_session()
            heartbeat = start_heartbeat(session)
        ending = train_or_find_done(session)
        part(session, heartbeat)
    except BaseException as error:
        if not isinstance(error, TrainerError):
            traceback.print_exception(error)
        ending = failed(name_culprit(error, heartbeat), rank, session)
        log.error("%s: %s", ending.reason, ending.cause)  # noqa: TRY400 - a foreseen end needs no traceback
        leave_peers(error, ending, session, heartbeat)
    report.write_rank_report(ending)
    return ending.exit_code


def part(session: Session, heartbeat: Heartbeat) -> None:
    """All ranks end here, together."""
    session.group.barrier()
    heartbeat.goodbye()
    session.group.close()


def leave_peers(
    error: BaseException, ending: TerminationReport, session: Session | None, heartbeat: Heartbeat | None
) -> None:
    """End without the others: in order if all do, after the cause if another is the cause, else saying why."""
    if session is None or heartbeat is None:
        return
    if isinstance(error, TrainerError) and error.agreed:
        with contextlib.suppress(TrainerError):
            part(session, heartbeat)
    elif ending.exit_code in set(COLLATERAL):
        time.sleep(COLLATERAL_DELAY_SECONDS)
    else:
        heartbeat.farewell(ending.cause, ending.exit_code)


def open_session() -> Session:
    """Read run.json, meet the other ranks, start to report progress."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    world = World.from_environ(os.environ)
    run = read_run(Path(os.environ.get(places.RUN_CONFIG_ENV, str(places.RUN_CONFIG_PATH))))
    volumes = places.volume_map()
    folder = JobFolder(places.job_folder(run.workspace, run.job.name, volumes), run)
    timeouts = run.distributed
    group = Group.open(
        world,
        timeouts.backend,
        STUCK_FACTOR * timeouts.timeout_seconds,
        timeouts.rendezvous_timeout_seconds,
    )
    progress = Progress(starting(run))
    if world.rank == 0:
        here_only = bool(volumes)  # set by `qlora run`; in a pod the operator asks from outside
        ProgressServer(progress, "127.0.0.1" if here_only else "", port_from_environ(os.environ))
    isa = cpu.probe_isa()
    return Session(run, world, group, volumes, folder, progress, MemoryWatch(), isa, stop=stop)


def read_run(path: Path) -> RunConfig:
    """run.json, as the launcher has already read it, with the number of ranks that the launchers agreed on."""
    try:
        run = load_run(path)
    except LaunchError as error:
        raise ConfigurationError(str(error)) from error
    return settled(run, [int(count) for count in os.environ.get(places.RANKS_ENV, "1").split(",")])


def starting(run: RunConfig) -> ProgressReport:
    """The live report before anything is known."""
    return ProgressReport(
        job_uid=run.job.uid,
        attempt=run.job.attempt,
        stage="Starting",
        step=0,
        total_steps=0,
        epoch=0.0,
        updated_time=now(),
    )


def start_heartbeat(session: Session) -> Heartbeat:
    """From here on a lost peer ends this process, whatever it is doing."""
    rank = session.world.rank

    def report_loss(lost: LostPeer) -> None:
        ending = failed(PeerLost(str(lost)), rank, session)
        log.error("%s: %s", ending.reason, ending.cause)
        report.write_rank_report(ending)

    heartbeat = Heartbeat(
        session.world,
        session.group.store,
        session.run.distributed.timeout_seconds,
        lambda lost: leave(lost, report_loss),
        socket.gethostname(),
    )
    heartbeat.start()
    return heartbeat


def train_or_find_done(session: Session) -> TerminationReport:
    """Train, unless this very job is done already."""
    if session.leads:
        session.folder.claim()
    if session.group.all_gather_object(session.leads and session.folder.finished())[0]:
        log.info("done already: %s", session.folder.adapter)
        return done(session, session.folder.report())
    session.progress.update(ranks=session.group.all_gather_object(session.place()))
    return done(session, train(session))


def name_culprit(error: BaseException, heartbeat: Heartbeat | None) -> BaseException:
    """A collective that failed says that a peer is gone; the heartbeat knows which."""
    if isinstance(error, CollectiveError) and heartbeat is not None:
        lost = heartbeat.lost(CULPRIT_SECONDS)
        if lost is not None:
            return PeerLost(str(lost))
    return error


if __name__ == "__main__":
    main()
