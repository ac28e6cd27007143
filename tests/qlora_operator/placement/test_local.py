"""Ranks on one machine: tier and CPUs."""

from typing import Any

import pytest
from hypothesis import strategies as st

from qlora_contract.exit_codes import ExitCode
from qlora_contract.plan import Machine
from qlora_operator.api.v1alpha1 import Topology
from qlora_operator.placement.local import (
    PlacementError,
    choose_tier,
    idle_cpus,
    launcher_cpus,
    less_promised,
    memory_shortage,
    on_this_machine,
    promises,
    without,
)


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


GIB = 2**30


@pytest.mark.parametrize(
    ("topology", "machine", "expected"),
    [
        pytest.param({}, {"cpus": 2}, (1, 2), id="all CPUs of a small machine"),
        pytest.param({}, {"cpus": 64, "clusters": 4}, (4, 16), id="a rank for each cluster"),
        pytest.param({"ranksPerPod": 2}, {"cpus": 64, "clusters": 4}, (2, 32), id="ranks as written"),
        pytest.param(
            {"ranksPerPod": "auto"}, {"cpus": 64, "clusters": 4}, ("auto", 64), id="auto as written"
        ),
        pytest.param({"cpusPerRank": 4}, {"cpus": 64, "clusters": 4}, (1, 4), id="CPUs as written"),
        pytest.param({"pods": 2}, {"cpus": 64, "clusters": 4}, (2, 16), id="clusters shared by pods"),
        pytest.param({"pods": 3}, {"cpus": 2}, (1, 1), id="fewer CPUs than pods"),
        pytest.param({}, {"cpus": 8, "quota": 2.5}, (1, 2), id="a quota"),
        pytest.param({}, {"cpus": 4096}, (1, 1024), id="as many as a rank may have"),
        pytest.param(
            {"memoryPerRank": "8Gi"},
            {"cpus": 64, "clusters": 8, "memory": 32 * GIB, "freeMemory": 25 * GIB},
            (3, 21),
            id="as many ranks as memory holds",
        ),
        pytest.param(
            {"memoryPerRank": "8Gi"}, {"cpus": 64, "clusters": 8, "memory": GIB}, (1, 64), id="one at least"
        ),
    ],
)
def test_what_is_left_out_is_what_the_machine_has(
    topology: dict[str, Any], machine: dict[str, Any], expected: tuple[Any, int]
) -> None:
    """Without cpusPerRank a job uses the machine; what the file says stays."""
    placed = on_this_machine(a_topology(**topology), a_machine(**machine))

    assert (placed.ranks_per_pod, placed.cpus_per_rank) == expected


@pytest.mark.parametrize(
    ("topology", "machine", "expected"),
    [
        pytest.param({}, {"clusters": 1}, (1, "32768Mi"), id="one cluster"),
        pytest.param({}, {"clusters": 2}, (2, "16384Mi"), id="a rank for each of two clusters"),
        pytest.param({}, {"clusters": 2, "freeMemory": 20 * GIB}, (2, "8192Mi"), id="what is free"),
        pytest.param({"ranksPerPod": 4}, {"clusters": 2}, (4, "8192Mi"), id="ranks as written"),
        pytest.param({"ranksPerPod": "auto"}, {"clusters": 2}, ("auto", "32768Mi"), id="auto: the pod's"),
        pytest.param({"pods": 2}, {"clusters": 4}, (2, "8192Mi"), id="several pods"),
        pytest.param({"cpusPerRank": 8, "ranksPerPod": 2}, {}, (2, "16384Mi"), id="CPUs as written"),
        pytest.param({}, {"memory": 200 * 2**20}, (1, "256Mi"), id="a step at least"),
        pytest.param({}, {"memory": None}, (1, "1Gi"), id="unknown"),
        pytest.param({"memoryPerRank": "30Gi"}, {"clusters": 2}, (1, "30Gi"), id="memory as written"),
    ],
)
def test_ranks_share_the_memory_of_a_job_that_asks_for_none(
    topology: dict[str, Any], machine: dict[str, Any], expected: tuple[Any, str]
) -> None:
    """Most of what is free, divided by as many ranks as the machine gets."""
    asked = a_topology(**topology)
    if "memoryPerRank" not in topology:
        asked.model_fields_set.discard("memory_per_rank")
    placed = on_this_machine(asked, a_machine(**{"cpus": 64, "memory": 40 * GIB} | machine))

    assert (placed.ranks_per_pod, placed.memory_per_rank) == expected
    assert memory_shortage(placed, a_machine(memory=400 * GIB)) is None


def test_cpus_of_other_jobs_are_not_taken() -> None:
    """Those that are free serve; and without pinning strict, when none is, the job shares."""
    busy = {0: "job other (process 17)", 1: "job other (process 17)"}

    assert launcher_cpus(a_topology(cpusPerRank=2), a_machine(cpus=4), busy) == [[2, 3]]
    shared = a_topology(cpusPerRank=4, pinning="best-effort")
    assert launcher_cpus(shared, a_machine(cpus=4), busy) == [[2, 3]]
    assert launcher_cpus(shared, a_machine(cpus=2), busy) == [[0, 1]]


def test_a_job_without_free_cpus_is_told_who_has_them() -> None:
    """The other job's name and process, and that waiting helps."""
    with pytest.raises(PlacementError) as refused:
        launcher_cpus(
            a_topology(cpusPerRank=2), a_machine(cpus=2), dict.fromkeys([0, 1], "job a (process 17)")
        )

    assert refused.value.code == ExitCode.INVALID_CONFIGURATION
    assert str(refused.value) == (
        "1 pod(s) with 1 rank(s) of 2 CPU(s) need 2 CPUs, and 0 can be used here (CPUs 0-1 are in use by job a "
        "(process 17)): wait until they are free, or set spec.topology.pinning to best-effort, which shares them"
    )


@pytest.mark.parametrize(
    ("topology", "machine", "busy", "expected"),
    [
        pytest.param({}, {"cpus": 2}, {}, [], id="none"),
        pytest.param(
            {"cpusPerRank": 4},
            {"cpus": 64},
            {},
            [
                "CPUs 4-63 stay idle: the job asks for 1 x 4 CPU(s); without spec.topology.cpusPerRank it uses all"
            ],
            id="fewer than there are",
        ),
        pytest.param(
            {"ranksPerPod": 2},
            {"cpus": 5},
            {},
            ["CPUs 4 stay idle: 5 CPUs cannot be shared evenly among 2"],
            id="a rest",
        ),
        pytest.param(
            {},
            {"cpus": 8, "quota": 2.5},
            {},
            ["CPUs 2-7 stay idle: a quota of 2.5 CPUs is all that can be used"],
            id="a quota",
        ),
        pytest.param({}, {"cpus": 4}, {0: "job a"}, ["CPUs 0 are in use by job a"], id="another job's"),
    ],
)
def test_idle_cpus_are_named_with_the_reason(
    topology: dict[str, Any], machine: dict[str, Any], busy: dict[int, str], expected: list[str]
) -> None:
    """Whoever pays for a machine learns which CPUs do nothing, and why."""
    here = a_machine(**machine)
    placed = on_this_machine(a_topology(**topology), without(here, busy))

    assert idle_cpus(placed, here, launcher_cpus(placed, here, busy), busy) == expected


@pytest.mark.parametrize(
    ("topology", "memory", "free", "expected"),
    [
        pytest.param({"memoryPerRank": "8Gi"}, 8 * GIB, 8 * GIB, None, id="enough"),
        pytest.param({"memoryPerRank": "8Gi"}, None, None, None, id="unknown"),
        pytest.param(
            {"memoryPerRank": "200Gi"},
            24 * GIB,
            20 * GIB,
            "1 rank(s) with spec.topology.memoryPerRank 200Gi may use 200 GiB, and this machine has 24.0 GiB: "
            "lower memoryPerRank (`qlora plan` shows what the job needs)",
            id="more than there is",
        ),
        pytest.param(
            {"memoryPerRank": "8Gi", "ranksPerPod": 2},
            24 * GIB,
            12 * GIB,
            "2 rank(s) with spec.topology.memoryPerRank 8Gi may use 16.0 GiB, and 12.0 GiB of this machine's "
            "memory are free: end what uses the rest, or lower memoryPerRank (`qlora plan` shows what the job needs) "
            "or the number of ranks",
            id="more than is free",
        ),
        pytest.param({"memoryPerRank": "8Gi", "ranksPerPod": "auto"}, 8 * GIB, 8 * GIB, None, id="a pod's"),
    ],
)
def test_memory_per_rank_is_held_against_the_machine(
    topology: dict[str, Any], memory: int | None, free: int | None, expected: str | None
) -> None:
    """All ranks together must find their memory here."""
    here = a_machine(memory=memory, freeMemory=free)

    assert memory_shortage(a_topology(**topology), here) == expected


def test_memory_that_others_may_yet_take_is_not_free() -> None:
    """A job that was started just before has not taken its own by now."""
    here, promised = a_machine(memory=24 * GIB, freeMemory=20 * GIB), {"job a (process 17)": 16 * GIB}

    assert memory_shortage(a_topology(memoryPerRank="4Gi"), here, promised) is None
    assert (
        "4.00 GiB of this machine's memory are free; job a (process 17) may take 16.0 GiB more memory: end"
        in (memory_shortage(a_topology(memoryPerRank="5Gi"), here, promised) or "")
    )
    assert less_promised(here, promised).free_memory == 4 * GIB
    assert less_promised(here, {"job a (process 17)": 40 * GIB}).free_memory == 0
    assert promises({"job a (process 17)": 0}) == []
