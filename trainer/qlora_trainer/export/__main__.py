"""An export as a process: reads an ExportRequest on stdin, writes ExportEvents to stdout.

    python -m qlora_trainer.export < request.json

`qlora export` and the rank of the stage `export` start it. A process of its own gives its memory back, and can
be stopped at any moment: what it is making is then removed.
"""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from qlora_contract.exit_codes import ExitCode
from qlora_contract.export import ExportEvent, ExportForm, ExportRequest
from qlora_contract.plan import PlanError
from qlora_contract.progress import Work
from qlora_contract.units import first_line
from qlora_trainer.errors import ConfigurationError, Terminated, TrainerError, expected
from qlora_trainer.host.process import die_with_parent
from qlora_trainer.storage.job_folder import JobFolder


class StopRequested(BaseException):
    """SIGTERM or Ctrl-C. Not an Exception, so that no library takes it for an error of its own."""


class EventWriter:
    """The Listener that writes events to stdout."""

    def begin(self, name: str, total: int) -> None:
        """Something of so many bytes is begun; 0: they are not known."""
        _tell(ExportEvent(work=Work(name=name, unit="bytes", total=total or None)))

    def advance(self, done: int) -> None:
        """So many more bytes of it are done."""
        _tell(ExportEvent(advanced=done))

    def exported(self, form: ExportForm) -> None:
        """A form is finished."""
        _tell(ExportEvent(exported=form))


def _tell(event: ExportEvent) -> None:
    print(event.model_dump_json(by_alias=True, exclude_none=True), flush=True)


def main() -> int:
    """Export; the exit code, which the last event names with its cause unless it is 0."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        die_with_parent(signal.SIGTERM, os.getppid())
        run(sys.stdin.read())
        return 0
    except StopRequested:
        return _fail(Terminated("asked to stop; what was exported is kept"))
    except Exception as error:  # whatever it is, it must be told
        known = expected(error, "exporting")
        if known is None:
            traceback.print_exception(error)
            known = TrainerError(f"unexpected {type(error).__name__}: {first_line(error)}")
        return _fail(known)


def _stop(*_: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise StopRequested


def _fail(error: TrainerError) -> int:
    _tell(ExportEvent(error=PlanError(code=int(error.exit_code), cause=str(error))))
    return int(error.exit_code) or int(ExitCode.UNEXPECTED)


def run(text: str) -> None:
    """Do what a request asks. Raises ConfigurationError for one that is none, and what exporting.export raises."""
    try:
        request = ExportRequest.model_validate_json(text)
    except ValidationError as error:
        raise ConfigurationError(f"the request is malformed: {first_line(error)}") from error
    from qlora_trainer.export.exporting import export

    check_fence: Callable[[], None] = lambda: None  # noqa: E731
    if request.run is not None and request.job_folder is not None:
        check_fence = JobFolder(Path(request.job_folder), request.run).check_fence
    export(request, EventWriter(), check_fence)


if __name__ == "__main__":
    # Not sys.exit: closing a stdout whose reader is gone would change the exit code.
    os._exit(main())
