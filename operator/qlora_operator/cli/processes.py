"""Starts the launchers of `qlora run` on this machine, one for each pod of the job."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_contract import entry_points
from qlora_contract.cost import Price
from qlora_contract.cpus import format_cpu_list
from qlora_contract.env import (
    COMPLETION_INDEX_ENV,
    CPUS_ENV,
    PARENT_DEATH_ENV,
    PRICE_ENV,
    PROGRESS_PORT_ENV,
    RUN_CONFIG_ENV,
    TERMINATION_LOG_ENV,
    VOLUMES_ENV,
)
from qlora_contract.job_folder import RUN_CONFIG
from qlora_contract.run_config import RunConfig
from qlora_operator.cli import job_folder
from qlora_operator.errors import CommandError

LAUNCHER = (sys.executable, "-m", entry_points.LAUNCH)
TRANSFER = (sys.executable, "-m", entry_points.TRANSFER)


class ProcessError(CommandError):
    """A program of ours could not be started, or did not answer."""


@dataclass
class Launcher:
    """A launcher's process, and the files it writes."""

    index: int
    process: subprocess.Popen[bytes]
    log: Path
    report: Path
    ended_by_us: bool = False
    """We ended it because its time was up, so its exit code does not name a cause."""

    @property
    def is_running(self) -> bool:
        """Whether it still runs; if not, its exit code is known from now on."""
        return self.process.poll() is None


OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""What else is set for a process that reads models: none is looked for on the network."""


def environment(volumes: Mapping[str, Path]) -> dict[str, str]:
    """Our own environment, and the directories of claims. The working directory is not imported from."""
    paths = {claim: str(path) for claim, path in volumes.items()}
    return {**os.environ, VOLUMES_ENV: json.dumps(paths), "PYTHONSAFEPATH": "1"}


def start(
    run: RunConfig,
    folder: Path,
    cpus: Sequence[Sequence[int]],
    volumes: Mapping[str, Path],
    locks: Sequence[int],
    progress_port: int,
    command: Sequence[str] = LAUNCHER,
    price: Price | None = None,
) -> list[Launcher]:
    """Write run.json and start one launcher for each pod.

    Each is in a session of its own, so that the terminal sends Ctrl-C to us alone.

    Args:
        run: what to do.
        folder: the job's, locked.
        cpus: of each launcher.
        volumes: claim -> directory.
        locks: descriptors of the locks on the folder and on the CPUs, which the launchers inherit.
        progress_port: where rank 0 serves its progress.
        command: the launcher's command line.
        price: of a CPU's hour.

    Raises:
        ProcessError: one of them could not be started; none is left running.
        WorkspaceError: the folder cannot be written to.
    """
    logs = job_folder.prepare(folder, run)
    common = environment(volumes) | {
        RUN_CONFIG_ENV: str(folder / RUN_CONFIG),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        PARENT_DEATH_ENV: str(os.getpid()),
        PRICE_ENV: "" if price is None else str(price),
    }
    launchers: list[Launcher] = []
    try:
        for index, part in enumerate(cpus):
            report = job_folder.termination_file(folder, index)
            log = logs / f"launcher-{index}.log"
            own = {
                COMPLETION_INDEX_ENV: str(index),
                CPUS_ENV: format_cpu_list(part),
                TERMINATION_LOG_ENV: str(report),
                PROGRESS_PORT_ENV: str(progress_port) if index == 0 else "0",  # only rank 0 serves
            }
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    env=common | own,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=locks,
                )
            launchers.append(Launcher(index, process, log, report))
    except OSError as error:
        kill(launchers)
        raise ProcessError(f"launcher {len(launchers)} could not be started: {error}") from error
    return launchers


def free_port() -> int:
    """A port of the loopback interface that is free, and is given to nobody else while this process lives.

    It stays bound: ranks take seconds to listen there, and who allows it, as servers do, may all the same.
    """
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    port = int(probe.getsockname()[1])
    probe.detach()
    return port


def kill(launchers: Sequence[Launcher]) -> None:
    """SIGKILL those that still run; their ranks die with them."""
    for launcher in launchers:
        if launcher.is_running:
            launcher.ended_by_us = True
            launcher.process.kill()
            launcher.process.wait()
