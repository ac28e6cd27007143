"""High-bandwidth memory on recorded machines, and memory policies of this kernel."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qlora_contract import supervision
from qlora_trainer.host import hbm
from qlora_trainer.host.hbm import choose_hbm, hbm_mode, hbm_nodes
from qlora_trainer.host.numa import Core, Machine, Node
from qlora_trainer.launch import supervisor
from qlora_trainer.launch.cpu_layout import CpuAssignment

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("name", "mode", "nodes"),
    [
        pytest.param("xeon_max_flat_snc4", "flat", list(range(8, 16)), id="flat, SNC4"),
        pytest.param("xeon_max_flat_quad", "flat", [2, 3], id="flat"),
        pytest.param("xeon_max_cache_quad", "cache", [], id="cache"),
        pytest.param("xeon_max_only_snc4", "only", [], id="HBM only"),
        pytest.param("sapphire_rapids_snc4", None, [], id="no HBM"),
        pytest.param("genoa_with_cxl", None, [], id="CXL is not HBM"),
    ],
)
def test_modes_of_hbm(machines: dict[str, Machine], name: str, mode: str | None, nodes: list[int]) -> None:
    """The mode follows from the processor's name, its nodes without CPUs and its memory."""
    assert hbm_mode(machines[name]) == mode
    assert [node.number for node in hbm_nodes(machines[name])] == nodes


def test_hbm_of_another_processor_is_recognized_by_its_bandwidth() -> None:
    """Where the firmware gives bandwidths, memory faster than that of the nodes with CPUs is HBM."""
    nodes = (Node(0, 1 << 38, 250_000), Node(1, 1 << 36, 800_000), Node(2, 1 << 38, 60_000), Node(3, 0))
    machine = Machine((Core((0,)),), nodes)

    assert [node.number for node in hbm_nodes(machine)] == [1]


@pytest.mark.parametrize(
    ("name", "allowed", "may_set_policy", "says"),
    [
        pytest.param("ice_lake", None, True, "this machine has no high-bandwidth memory", id="none"),
        pytest.param(
            "xeon_max_flat_quad", (0, 1), True, "may use memory of node\\(s\\) 0-1 only", id="cpuset"
        ),
        pytest.param("xeon_max_flat_quad", None, False, "set_mempolicy is refused here", id="seccomp"),
    ],
)
def test_why_hbm_cannot_be_had(
    machines: dict[str, Machine], name: str, allowed: tuple[int, ...] | None, may_set_policy: bool, says: str
) -> None:
    """The reason names what stands in the way, and no node is chosen."""
    chosen, problem = choose_hbm(machines[name], [(0,), (1,)], allowed, may_set_policy=may_set_policy)

    assert chosen == [None, None]
    assert re.search(says, problem)


def test_the_nearest_hbm_that_is_allowed_is_chosen(machines: dict[str, Machine]) -> None:
    """A rank on socket 1 takes HBM of its own cluster if it may, else of its socket."""
    machine = machines["xeon_max_flat_snc4"]

    assert choose_hbm(machine, [(5,)], None, may_set_policy=True) == ([13], "")
    assert choose_hbm(machine, [(5,)], (0, 5, 9, 14), may_set_policy=True) == ([14], "")


# --- this kernel

permitted = pytest.mark.skipif(
    not hbm.may_set_memory_policy(), reason="this process may not set a memory policy, as in most containers"
)


def in_a_process(code: str) -> str:
    """What a program prints; policies and filters last for a process."""
    program = "from qlora_trainer.host import hbm\n" + textwrap.dedent(code)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout


REFUSE_SET_MEMPOLICY = """
    import ctypes, struct
    # Allow every system call but 238, which gives EPERM, as containers' default profiles do.
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 238), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    fprog = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(program))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, fprog, 0, 0) == 0
"""


def test_a_refused_policy_is_seen_before_it_is_needed() -> None:
    """Under a profile that forbids it, the question says no, and setting one says why."""
    output = in_a_process(
        REFUSE_SET_MEMPOLICY
        + """
    print(hbm.may_set_memory_policy())
    try:
        hbm.prefer_memory_of(0)
    except PermissionError as error:
        print(error)
    """
    )

    assert output.splitlines() == [
        "False",
        "[Errno 1] memory of NUMA node 0 cannot be preferred: Operation not permitted",
    ]


GET_POLICY = """
    import ctypes
    mode, words = ctypes.c_int(), (ctypes.c_ulong * 16)()
    assert ctypes.CDLL(None).syscall(239, ctypes.byref(mode), words, 1024, None, 0) == 0
    policy = f"{mode.value} {words[0]}"
"""
"""Mode and node mask: 1 is MPOL_PREFERRED."""


@permitted
def test_a_preference_is_what_the_kernel_keeps() -> None:
    """After prefer_memory_of(0), get_mempolicy shows MPOL_PREFERRED and node 0."""
    show = GET_POLICY + "    print(policy)\n"

    assert in_a_process(show) == "0 0\n"
    assert in_a_process("    hbm.prefer_memory_of(0)\n" + show) == "1 1\n"


@permitted
def test_asking_leaves_a_policy_as_it_is() -> None:
    """What was set before, as by numactl, still holds."""
    asked = (
        "    hbm.prefer_memory_of(0)\n    assert hbm.may_set_memory_policy()\n"
        + GET_POLICY
        + "    print(policy)\n"
    )

    assert in_a_process(asked) == "1 1\n"


@permitted
def test_a_rank_starts_with_its_memory_preferred(tmp_path: Path) -> None:
    """The policy of its assignment holds in a rank before its first line."""
    assignment = CpuAssignment((min(os.sched_getaffinity(0)),), 1, memory_node=0)
    program = tmp_path / "rank.py"
    program.write_text(textwrap.dedent(GET_POLICY) + f"open({str(tmp_path / 'policy')!r}, 'w').write(policy)")
    ranks = supervisor.start_ranks([sys.executable, str(program)], [{"RANK": "0"}], [assignment], tmp_path)
    supervisor.watch(ranks, supervision.Limits(60, 60), supervisor.Stop())

    assert (tmp_path / "policy").read_text() == "1 1"


@permitted
@pytest.mark.parametrize("node", [63, 64, 1000])
def test_a_node_that_is_not_there_is_refused(node: int) -> None:
    """With the number, whatever its size."""
    with pytest.raises(OSError, match=f"memory of NUMA node {node} cannot be preferred"):
        hbm.prefer_memory_of(node)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        pytest.param("Name:\tx\nMems_allowed_list:\t0-7,9\n", (0, 1, 2, 3, 4, 5, 6, 7, 9), id="listed"),
        pytest.param("Name:\tx\n", None, id="not listed"),
        pytest.param("Mems_allowed_list:\t\n", None, id="empty"),
        pytest.param(None, None, id="no file"),
    ],
)
def test_nodes_whose_memory_is_allowed(
    tmp_path: Path, text: str | None, nodes: tuple[int, ...] | None
) -> None:
    """The kernel's own list, where there is one."""
    if text is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/status").write_text(text)

    assert hbm.allowed_memory_nodes(tmp_path) == nodes
