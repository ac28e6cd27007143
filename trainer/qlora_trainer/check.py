"""A look at a job's data before there are ranks, beside the fetch that brings them.

    python -m qlora_trainer.check

It runs in a container of the fetch's pod that has no credentials, and waits there until the sources are in the
workspace. What it finds is in its termination message. Its exit code is 0 whatever that says: the sources are there,
and a look that fails keeps nobody from training on them. A process of its own reads the data, since files of strangers
may make it hang or crash.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from qlora_contract import entry_points
from qlora_contract.env import HANDOFF_ENV, RUN_CONFIG_ENV
from qlora_contract.exit_codes import ExitCode
from qlora_contract.paths import HANDOFF_ROOT, RUN_CONFIG_PATH
from qlora_contract.plan import PlanResponse
from qlora_contract.progress import TerminationReport
from qlora_contract.run_config import ResolvedRevisions, RunConfig
from qlora_contract.scratch import scratch_folder
from qlora_trainer.run_file import RunFileError, load_run
from qlora_trainer.storage.handoff import wait_for_fetch
from qlora_trainer.telemetry.termination import write_termination_message

PLANNER = (sys.executable, "-m", entry_points.PLAN, "preview")
SECONDS = 300.0
"""After which it is given up: several times what the bounds of the look itself, and imports from a slow disk, take."""
ALONE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Variables of the process that reads: it asks nobody, and is content with one core."""
SURE = (ExitCode.INVALID_CONFIGURATION, ExitCode.INVALID_DATA, ExitCode.MODEL_UNUSABLE)
"""What ranks would end with as well. That this container has no room, say, proves nothing of theirs."""


class StopRequested(BaseException):
    """SIGTERM. Not an Exception, so that nothing takes it for an error."""


def main(environ: Mapping[str, str] = os.environ) -> int:
    """Wait, look, write the termination message, and return 0."""

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise StopRequested

    signal.signal(signal.SIGTERM, stop)
    try:
        end = look(environ)
    except StopRequested:
        end = _unknown("asked to stop")
    except (RunFileError, OSError) as error:
        end = _unknown(str(error))
    write_termination_message(end, environ, _log)
    return ExitCode.DONE


def look(
    environ: Mapping[str, str], planner: Sequence[str] = PLANNER, seconds: float = SECONDS
) -> TerminationReport:
    """What is found, once there is something to look at. Raises RunFileError or OSError.

    Args:
        environ: where run.json is, and the folder that the fetch leaves word in.
        planner: the command that is asked.
        seconds: how long it may take.
    """
    run = load_run(Path(environ.get(RUN_CONFIG_ENV) or RUN_CONFIG_PATH))
    fetched = wait_for_fetch(Path(environ.get(HANDOFF_ENV) or HANDOFF_ROOT))
    if fetched is None:
        return _unknown("the sources were not fetched")
    with scratch_folder("check") as folder:
        path = folder / "run.json"
        path.write_text(as_trained(run, fetched).to_json(), encoding="utf-8")
        try:
            # What it writes to stderr, such as a traceback, is for the log.
            done = subprocess.run(
                [*planner, str(path)],
                stdout=subprocess.PIPE,
                timeout=seconds,
                check=False,
                env={**environ, **ALONE},
            )
        except subprocess.TimeoutExpired:
            return _unknown(f"nothing was found out within {seconds:.0f} s")
    try:
        answer = PlanResponse.model_validate_json(done.stdout.rstrip().rpartition(b"\n")[2])
    except ValidationError:
        return _unknown(f"the look at them ended with exit status {done.returncode}; the log has the details")
    if answer.error is not None:
        code, cause = answer.error.code, answer.error.cause
        return _report(ExitCode(code), cause) if code in SURE else _unknown(cause)
    if answer.check is None:
        return _unknown("the planner answered with something else")
    return _report(ExitCode.DONE, "the data were looked at", data=answer.check.sentence())


def as_trained(run: RunConfig, fetched: ResolvedRevisions) -> RunConfig:
    """The run.json of the ranks, as far as their data depend on it."""
    return run.model_copy(update={"stage": "train", "fetched": fetched})


def _unknown(cause: str) -> TerminationReport:
    return _report(ExitCode.UNEXPECTED, cause)


def _report(code: ExitCode, cause: str, data: str | None = None) -> TerminationReport:
    return TerminationReport(
        exit_code=code, reason=code.name, cause=cause, data=data, host=socket.gethostname()
    )


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
