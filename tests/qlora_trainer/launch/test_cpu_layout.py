"""Layouts on recorded machines, and what holds for every one."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.cpus import format_cpu_list, parse_cpu_list
from qlora_trainer.host.numa import Core, Machine
from qlora_trainer.launch.cpu_layout import (
    JOIN_GAIN,
    AvailableCpus,
    CpuLayout,
    CpuRequest,
    LayoutError,
    compute_layout,
)

ALL = None
"""Every CPU of the machine."""


def laid_out(machine: Machine, cpus: str | None, asked: CpuRequest, **available: Any) -> CpuLayout:
    """The layout on these CPUs of a machine."""
    everything = sorted(cpu for core in machine.cores for cpu in core.cpus)
    chosen = tuple(parse_cpu_list(cpus) if cpus else everything)
    return compute_layout(machine, AvailableCpus(chosen, **available), asked)


def shown(found: CpuLayout) -> list[tuple[str, str]]:
    """CPUs and service CPUs of each rank, as lists."""
    return [
        (format_cpu_list(rank.cpus), format_cpu_list(rank.service_cpus) if rank.service_cpus else "")
        for rank in found.ranks
    ]


AUTO = CpuRequest("auto", 1024, "best-effort")
"""As many ranks as the CPUs suggest, of however many CPUs."""


@pytest.mark.parametrize(
    ("name", "cpus", "expected"),
    [
        pytest.param(
            "sapphire_rapids_snc4",
            ALL,
            [(f"{14 * n}-{14 * n + 13}", f"{112 + 14 * n}-{112 + 14 * n + 13}") for n in range(8)],
            id="eight clusters",
        ),
        pytest.param("sapphire_rapids", ALL, [("0-55", "112-167"), ("56-111", "168-223")], id="SNC off"),
        pytest.param(
            "emerald_rapids_snc2_no_smt",
            ALL,
            [("0-31", ""), ("32-63", ""), ("64-95", ""), ("96-127", "")],
            id="SMT off",
        ),
        pytest.param("xeon_max_flat_quad", ALL, [("0-55", "112-167"), ("56-111", "168-223")], id="HBM flat"),
        pytest.param("ice_lake", ALL, [("0-35", "72-107"), ("36-71", "108-143")], id="Ice Lake"),
        pytest.param("epyc_milan_nps1", ALL, [("0-63", "128-191"), ("64-127", "192-255")], id="EPYC NPS1"),
        pytest.param(
            "epyc_milan_nps4",
            ALL,
            [(f"{16 * n}-{16 * n + 15}", f"{128 + 16 * n}-{143 + 16 * n}") for n in range(8)],
            id="EPYC NPS4",
        ),
        pytest.param("vm_m7i_8xlarge", ALL, [("0-15", "16-31")], id="a virtual machine"),
        pytest.param(
            "vm_azure_d16s", ALL, [("0,2,4,6,8,10,12,14", "1,3,5,7,9,11,13,15")], id="neighbouring threads"
        ),
        pytest.param(
            "vm_c3_176",
            ALL,
            [("0-21", "88-109"), ("22-43", "110-131"), ("44-65", "132-153"), ("66-87", "154-175")],
            id="virtual nodes",
        ),
        pytest.param("vm_no_smt", ALL, [("0-21", "")], id="a virtual machine without SMT"),
        pytest.param("workstation", ALL, [("0-15", "16-31")], id="one socket"),
        pytest.param("small_vm", ALL, [("0-1", "")], id="two CPUs"),
        # Slices of a kubelet with static CPU management, which leaves CPU 0's core to the system.
        pytest.param(
            "sapphire_rapids_snc4",
            "1-111,113-223",
            [("1-13", "113-125")]
            + [(f"{14 * n}-{14 * n + 12}", f"{14 * n + 13},{14 * n + 125}") for n in range(1, 8)],
            id="a core reserved: thirteen in every cluster",
        ),
        pytest.param(
            "sapphire_rapids_snc4",
            "14-27,126-139,28-41,140-153",
            [("14-27", "126-139"), ("28-41", "140-153")],
            id="two whole clusters",
        ),
        pytest.param(
            "sapphire_rapids_snc4",
            "14-27,126-139,28-29,140-141",
            [("14-27", "126-139")],
            id="two cores of a neighbour are left out",
        ),
        pytest.param(
            "sapphire_rapids_snc4",
            "14-27,126-139,28-33,140-145",
            [("14-33", "126-145")],
            id="six cores of a neighbour are joined",
        ),
        pytest.param(
            "ice_lake", "1-16,36-39", [("1-16", "")], id="few cores of the other socket are left out"
        ),
        pytest.param("ice_lake", "1-10,36-41", [("1-10,36-41", "")], id="more of them are joined"),
        pytest.param("ice_lake", "1-10,36-43", [("1-8", "9-10"), ("36-43", "")], id="nearly even"),
        pytest.param(
            "ice_lake_interleaved", "2,4,66,68,3,5,67,69", [("2,4", "66,68"), ("3,5", "67,69")], id="by turns"
        ),
        pytest.param("epyc_milan_nps4", "8-15,136-143", [("8-15", "136-143")], id="half a node"),
        pytest.param("small_vm", "1", [("1", "")], id="one CPU"),
    ],
)
def test_auto_is_one_rank_per_cluster(
    machines: dict[str, Machine], name: str, cpus: str | None, expected: list[tuple[str, str]]
) -> None:
    """Each cluster of the CPUs is a rank of one thread per core; too small ones are joined or left out."""
    found = laid_out(machines[name], cpus, AUTO)

    assert shown(found) == expected
    assert [rank.threads for rank in found.ranks] == [len(rank.cpus) for rank in found.ranks]


def test_a_cluster_that_is_left_out_is_named(machines: dict[str, Machine]) -> None:
    """Its CPUs are unused, and the reason says which node."""
    found = laid_out(machines["sapphire_rapids_snc4"], "14-27,28-29", AUTO)

    assert found.unused == (28, 29)
    assert found.notes == ("NUMA node(s) 2 are left out: all ranks would wait for one on their few cores",)


@pytest.mark.parametrize(
    ("name", "cpus", "ranks", "each", "expected"),
    [
        pytest.param("small_vm", ALL, 2, 1, [("0", ""), ("1", "")], id="two CPUs"),
        pytest.param("vm_no_smt", "0-3", 2, 2, [("0-1", ""), ("2-3", "")], id="exact"),
        pytest.param(
            "vm_m7i_8xlarge",
            "0-3,16-19",
            2,
            4,
            [("0-1", "16-17"), ("2-3", "18-19")],
            id="SMT: a thread a core",
        ),
        pytest.param(
            "vm_azure_d16s", "2-9", 2, 4, [("2,4", "3,5"), ("6,8", "7,9")], id="neighbouring threads"
        ),
        pytest.param(
            "vm_m7i_8xlarge", "0-3", 2, 2, [("0-1", ""), ("2-3", "")], id="second threads are not ours"
        ),
        pytest.param(
            "vm_m7i_8xlarge",
            "0-2,16-18",
            2,
            3,
            [("0", "2,18"), ("1", "17")],
            id="a core that does not divide",
        ),
        pytest.param(
            "sapphire_rapids_snc4",
            "0-27,112-139",
            4,
            14,
            [("0-6", "112-118"), ("7-13", "119-125"), ("14-20", "126-132"), ("21-27", "133-139")],
            id="two a cluster",
        ),
        pytest.param(
            "sapphire_rapids_snc4",
            "0-27",
            4,
            7,
            [("0-6", ""), ("7-13", ""), ("14-20", ""), ("21-27", "")],
            id="exactly",
        ),
        pytest.param(
            "ice_lake",
            "0-5,36-41",
            3,
            4,
            [("0-3", ""), ("4-5,40-41", ""), ("36-39", "")],
            id="one spans the sockets",
        ),
        pytest.param("epyc_milan_nps1", "0-15", 2, 6, None, id="shared"),
        pytest.param(
            "epyc_milan_nps1",
            "0-15,64-79",
            4,
            8,
            [("0-7", ""), ("8-15", ""), ("64-71", ""), ("72-79", "")],
            id="a die each",
        ),
        pytest.param("epyc_turin_no_smt", "0-7", 2, 4, [("0-3", ""), ("4-7", "")], id="small dies"),
        pytest.param(
            "hybrid_desktop",
            "12-23",
            2,
            6,
            [("12,14,16-18", "13,15"), ("19-23", "")],
            id="cores of two kinds",
        ),
    ],
)
def test_a_given_number_of_ranks(
    machines: dict[str, Machine],
    name: str,
    cpus: str | None,
    ranks: int,
    each: int,
    expected: list[tuple[str, str]] | None,
) -> None:
    """Ranks get equal numbers of whole cores, near each other; CPUs beyond those asked for are others' too."""
    found = laid_out(machines[name], cpus, CpuRequest(ranks, ranks * each))

    assert found.pinned == (expected is not None)
    assert len({rank.threads for rank in found.ranks}) == 1
    if expected is not None:
        assert shown(found) == expected
        assert all(rank.threads == len(rank.cpus) for rank in found.ranks)


def test_ranks_are_spread_over_nodes_and_caches(machines: dict[str, Machine]) -> None:
    """With cores to spare, ranks of four use four dies of both sockets rather than one die."""
    found = laid_out(machines["epyc_milan_nps1"], ALL, CpuRequest(4, 16), exclusive=True)

    assert [format_cpu_list(rank.cpus) for rank in found.ranks] == ["0-3", "8-11", "64-67", "72-75"]
    assert [rank.nodes for rank in found.ranks] == [(0,), (0,), (1,), (1,)]


CPUS = list(range(8))


@pytest.mark.parametrize(
    ("cpus", "quota", "pinning", "ours", "expected"),
    [
        pytest.param(CPUS[:4], None, "strict", False, [([0, 1], 2), ([2, 3], 2)], id="exclusive cpus"),
        pytest.param(CPUS[:4], 4.0, "strict", False, [([0, 1], 2), ([2, 3], 2)], id="exclusive with quota"),
        pytest.param(CPUS, 4.0, "strict", False, [(CPUS, 2), (CPUS, 2)], id="quota of a shared node"),
        pytest.param(CPUS, None, "strict", False, [(CPUS, 2), (CPUS, 2)], id="shared node, no quota"),
        pytest.param(CPUS, None, "strict", True, [([0, 1], 2), ([2, 3], 2)], id="chosen for us"),
        pytest.param(CPUS, 1.5, "best-effort", True, [(CPUS, 1), (CPUS, 1)], id="quota below the ranks"),
        pytest.param([0, 1, 2], None, "best-effort", True, [([0], 1), ([1], 1)], id="too few"),
        pytest.param([5], None, "best-effort", True, [([5], 1), ([5], 1)], id="by turns"),
    ],
)
def test_ranks_are_pinned_only_to_cpus_that_nobody_else_uses(
    machines: dict[str, Machine],
    cpus: list[int],
    quota: float | None,
    pinning: Any,
    ours: bool,
    expected: list[tuple[list[int], int]],
) -> None:
    """Two ranks of two CPUs are pinned to cores of exclusive CPUs, and not pinned on shared ones."""
    available = AvailableCpus(tuple(cpus), quota, exclusive=ours)
    found = compute_layout(machines["vm_no_smt"], available, CpuRequest(2, 4, pinning))

    assert [(list(rank.cpus), rank.threads) for rank in found.ranks] == expected


@pytest.mark.parametrize(
    ("quota", "cpus", "threads"),
    [
        pytest.param(8.0, 1024, 8, id="a quota"),
        pytest.param(3.5, 1024, 3, id="part of a CPU is no thread"),
        pytest.param(0.5, 1024, 1, id="at least one"),
        pytest.param(24.0, 1024, 16, id="no more than cores"),
        pytest.param(None, 8, 8, id="more CPUs than the pod asked for"),
    ],
)
def test_auto_on_shared_cpus_is_one_rank(
    machines: dict[str, Machine], quota: float | None, cpus: int, threads: int
) -> None:
    """Without CPUs of its own a pod has no cluster: one rank, not pinned, has the quota's threads, as a note says."""
    found = laid_out(machines["vm_m7i_8xlarge"], ALL, CpuRequest("auto", cpus, "best-effort"), quota=quota)

    assert [(len(rank.cpus), rank.threads) for rank in found.ranks] == [(32, threads)]
    assert "cpuManagerPolicy static; ranksPerPod auto is one rank here" in found.notes[0]


def test_ranks_that_are_not_pinned_do_not_use_the_second_threads_of_cores(
    machines: dict[str, Machine],
) -> None:
    """Eight CPUs are four cores: two ranks of four CPUs compute with two threads each."""
    found = laid_out(machines["vm_m7i_8xlarge"], "0-3,16-19", CpuRequest(2, 6))

    assert [rank.threads for rank in found.ranks] == [2, 2]


def test_more_ranks_than_cores_take_hardware_threads(machines: dict[str, Machine]) -> None:
    """Under best-effort, cores come first, then their second threads, then turns."""
    found = laid_out(machines["vm_m7i_8xlarge"], "0-1,16-17", CpuRequest(5, 5, "best-effort"))

    assert [rank.cpus for rank in found.ranks] == [(0,), (1,), (16,), (17,), (0,)]
    assert found.notes == ("5 ranks share 2 core(s)",)


@pytest.mark.parametrize(
    ("cpus", "available", "asked", "says"),
    [
        pytest.param(
            "0-2",
            {},
            CpuRequest(2, 8),
            "need 8 CPUs, but only 3 can be used here: .*cpusPerRank .*best-effort",
            id="CPUs",
        ),
        pytest.param(
            "0-7", {"quota": 3.5}, CpuRequest(2, 4), "need 4 CPUs, but only 3 can be used here", id="quota"
        ),
        pytest.param(
            "0-7",
            {},
            CpuRequest("auto", 9),
            "the pod asks for 9 CPUs, but only 8 can be used here: lower topology.cpusPerRank",
            id="auto",
        ),
        pytest.param(
            "0-1,16-17",
            {},
            CpuRequest(4, 4),
            "CPUs 0-1,16-17 are the hardware threads of only 2 core",
            id="cores",
        ),
        pytest.param(
            "0-3",
            {},
            CpuRequest(1, 4, "strict", "hbm"),
            "no high-bandwidth memory.*to any, or topology.pinning",
            id="memory",
        ),
    ],
)
def test_strict_pinning_refuses(
    machines: dict[str, Machine], cpus: str, available: dict[str, Any], asked: CpuRequest, says: str
) -> None:
    """What cannot be had is refused with what is there, what is needed, and what to change."""
    with pytest.raises(LayoutError, match=says):
        laid_out(machines["vm_m7i_8xlarge"], cpus, asked, **available)


def test_no_cpu_is_refused() -> None:
    """Even under best-effort a rank needs a CPU."""
    with pytest.raises(LayoutError, match="at least one is needed"):
        compute_layout(Machine(()), AvailableCpus(()), CpuRequest(1, 1, "best-effort"))


@pytest.mark.parametrize(
    ("name", "memory", "may_set_policy", "expected"),
    [
        pytest.param("xeon_max_flat_snc4", tuple(range(16)), True, list(range(8, 16)), id="flat"),
        pytest.param("xeon_max_flat_snc4", tuple(range(8, 16)), False, [None] * 8, id="HBM is all we have"),
        pytest.param("xeon_max_flat_quad", None, True, [2, 3], id="flat, SNC off"),
        pytest.param("xeon_max_cache_quad", None, False, [None] * 2, id="cache"),
        pytest.param("xeon_max_only_snc4", None, False, [None] * 8, id="HBM only"),
    ],
)
def test_hbm_is_near_the_rank(
    machines: dict[str, Machine],
    name: str,
    memory: tuple[int, ...] | None,
    may_set_policy: bool,
    expected: list[int | None],
) -> None:
    """In flat mode each rank prefers its own cluster's HBM; the other modes need nothing."""
    asked = CpuRequest("auto", 1, memory_tier="hbm")
    found = laid_out(
        machines[name],
        ALL,
        asked,
        exclusive=True,
        memory_nodes=memory,
        may_set_memory_policy=may_set_policy,
    )

    assert [rank.memory_node for rank in found.ranks] == expected
    assert found.notes == ()


def test_hbm_that_cannot_be_had_is_said_under_best_effort(machines: dict[str, Machine]) -> None:
    """The ranks run on DDR, and the layout says why."""
    found = laid_out(machines["xeon_max_flat_snc4"], ALL, CpuRequest("auto", 1024, "best-effort", "hbm"))

    assert {rank.memory_node for rank in found.ranks} == {None}
    assert "as NUMA node(s) 8-15 without CPUs, which only a memory policy" in found.notes[0]


def test_lines_tell_each_rank(machines: dict[str, Machine]) -> None:
    """Threads, CPUs, nodes, service CPUs, memory, what is unused, and notes."""
    asked = CpuRequest("auto", 1, memory_tier="hbm")
    found = laid_out(
        machines["xeon_max_flat_snc4"],
        "0-11,96-107,12-13",
        asked,
        exclusive=True,
        may_set_memory_policy=True,
    )

    assert found.lines() == [
        "local rank 0: 12 thread(s) on CPUs 0-11, NUMA node(s) 0, service threads on CPUs 96-107, memory of node 8",
        "unused: CPUs 12-13",
        "NUMA node(s) 1 are left out: all ranks would wait for one on their few cores",
    ]
    unpinned = laid_out(machines["vm_no_smt"], ALL, CpuRequest(1, 2))
    assert unpinned.lines()[0] == "local rank 0: 2 thread(s) on any of CPUs 0-21, NUMA node(s) 0"


# --- what always holds


def disjoint(sets: Sequence[Sequence[int]]) -> bool:
    """Whether no number is in two of them."""
    return len(set().union(*sets)) == sum(map(len, sets))


@st.composite
def small_machines(draw: st.DrawFn) -> tuple[Machine, tuple[int, ...]]:
    """A machine of one to three sockets, uneven nodes, caches and cores, and some of its CPUs, in a container."""
    sockets = draw(st.integers(1, 3))
    per_socket = draw(st.integers(1, 3))
    cores, cpu = [], 0
    for node in range(sockets * per_socket):
        for _ in range(draw(st.integers(1, 6))):
            threads = draw(st.integers(1, 2))
            cores.append(Core(tuple(range(cpu, cpu + threads)), node // per_socket, node, cpu // 3))
            cpu += threads
    cpus = draw(st.sets(st.integers(0, cpu - 1), min_size=1))
    return Machine(
        tuple(sorted(cores, key=lambda core: (core.socket, core.node, core.cache, core.cpus)))
    ), tuple(sorted(cpus))


requests = st.one_of(
    st.builds(CpuRequest, st.just("auto"), st.integers(1, 40), st.sampled_from(["strict", "best-effort"])),
    st.builds(
        lambda ranks, each, pinning: CpuRequest(ranks, ranks * each, pinning),
        st.integers(1, 8),
        st.integers(1, 8),
        st.sampled_from(["strict", "best-effort"]),
    ),
)


@given(small_machines(), requests, st.one_of(st.none(), st.floats(0.5, 40)), st.booleans())
def test_what_always_holds(
    machine_and_cpus: tuple[Machine, tuple[int, ...]], asked: CpuRequest, quota: float | None, ours: bool
) -> None:
    """Ranks stay on their CPUs, meet on a core only when cores ran out, are equal, and every core is accounted for."""
    machine, cpus = machine_and_cpus
    available = AvailableCpus(cpus, quota, ours)
    try:
        found = compute_layout(machine, available, asked)
    except LayoutError:
        assert asked.pinning == "strict"
        return
    cores = machine.cores_of(cpus)

    assert compute_layout(machine, available, asked) == found
    assert len({rank.threads for rank in found.ranks}) == 1
    assert set().union(
        *(rank.cpus for rank in found.ranks), *(rank.service_cpus for rank in found.ranks)
    ) <= set(cpus)
    if not found.pinned:
        assert all(rank.cpus == cpus and rank.threads <= max(1, available.usable) for rank in found.ranks)
        return
    oversubscribed = asked.ranks != "auto" and len(cores) < asked.ranks
    assert not oversubscribed or asked.pinning == "best-effort"
    if not oversubscribed:
        holds(found, cores)
    if asked.ranks != "auto":
        assert len(found.ranks) == asked.ranks
        assert all(rank.threads <= asked.cpus // len(found.ranks) for rank in found.ranks)


def holds(found: CpuLayout, cores: Sequence[Core]) -> None:
    """Every core computes for one rank, serves one, or is listed as unused."""
    core_of = {cpu: core.cpus for core in cores for cpu in core.cpus}
    used = [{core_of[cpu] for cpu in rank.cpus + rank.service_cpus} for rank in found.ranks]

    assert all(rank.threads == len(rank.cpus) == len({core_of[c] for c in rank.cpus}) for rank in found.ranks)
    assert disjoint([sorted(cores) for cores in used])  # type: ignore[arg-type]
    assert disjoint([rank.cpus for rank in found.ranks] + [rank.service_cpus for rank in found.ranks])
    assert set().union(*used) | {core_of[cpu] for cpu in found.unused} == set(core_of.values())


@given(small_machines())
def test_auto_keeps_most_cores_busy(machine_and_cpus: tuple[Machine, tuple[int, ...]]) -> None:
    """No fewer cores compute than in the largest cluster, nor than JOIN_GAIN allows of all."""
    machine, cpus = machine_and_cpus
    found = compute_layout(machine, AvailableCpus(cpus), AUTO)
    cores = machine.cores_of(cpus)
    busy = sum(rank.threads for rank in found.ranks)

    assert busy >= max(sum(core.node == node for core in cores) for node in {core.node for core in cores})
    assert len(cores) <= JOIN_GAIN * busy


def test_the_whole_of_every_recorded_machine_is_used(machines: dict[str, Machine]) -> None:
    """Given all of a server, `auto` leaves no core and no node out."""
    for name, machine in machines.items():
        found = laid_out(machine, ALL, AUTO)

        assert (name, found.unused, found.notes) == (name, (), ())
        assert sum(rank.threads for rank in found.ranks) == len(machine.cores)


def test_slices_of_recorded_machines(machines: dict[str, Machine]) -> None:
    """Whole cores as a kubelet gives them, of every size and without the first: what always holds, holds there."""
    for machine in machines.values():
        cores = machine.cores[1:]
        for size in range(1, len(cores) + 1, 3):
            cpus = tuple(sorted(cpu for core in cores[:size] for cpu in core.cpus))
            holds(compute_layout(machine, AvailableCpus(cpus), AUTO), cores[:size])
            if size > 1:
                asked = CpuRequest(2, len(cpus) // 2 * 2)
                holds(compute_layout(machine, AvailableCpus(cpus, exclusive=True), asked), cores[:size])
