"""The processes of a cluster, recorded in its folder so that any later process can end them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from testcluster.errors import ClusterError

_WRAPPER = Path(__file__).with_name("exec_with_parent.py")


def with_parent(command: list[str]) -> list[str]:
    """The command that starts this one and is killed when the thread that starts it ends, however it does."""
    return [sys.executable, "-I", "-S", str(_WRAPPER), str(os.getpid()), *command]


class Processes:
    """Starts programs with a log each, and records them in `state.json`.

    With `detached`, they outlive this process; else the kernel kills them when
    the thread that started them ends, however it does.
    """

    def __init__(self, folder: Path, *, detached: bool = False) -> None:
        self.folder = folder
        self.detached = detached
        self._commands: dict[str, list[str]] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    @property
    def pids(self) -> dict[str, int]:
        """The process id of each program that was started and not ended."""
        return {name: child.pid for name, child in self._children.items()}

    def start(self, name: str, command: list[str] | None = None) -> None:
        """Start the program; without a command, as it was started before."""
        command = command or self._commands[name]
        self._commands[name] = command
        with self.log(name).open("ab") as log:
            self._children[name] = subprocess.Popen(
                command if self.detached else with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for pytest, which ends them in its own order
            )
        self._record()

    def end(self, name: str) -> None:
        """Kill the program and wait until it is gone."""
        child = self._children.pop(name)
        child.kill()
        child.wait()
        self._record()

    def end_all(self) -> None:
        """Kill every program at once and wait until all are gone."""
        for child in self._children.values():
            child.kill()
        for name in list(self._children):
            self.end(name)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send the program a signal."""
        self._children[name].send_signal(number)

    def check(self) -> None:
        """Raise ClusterError, with the end of its log, when a program has ended by itself."""
        for name, child in self._children.items():
            if child.poll() is not None:
                end = self.log(name).read_text(errors="replace")[-2000:]
                raise ClusterError(
                    f"{name} ended with {child.returncode}; the end of {self.log(name)}:\n{end}"
                )

    def let_go(self) -> None:
        """Forget the programs without ending them; `end_recorded` still finds them."""
        for child in self._children.values():
            child.returncode = 0  # else its destructor warns that it runs
        self._children.clear()

    def log(self, name: str) -> Path:
        """The file with what the program printed."""
        return self.folder / "logs" / f"{name}.log"

    def _record(self) -> None:
        """Write pids with start times, since a pid alone may be another process by now."""
        state = {name: {"pid": pid, "started": started(pid)} for name, pid in self.pids.items()}
        partial = self.folder / "state.json.partial"
        partial.write_text(json.dumps({"processes": state}, indent=1))
        partial.replace(self.folder / "state.json")


def recorded(folder: Path) -> dict[str, int]:
    """The pids in the folder's state.json of processes that still run, by name."""
    state = folder / "state.json"
    if not state.is_file():
        return {}
    processes = json.loads(state.read_text())["processes"]
    return {
        name: entry["pid"]
        for name, entry in processes.items()
        if entry["started"] is not None and started(entry["pid"]) == entry["started"]
    }


def end_recorded(folder: Path) -> None:
    """Kill the processes of the folder's state.json that still run, and wait until they are gone."""
    pids = recorded(folder)
    for pid in pids.values():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended by itself meanwhile
    deadline = time.monotonic() + 10
    while left := recorded(folder):
        if time.monotonic() > deadline:
            raise ClusterError(f"these processes do not end though they were killed: {left}")
        time.sleep(0.02)


def started(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
