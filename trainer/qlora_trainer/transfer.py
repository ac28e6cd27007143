"""A fetch of remote sources, or the adapter's way to its destination, as a process of its own.

    python -m qlora_trainer.transfer

Reads run.json, serves its progress, and leaves a termination message, as the launcher of ranks does. Nothing here
imports torch: it runs in a small pod, which alone sees credentials.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_contract import places
from qlora_contract.exit_codes import ExitCode
from qlora_contract.progress import ProgressReport, Stage, TerminationReport
from qlora_contract.run import Fetched, RunConfig
from qlora_trainer import report
from qlora_trainer.errors import ConfigurationError, Terminated, TrainerError, from_os_error
from qlora_trainer.launch import LaunchError, load_run
from qlora_trainer.progress import Progress, ProgressServer, now, port_from_environ
from qlora_trainer.remote.credentials import redact
from qlora_trainer.remote.fetch import Fetch
from qlora_trainer.remote.patience import Patience, tell
from qlora_trainer.remote.publish import publish
from qlora_trainer.supervise import die_with_parent

STAGES: dict[str, Stage] = {"fetch": "Fetching", "publish": "Uploading"}


class Stopped(BaseException):
    """SIGTERM. No Exception, so that no library takes it for an error of its own."""


def main(environ: Mapping[str, str] = os.environ) -> int:
    """Transfer, write the termination message, and return the exit code."""
    try:
        _listen(environ)
        ended = transfer(environ)
    except Stopped:
        ended = _failed(Terminated("asked to stop; what has arrived is kept"))
    except Exception as error:  # whatever it is, it must be told
        ended = _failed(_as_trainer_error(error, environ))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report.announce(ended.model_copy(update={"cause": redact(ended.cause, environ)}), environ, tell)
    return ended.exit_code


def _listen(environ: Mapping[str, str]) -> None:
    """Stop at SIGTERM and Ctrl-C, and with the process that has started this one."""

    def stop(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        raise Stopped

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if parent := environ.get(places.PARENT_DEATH_ENV):
        die_with_parent(signal.SIGTERM)
        if int(parent) > 1 and os.getppid() != int(parent):  # it died before the line above
            raise Stopped


def transfer(environ: Mapping[str, str]) -> TerminationReport:
    """What run.json asks for. Raises TrainerError, LaunchError, PlaceError or OSError."""
    run = load_run(Path(environ.get(places.RUN_CONFIG_ENV) or places.RUN_CONFIG_PATH))
    volumes = places.volume_map(environ)
    if run.stage not in STAGES:
        raise ConfigurationError(f"run.json has stage {run.stage!r}, and this is for {' and '.join(STAGES)}")
    meter = Meter(run, Progress(_starting(run)))
    # Set by `qlora run`; in a pod the operator asks from outside.
    server = ProgressServer(meter.progress, "127.0.0.1" if volumes else "", port_from_environ(environ))
    patience = Patience(run.distributed.rendezvous_timeout_seconds)
    try:
        if run.stage == "fetch":
            return _fetched(Fetch(run, volumes, environ, patience, meter.count).all())
        return _published(publish(run, volumes, environ, patience, meter.count))
    finally:
        meter.progress.update(stage="Done")
        server.close()


class Meter:
    """Bytes, for the live report."""

    def __init__(self, run: RunConfig, progress: Progress) -> None:
        self.progress = progress
        self._stage = STAGES[run.stage]
        self._done = 0
        self._total = 0

    def count(self, done: int, total: int) -> None:
        """Add to what has arrived, and to what there is in all."""
        self._done += done
        self._total += total
        self.progress.update(stage=self._stage, bytes_done=self._done, bytes_total=self._total)


def _starting(run: RunConfig) -> ProgressReport:
    return ProgressReport(
        job_uid=run.job.uid,
        attempt=run.job.attempt,
        stage=STAGES[run.stage],
        step=0,
        total_steps=0,
        epoch=0.0,
        updated_time=now(),
    )


# --- how it ended


def _fetched(fetched: Fetched) -> TerminationReport:
    known = {role: revision for role, revision in fetched if revision is not None}
    cause = ", ".join(f"{role} at {revision}" for role, revision in known.items())
    return _done(f"fetched {cause}" if cause else "nothing to fetch: no source is remote", fetched=fetched)


def _published(uri: str) -> TerminationReport:
    return _done(f"adapter sent to {uri}", published_uri=uri)


def _done(cause: str, **facts: Any) -> TerminationReport:
    return TerminationReport(
        exit_code=0, reason=ExitCode.DONE.name, cause=cause, host=socket.gethostname(), **facts
    )


def _failed(error: TrainerError) -> TerminationReport:
    code = error.exit_code
    return TerminationReport(exit_code=code, reason=code.name, cause=str(error), host=socket.gethostname())


def _as_trainer_error(error: Exception, environ: Mapping[str, str]) -> TrainerError:
    """What ended the transfer, as one of the foreseen ends where it is one."""
    if isinstance(error, TrainerError):
        return error
    if isinstance(error, LaunchError | places.PlaceError):
        return ConfigurationError(str(error))
    if isinstance(error, OSError) and (known := from_os_error(error, "transferring")) is not None:
        return known
    tell(redact("".join(traceback.format_exception(error)), environ))
    first = (str(error).strip().splitlines() or ["no more is known"])[0]
    return TrainerError(f"unexpected {type(error).__name__}: {first}")


if __name__ == "__main__":
    # Not sys.exit: closing a stdout that nobody reads would change the exit code, and s3fs has a thread that stays.
    sys.stderr.flush()
    os._exit(main())
