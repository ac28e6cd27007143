"""Recorded machines: compact files, each written out as the sysfs tree that Linux shows for it.

model NAME
threads +112 | adjacent [CPUS] | none      which CPUs are hardware threads of one core
cache socket | 8                           who shares a last-level cache: a socket's cores, or so many in a row
node N [socket S] memory SIZE [bandwidth MB/s] [cpus LIST]
distance ...                               a row for each node
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_contract.cpus import format_cpu_list, parse_cpu_list
from qlora_trainer.host.numa import Machine, read_machine

FOLDER = Path(__file__).parent / "machines"
NAMES = sorted(path.stem for path in FOLDER.glob("*.txt"))


class Record:
    """A recorded machine."""

    def __init__(self, text: str) -> None:
        lines = [line.partition(" ") for line in text.splitlines() if line and not line.startswith("#")]
        self.model, self.threads, self.cache = (
            next(rest for key, _, rest in lines if key == name) for name in ("model", "threads", "cache")
        )
        self.distances = [rest for key, _, rest in lines if key == "distance"]
        words = [rest.split() for key, _, rest in lines if key == "node"]
        self.nodes = {int(row[0]): dict(zip(row[1::2], row[2::2], strict=True)) for row in words}
        self.cpus = {
            cpu: number
            for number, node in self.nodes.items()
            for cpu in (parse_cpu_list(node["cpus"]) if "cpus" in node else [])
        }

    def siblings(self, cpu: int) -> list[int]:
        """The CPUs of a CPU's core."""
        kind, _, which = self.threads.partition(" ")
        if kind == "none" or (which and cpu not in parse_cpu_list(which)):
            return [cpu]
        if kind == "adjacent":
            return [cpu // 2 * 2, cpu // 2 * 2 + 1]
        half = int(kind)
        return [cpu % half, cpu % half + half]

    def socket(self, cpu: int) -> int:
        """The socket of a CPU."""
        return int(self.nodes[self.cpus[cpu]]["socket"])

    def sharing(self, cpu: int) -> list[int]:
        """The CPUs that share a CPU's last-level cache."""
        if self.cache == "socket":
            return [other for other in sorted(self.cpus) if self.socket(other) == self.socket(cpu)]
        size, first = int(self.cache), self.siblings(cpu)[0]
        return [other for other in sorted(self.cpus) if self.siblings(other)[0] // size == first // size]

    def files(self) -> dict[str, str]:
        """The files under sys and proc, by path."""
        system = "sys/devices/system"
        files = {
            "proc/cpuinfo": f"processor\t: 0\nmodel name\t: {self.model}\n",
            f"{system}/cpu/online": format_cpu_list(self.cpus),
        }
        for cpu in self.cpus:
            here = f"{system}/cpu/cpu{cpu}"
            files[f"{here}/topology/physical_package_id"] = f"{self.socket(cpu)}\n"
            files[f"{here}/topology/thread_siblings_list"] = format_cpu_list(self.siblings(cpu)) + "\n"
            files[f"{here}/cache/index0/level"] = "1\n"
            files[f"{here}/cache/index0/shared_cpu_list"] = format_cpu_list(self.siblings(cpu)) + "\n"
            files[f"{here}/cache/index3/level"] = "3\n"
            files[f"{here}/cache/index3/shared_cpu_list"] = format_cpu_list(self.sharing(cpu)) + "\n"
        for (number, node), distance in zip(self.nodes.items(), self.distances, strict=True):
            here = f"{system}/node/node{number}"
            cpus = parse_cpu_list(node["cpus"]) if "cpus" in node else []
            files[f"{here}/cpulist"] = format_cpu_list(cpus) + "\n"
            files[f"{here}/distance"] = f"{distance}\n"
            memory = int(node["memory"].removesuffix("G")) << 20
            files[f"{here}/meminfo"] = (
                f"Node {number} MemTotal:       {memory} kB\nNode {number} MemFree: 1 kB\n"
            )
            if "bandwidth" in node:
                files[f"{here}/access0/initiators/read_bandwidth"] = f"{node['bandwidth']}\n"
        return files


def write(root: Path, files: dict[str, str]) -> Path:
    """Files below root, by relative path; returns root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Machine]:
    """Every recorded machine, as `read` finds it, by name."""
    root = tmp_path_factory.mktemp("machines")
    return {
        name: read_machine(write(root / name, Record((FOLDER / f"{name}.txt").read_text()).files()))
        for name in NAMES
    }


@pytest.fixture
def a_tree(tmp_path: Path) -> Callable[[dict[str, str]], Machine]:
    """make(files) -> the machine that such files describe."""
    return lambda files: read_machine(write(tmp_path, files))
