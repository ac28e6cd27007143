"""Ranks on one machine: tier and CPUs."""

from typing import Any

import pytest
from hypothesis import strategies as st

from qlora_contract.exit_codes import ExitCode
from qlora_contract.plan import Machine
from qlora_operator.api.v1alpha1 import Topology
from qlora_operator.placement.local import PlacementError, choose_tier, launcher_cpus


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
        pytest.param(
            {"pods": 2, "ranksPerPod": "auto", "cpusPerRank": 2},
            {"cpus": 5},
            [[0, 1], [2, 3]],
            id="auto: a pod's CPUs are what the job says",
        ),
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


def test_too_few_cpus_for_ranks_that_launchers_settle() -> None:
    """The sentence does not name a number of ranks that nobody gave."""
    with pytest.raises(PlacementError) as refused:
        launcher_cpus(a_topology(pods=2, ranksPerPod="auto", cpusPerRank=4), a_machine(cpus=7))

    assert str(refused.value) == (
        "2 pod(s) with 4 CPU(s) need 8 CPUs, and 7 can be used here: lower "
        "spec.topology.cpusPerRank or pods, or set spec.topology.pinning to best-effort"
    )


sizes = st.integers(1, 9)
