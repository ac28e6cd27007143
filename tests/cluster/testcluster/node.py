"""One node: what tells it from the other, and running programs in it.

A node's programs run in a mount namespace of their own. There, the folders
that container software takes for granted (/var/lib/kubelet, /run/containerd
and so on) are the node's, so that both nodes run with the usual paths; what
they mount is unmounted by the kernel when the last of them ends.
"""

import contextlib
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from testcluster import cgroups
from testcluster.errors import ClusterError

FOLDERS = {
    "kubelet": "/var/lib/kubelet",
    "containerd": "/var/lib/containerd",
    "cni": "/var/lib/cni",
    "pod-logs": "/var/log/pods",
    "container-logs": "/var/log/containers",
    "run": "/run/containerd",
}
"""Folders of a node, and where its programs see them."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster."""

    name: str
    address: str
    """Its InternalIP."""
    subnet: str
    """The addresses of its pods."""
    bridge: str
    """The network interface that its pods are behind."""
    cpu: int
    """The one CPU that its pods may own."""
    folder: Path
    """Its files; removed with the cluster."""
    containerd_root: Path
    """Images and their unpacked layers; kept from one cluster to the next."""

    @property
    def group(self) -> str:
        """The control group of its pods."""
        return self.name

    def service_group(self, service: str) -> str:
        """The control group of one of its programs."""
        return f"{self.name}-{service}"

    @property
    def groups(self) -> tuple[str, ...]:
        """All its control groups."""
        return (self.group, self.service_group("containerd"), self.service_group("kubelet"))

    def log(self, service: str) -> Path:
        """What a program of it printed."""
        return self.folder / f"{service}.log"

    def boot(self, command: list[str]) -> None:
        """Start its containerd, in a new mount namespace."""
        binds = []
        for name, where in FOLDERS.items():
            source = self.containerd_root if name == "containerd" else self.folder / name
            source.mkdir(parents=True, exist_ok=True)
            binds.append(f"mount --bind {shlex.quote(str(source))} {where}")
        script = f"{' && '.join(binds)} && exec {shlex.join(command)}"
        # slave: what the machine mounts later is seen, what the node mounts stays its own.
        inside = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script]
        spawn(inside, self.service_group("containerd"), self.log("containerd"))

    def start(self, service: str, command: list[str]) -> None:
        """Start another program in the node."""
        spawn([*self._enter(), *command], self.service_group(service), self.log(service))

    def run(self, command: list[str], *, stdin: Path = Path("/dev/null")) -> str:
        """What a command prints that runs in the node; raises ClusterError when it fails."""
        with stdin.open("rb") as source:
            whole = [*self._enter(), *command]
            done = subprocess.run(whole, stdin=source, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ClusterError(f"on {self.name}, {shlex.join(command)} failed: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def runs(self, service: str) -> bool:
        """Whether a program of it runs."""
        return bool(cgroups.pids(self.service_group(service)))

    def _enter(self) -> list[str]:
        """A prefix that enters the mount namespace of its containerd."""
        for pid in cgroups.pids(self.service_group("containerd")):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "containerd":
                    return ["nsenter", f"--mount=/proc/{pid}/ns/mnt", "--"]
        raise ClusterError(
            f"{self.name} is stopped: its containerd does not run (log: {self.log('containerd')})"
        )


def spawn(command: list[str], group: str, log: Path) -> None:
    """Start a program that outlives this one, in a control group and with a log file."""
    cgroups.make(group)
    enter = "; ".join(f"echo $$ > {shlex.quote(file)}" for file in cgroups.entry_files(group))
    # The shell enters the group, and leaves an orphan in it: init reaps that, whoever kills it.
    script = f"{enter}; {shlex.join(command)} &"
    with log.open("ab") as output:
        subprocess.run(
            ["sh", "-ec", script],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=True,
            start_new_session=True,
        )
