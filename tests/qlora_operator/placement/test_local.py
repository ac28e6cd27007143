"""Ranks on one machine: tier and CPUs."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.exit_codes import ExitCode
from qlora_contract.plan import Machine
from qlora_operator.api.types import Topology
from qlora_operator.placement.local import (
    PlacementError,
    choose_tier,
    cpu_list,
    launcher_cpus,
    rank_cpus,
    split,
)
from qlora_trainer import cpu


def a_machine(cpus: int = 8, quota: float | None = None, **more: Any) -> Machine:
    """A machine with AVX-512."""
    lacking = {"amx_bf16": ["amx_bf16", "amx_tile"], "avx512_bf16": ["avx512_bf16"]}
    fields = {"tiers": ["avx512", "avx2"], "lacking": lacking, "cpus": list(range(cpus)), "quota": quota}
    return Machine.model_validate(fields | more)


def a_topology(**fields: Any) -> Topology:
    """A topology of one pod, unless told otherwise."""
    return Topology.model_validate({"memoryPerRank": "1Gi", **fields})


@pytest.mark.parametrize(
    ("allowed", "chosen"),
    [
        pytest.param(["amx_bf16", "avx512", "avx2"], "avx512", id="the first that is met"),
        pytest.param(["avx2", "avx512"], "avx2", id="the order is the user's"),
    ],
)
def test_the_first_allowed_tier_is_taken(allowed: list[Any], chosen: str) -> None:
    """The tier is the first allowed one that the machine meets."""
    assert choose_tier(allowed, a_machine()) == chosen


def test_a_machine_below_every_allowed_tier_is_refused() -> None:
    """The sentence names what the machine has, what it lacks and what to change."""
    with pytest.raises(PlacementError) as refused:
        choose_tier(["amx_bf16", "avx512_bf16"], a_machine())

    assert refused.value.code == ExitCode.ISA_BELOW_TIER
    assert str(refused.value) == (
        "this machine has avx512, and spec.isa.allowed has only amx_bf16, avx512_bf16: it lacks avx512_bf16 for "
        "avx512_bf16; add avx512 to spec.isa.allowed, or take another machine"
    )


def test_a_machine_without_any_tier_is_refused() -> None:
    """Where there is not even AVX2, no change of the job can help."""
    with pytest.raises(PlacementError, match=r"no ISA tier at all.*an x86-64 processor with AVX2 is needed"):
        choose_tier(["avx2"], a_machine(tiers=[], lacking={"avx2": ["avx2", "fma"]}))


@pytest.mark.parametrize(
    ("topology", "machine", "expected"),
    [
        pytest.param({"pods": 2, "cpusPerRank": 3}, {}, [[0, 1, 2], [3, 4, 5]], id="enough"),
        pytest.param({"pods": 2, "cpusPerRank": 1}, {"cpus": 4, "quota": 2.5}, [[0], [1]], id="a quota"),
        pytest.param(
            {"pods": 2, "cpusPerRank": 4, "pinning": "best-effort"},
            {"cpus": 4},
            [[0, 1], [2, 3]],
            id="too few: shared evenly",
        ),
        pytest.param(
            {"pods": 3, "cpusPerRank": 4, "pinning": "best-effort"},
            {"cpus": 2},
            [[0], [1], [0]],
            id="not one each: in turns",
        ),
        pytest.param(
            {"pods": 2, "cpusPerRank": 4, "pinning": "best-effort"},
            {"cpus": 8, "quota": 0.5},
            [[0], [0]],
            id="less than one CPU",
        ),
    ],
)
def test_launchers_get_slices(
    topology: dict[str, Any], machine: dict[str, Any], expected: list[list[int]]
) -> None:
    """Each launcher gets its share of the CPUs that can be at work at once."""
    assert launcher_cpus(a_topology(**topology), a_machine(**machine)) == expected


@pytest.mark.parametrize(
    "machine", [pytest.param({"cpus": 7}, id="CPUs"), pytest.param({"cpus": 64, "quota": 7.9}, id="quota")]
)
def test_too_few_cpus_are_refused_under_strict(machine: dict[str, Any]) -> None:
    """The sentence says how many there are, how many are needed, and what to change."""
    with pytest.raises(PlacementError) as refused:
        launcher_cpus(a_topology(pods=2, ranksPerPod=2, cpusPerRank=2), a_machine(**machine))

    assert refused.value.code == ExitCode.INVALID_CONFIGURATION
    assert str(refused.value) == (
        "2 pod(s) with 2 rank(s) of 2 CPU(s) need 8 CPUs, and 7 can be used here: lower "
        "spec.topology.cpusPerRank, ranksPerPod or pods, or set spec.topology.pinning to best-effort"
    )


sizes = st.integers(1, 9)


@given(there=st.integers(1, 40), pods=sizes, ranks=sizes, each=sizes)
def test_ranks_are_shown_as_their_launchers_will_bind_them(
    there: int, pods: int, ranks: int, each: int
) -> None:
    """The CPUs of each rank are those that the launcher's own code makes of its slice."""
    topology = a_topology(pods=pods, ranksPerPod=ranks, cpusPerRank=each, pinning="best-effort")
    machine = a_machine(there)
    bound = [
        part.cpus
        for slice_ in launcher_cpus(topology, machine)
        for part in cpu.assign_cpus(slice_, None, ranks, each, "best-effort", ours_alone=True)
    ]

    assert rank_cpus(topology, machine) == bound


@given(there=st.integers(1, 40), parts=sizes, each=sizes)
def test_slices_are_disjoint_unless_there_are_too_few(there: int, parts: int, each: int) -> None:
    """No CPU is given twice while there are as many as parts, and none gets more than it asked for."""
    slices = split(range(there), parts, each)
    given_out = [cpu_id for part in slices for cpu_id in part]

    assert len(slices) == parts
    assert all(1 <= len(part) <= each for part in slices)
    assert there < parts or len(given_out) == len(set(given_out))
    assert there < parts * each or len(given_out) == parts * each


@given(st.sets(st.integers(0, 200), min_size=1))
def test_cpu_lists_are_what_a_launcher_reads(cpus: set[int]) -> None:
    """A launcher reads back the CPUs that were written."""
    assert cpu.parse_cpu_list(cpu_list(sorted(cpus))) == sorted(cpus)
