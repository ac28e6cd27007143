"""A transfer as a process: fetches the remote sources of a job, or sends its adapter to its destination.

    python -m qlora_trainer.transfer

It reads run.json, serves its progress, and leaves a termination message, as the launcher of ranks does. It runs in a
small pod, which alone sees credentials.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_contract.env import PARENT_DEATH_ENV, RUN_CONFIG_ENV
from qlora_contract.exit_codes import ExitCode
from qlora_contract.paths import RUN_CONFIG_PATH, volume_map
from qlora_contract.progress import Stage, TerminationReport
from qlora_contract.run_config import RunConfig
from qlora_contract.units import first_line
from qlora_trainer.errors import ConfigurationError, Terminated, TrainerError, expected
from qlora_trainer.host.process import die_with_parent
from qlora_trainer.run_file import RunFileError, load_run
from qlora_trainer.storage import handoff
from qlora_trainer.telemetry.progress import Progress, starting_report
from qlora_trainer.telemetry.progress_server import ProgressServer, port_from_environ
from qlora_trainer.telemetry.termination import write_termination_message
from qlora_trainer.transfer.credentials import redact
from qlora_trainer.transfer.fetch import SourceFetcher
from qlora_trainer.transfer.publish import publish
from qlora_trainer.transfer.retry import Retrier, log

STAGES: dict[str, Stage] = {"fetch": "Fetching", "publish": "Uploading"}
"""`stage` of run.json -> stage of the live report."""


class StopRequested(BaseException):
    """SIGTERM or Ctrl-C. Not an Exception, so that no library takes it for an error of its own."""


def main(environ: Mapping[str, str] = os.environ) -> int:
    """Transfer, write the termination message, and return the exit code."""
    try:
        _handle_signals(environ)
        end = transfer(environ)
    except StopRequested:
        end = _failure(Terminated("asked to stop; what has arrived is kept"))
    except RunFileError as error:
        end = _failure(ConfigurationError(str(error)))
    except Exception as error:  # whatever it is, it must be reported
        known = expected(error, "transferring")
        if known is None:
            log(redact("".join(traceback.format_exception(error)), environ))
            known = TrainerError(f"unexpected {type(error).__name__}: {first_line(error)}")
        end = _failure(known)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    write_termination_message(end.model_copy(update={"cause": redact(end.cause, environ)}), environ, log)
    return end.exit_code


def _handle_signals(environ: Mapping[str, str]) -> None:
    """Stop at SIGTERM and Ctrl-C, and when the process that started this one dies."""

    def stop(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        raise StopRequested

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if parent := environ.get(PARENT_DEATH_ENV):
        alive = die_with_parent(signal.SIGTERM, int(parent))
        if int(parent) > 1 and not alive:
            raise StopRequested


def transfer(environ: Mapping[str, str]) -> TerminationReport:
    """Do what run.json asks for. Raises TrainerError, RunFileError, InvalidUriError or OSError."""
    run = load_run(Path(environ.get(RUN_CONFIG_ENV) or RUN_CONFIG_PATH))
    if run.stage not in STAGES:
        raise ConfigurationError(f"run.json has stage {run.stage!r}; a transfer does {' or '.join(STAGES)}")
    volumes = volume_map(environ)
    bytes_ = ByteProgress(run)
    # Set by `qlora run`; in a pod the operator asks from outside.
    server = ProgressServer(bytes_.progress, "127.0.0.1" if volumes else "", port_from_environ(environ))

    def tell(pause: str | None) -> None:
        bytes_.progress.update(waiting=None if pause is None else redact(pause, environ))

    retrier = Retrier(run.distributed.rendezvous_timeout_seconds, tell=tell)
    try:
        if run.stage == "fetch":
            with handoff.fetching(environ):
                fetched = SourceFetcher(run, volumes, environ, retrier, bytes_.count).fetch_all()
                handoff.leave(fetched, environ)
            known = [(source.field, fetched.of(source)) for source in run.sources]
            found = ", ".join(f"{field} at {revision}" for field, revision in known if revision is not None)
            cause = f"fetched {found}" if found else "nothing to fetch: no source is remote"
            return _success(cause, fetched=fetched)
        uri = publish(run, volumes, environ, retrier, bytes_.count)
        return _success(f"adapter uploaded to {uri}", published_uri=uri)
    finally:
        bytes_.progress.update(stage="Done")
        server.close()


class ByteProgress:
    """The live report of a transfer: bytes done, of bytes in all."""

    def __init__(self, run: RunConfig) -> None:
        self._stage = STAGES[run.stage]
        self._done = 0
        self._total = 0
        self.progress = Progress(starting_report(run, self._stage))

    def count(self, done: int, total: int) -> None:
        """Add to the bytes that are done, and to those in all."""
        self._done += done
        self._total += total
        self.progress.update(stage=self._stage, bytes_done=self._done, bytes_total=self._total)


# --- how it ended


def _success(cause: str, **facts: Any) -> TerminationReport:
    return TerminationReport(
        exit_code=0, reason=ExitCode.DONE.name, cause=cause, host=socket.gethostname(), **facts
    )


def _failure(error: TrainerError) -> TerminationReport:
    code = error.exit_code
    return TerminationReport(exit_code=code, reason=code.name, cause=str(error), host=socket.gethostname())


if __name__ == "__main__":
    # Not sys.exit: closing a stdout whose reader is gone would change the exit code.
    sys.stderr.flush()
    os._exit(main())
