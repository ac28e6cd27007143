"""`qlora report`: a job's report.html, written anew from what its folder holds."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_contract import entry_points
from qlora_contract.cost import Price
from qlora_contract.env import PRICE_ENV
from qlora_operator.cli.processes import ProcessError, environment
from qlora_operator.errors import CommandError

REPORTER = (sys.executable, "-m", entry_points.REPORT)


def write(folder: Path, price: Price | None, command: Sequence[str] = REPORTER) -> str:
    """Write the report into the job's folder, and return its path.

    Args:
        folder: of the job.
        price: of a CPU's hour; None: no money is reported.
        command: of the program that writes it.

    Raises:
        CommandError: the folder holds no job that has made a step, or cannot be written to.
    """
    prices = {PRICE_ENV: "" if price is None else str(price)}
    try:
        done = subprocess.run(
            [*command, str(folder)],
            env=environment({}) | prices,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise ProcessError(f"{command[0]} could not be started: {error.strerror}") from error
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0:
        raise CommandError(lines[-1] if lines else f"the report program ended with {done.returncode}")
    return lines[-1]
