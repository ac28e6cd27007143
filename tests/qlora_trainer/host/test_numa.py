"""Recorded machines as they are read, and files that are missing or odd."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer.host.numa import Core, Machine, huge_pages, read_machine

FACTS = [
    ("sapphire_rapids_snc4", 2, {0: 14, 1: 14, 2: 14, 3: 14, 4: 14, 5: 14, 6: 14, 7: 14}, 2, 2),
    ("sapphire_rapids", 2, {0: 56, 1: 56}, 2, 2),
    ("emerald_rapids_snc2_no_smt", 2, {0: 32, 1: 32, 2: 32, 3: 32}, 1, 2),
    ("c7i_metal", 2, {0: 48, 1: 48}, 2, 2),
    ("xeon_max_flat_snc4", 2, dict.fromkeys(range(8), 12), 2, 2),
    ("xeon_max_flat_quad", 2, {0: 56, 1: 56}, 2, 2),
    ("xeon_max_cache_quad", 2, {0: 56, 1: 56}, 2, 2),
    ("xeon_max_only_snc4", 2, dict.fromkeys(range(8), 14), 2, 2),
    ("ice_lake", 2, {0: 36, 1: 36}, 2, 2),
    ("ice_lake_interleaved", 2, {0: 32, 1: 32}, 2, 2),
    ("epyc_milan_nps1", 2, {0: 64, 1: 64}, 2, 16),
    ("epyc_milan_nps4", 2, dict.fromkeys(range(8), 16), 2, 16),
    ("epyc_milan_one_socket_nps4", 1, dict.fromkeys(range(4), 6), 2, 8),
    ("epyc_naples_no_smt", 2, dict.fromkeys(range(8), 4), 1, 16),
    ("epyc_turin_no_smt", 2, {0: 32, 1: 32}, 1, 16),
    ("epyc_genoa_cache_nodes", 1, dict.fromkeys(range(12), 8), 2, 12),
    ("vm_m7i_8xlarge", 1, {0: 16}, 2, 1),
    ("vm_azure_d16s", 1, {0: 8}, 2, 1),
    ("vm_c3_176", 2, {0: 22, 1: 22, 2: 22, 3: 22}, 2, 2),
    ("vm_no_smt", 1, {0: 22}, 1, 1),
    ("workstation", 1, {0: 16}, 2, 1),
    ("hybrid_desktop", 1, {0: 16}, 2, 1),
    ("genoa_with_cxl", 1, {0: 48}, 2, 8),
    ("small_vm", 1, {0: 2}, 1, 1),
]


@pytest.mark.parametrize(
    ("name", "sockets", "cores", "threads", "caches"), [pytest.param(*row, id=row[0]) for row in FACTS]
)
def test_a_recorded_machine_is_read(
    machines: dict[str, Machine], name: str, sockets: int, cores: dict[int, int], threads: int, caches: int
) -> None:
    """Sockets, cores of each node, hardware threads of a core and last-level caches are those of the server."""
    machine = machines[name]

    assert len({core.socket for core in machine.cores}) == sockets
    assert Counter(core.node for core in machine.cores) == cores
    assert max(len(core.cpus) for core in machine.cores) == threads
    assert len({core.cache for core in machine.cores}) == caches


def test_every_recorded_machine_is_tested(machines: dict[str, Machine]) -> None:
    """No record goes unread, and none is missing."""
    assert sorted(machines) == sorted(row[0] for row in FACTS)


def test_memory_nodes_without_cpus_are_found(machines: dict[str, Machine]) -> None:
    """HBM in flat mode and CXL memory are nodes of memory alone, with sizes, distances and bandwidth."""
    flat, cxl = machines["xeon_max_flat_quad"], machines["genoa_with_cxl"]

    assert [node.number for node in flat.memory_only] == [2, 3]
    assert flat.memory_only[0].memory == 64 << 30
    assert flat.memory_only[0].distances == (13, 23, 10, 23)
    assert [(node.number, node.bandwidth) for node in cxl.memory_only] == [(1, 28000)]


def test_cores_of_a_share_hold_only_its_cpus(machines: dict[str, Machine]) -> None:
    """Hardware threads that somebody else has are left out, and neighbors stand side by side."""
    machine = machines["ice_lake_interleaved"]

    assert [core.cpus for core in machine.cores_of([66, 1, 0, 64, 2])] == [(0, 64), (2, 66), (1,)]
    assert machine.nodes_of([0, 1]) == (0, 1)


def test_cpus_that_the_machine_does_not_mention_are_cores(machines: dict[str, Machine]) -> None:
    """A CPU beyond what sysfs shows counts as a core of its own."""
    assert [core.cpus for core in machines["small_vm"].cores_of([1, 7])] == [(1,), (7,)]


CPU = "sys/devices/system/cpu"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        pytest.param({}, (), id="nothing at all"),
        pytest.param({f"{CPU}/online": "0-1"}, (Core((0,), cache=0), Core((1,), cache=1)), id="a bare list"),
        pytest.param({f"{CPU}/cpu3/uevent": ""}, (Core((3,), cache=3),), id="folders without a list"),
        pytest.param(
            {f"{CPU}/online": "0-1", f"{CPU}/cpu1/topology/physical_package_id": "1\n"},
            (Core((0,), cache=0), Core((1,), socket=1, node=1, cache=1)),
            id="no NUMA: a socket is a node",
        ),
        pytest.param(
            {f"{CPU}/online": "0", f"{CPU}/cpu0/topology/physical_package_id": "-1\n"},
            (Core((0,)),),
            id="a socket without a number",
        ),
        pytest.param(
            {
                f"{CPU}/online": "0-1",
                f"{CPU}/cpu0/topology/core_cpus_list": "0-1",
                f"{CPU}/cpu1/topology/core_cpus_list": "0-1",
            },
            (Core((0, 1)),),
            id="the newer name",
        ),
        pytest.param(
            {f"{CPU}/online": "0,2", f"{CPU}/cpu2/topology/thread_siblings_list": "0-1"},
            (Core((0,)), Core((2,), cache=2)),
            id="threads of somebody else",
        ),
        pytest.param(
            {f"{CPU}/online": "0", f"{CPU}/cpu0/topology/thread_siblings_list": "what?"},
            (Core((0,)),),
            id="not a list",
        ),
    ],
)
def test_what_a_kernel_leaves_out_is_taken_simply(
    a_tree: Callable[[dict[str, str]], Machine], files: dict[str, str], cores: tuple[Core, ...]
) -> None:
    """Without a file, a CPU is a core and a cache of its own, on socket and node 0."""
    assert a_tree(files).cores == cores


def test_a_core_whose_thread_is_offline_has_one(a_tree: Callable[[dict[str, str]], Machine]) -> None:
    """SMT switched off at run time: the second threads are not online."""
    files = {f"{CPU}/online": "0-1"} | {f"{CPU}/cpu{n}/topology/thread_siblings_list": f"{n}" for n in (0, 1)}

    assert [core.cpus for core in a_tree(files).cores] == [(0,), (1,)]


def test_malformed_numbers_are_unknown(a_tree: Callable[[dict[str, str]], Machine]) -> None:
    """Sizes, distances and bandwidths in another form are as if they were missing."""
    node = "sys/devices/system/node/node0"
    machine = a_tree(
        {f"{node}/meminfo": "Node 0 MemTotal: many kB", f"{node}/distance": "10 far", f"{node}/cpulist": "\n"}
    )

    assert [(node.memory, node.bandwidth, node.distances) for node in machine.nodes] == [(None, None, ())]
    assert machine.model == ""


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        pytest.param("always [madvise] never\n", "madvise", id="on request"),
        pytest.param("[always] madvise never\n", "always", id="always"),
        pytest.param("always madvise [never]\n", "never", id="never"),
        pytest.param("on\n", None, id="another form"),
        pytest.param(None, None, id="no such file"),
    ],
)
def test_huge_pages(tmp_path: Path, text: str | None, mode: str | None) -> None:
    """The mode in brackets is the one in force."""
    name = "sys/kernel/mm/transparent_hugepage/enabled"
    if text is not None:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)

    assert huge_pages(tmp_path) == mode


def test_this_machine_is_read() -> None:
    """Every CPU that this process may use is in some core, once."""
    cpus = [cpu for core in read_machine().cores for cpu in core.cpus]

    assert os.sched_getaffinity(0) <= set(cpus)
    assert len(cpus) == len(set(cpus))
