"""Which tiers a cluster's nodes can give a job, and why none."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.run_config import ISA_TIERS, IsaTier, RunStage
from qlora_operator.api.names import TIER_LABELS
from qlora_operator.api.v1alpha1 import QLoRAJob, Toleration
from qlora_operator.placement.nodes import Demand, Node, Taint, demand, feasible, node, transfer_demand
from qlora_operator.settings import TransferSettings

GIB = 2**30
DEDICATED = Taint("dedicated", "NoSchedule", "infra")


def labels_of(tier: IsaTier) -> dict[str, str]:
    """What Node Feature Discovery gives to a node of a tier: the labels of the lesser ones, too."""
    lesser = ISA_TIERS[ISA_TIERS.index(tier) :]
    return {label: "true" for each in lesser for label in TIER_LABELS[each]}


def a_node(tier: IsaTier = "avx512", **fields: Any) -> Node:
    """A node of a tier with 16 CPUs and 64 GiB."""
    known = {"name": "n", "labels": labels_of(tier), "cpus": 16, "memory": 64 * GIB, "pods": 110}
    return Node(**{**known, **fields})


def a_demand(**fields: Any) -> Demand:
    """Two pods of 4 CPUs and 16 GiB, on any tier."""
    known: dict[str, Any] = {"pods": 2, "cpus": 4, "memory": 16 * GIB, "node_selector": {}, "tolerations": ()}
    return Demand(**{**known, "tiers": ISA_TIERS, **fields})


def a_toleration(**fields: Any) -> Toleration:
    """As a user writes it."""
    return Toleration.model_validate(fields)


RAW: dict[str, Any] = {
    "metadata": {"name": "xeon-1", "labels": {"a": "b"}},
    "spec": {
        "unschedulable": True,
        "taints": [
            {"key": "dedicated", "value": "infra", "effect": "NoSchedule"},
            {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule", "timeAdded": "x"},
        ],
    },
    "status": {
        "allocatable": {"cpu": "3920m", "memory": "15842332Ki", "pods": "110", "ephemeral-storage": "1"},
        "capacity": {"cpu": "4", "memory": "16Gi", "pods": "250"},
        "conditions": [
            {"type": "MemoryPressure", "status": "False"},
            {"type": "Ready", "status": "True"},
        ],
    },
}


def test_a_node_is_read_from_the_api_server_s_json() -> None:
    """Allocatable amounts count, in whole CPUs and bytes."""
    assert node(RAW) == Node(
        name="xeon-1",
        labels={"a": "b"},
        cpus=3,
        memory=15842332 * 1024,
        pods=110,
        taints=(DEDICATED, Taint("node.kubernetes.io/unschedulable", "NoSchedule")),
        ready=True,
        schedulable=False,
    )


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param({"metadata": {"name": "new"}}, id="nothing but a name"),
        pytest.param({"metadata": {"name": "new", "labels": None}, "spec": None, "status": {}}, id="nulls"),
        pytest.param(
            {
                "metadata": {"name": "new"},
                "spec": {"taints": None},
                "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]},
            },
            id="its kubelet is silent",
        ),
    ],
)
def test_a_node_that_has_told_nothing_has_nothing(raw: dict[str, Any]) -> None:
    """A node that has just joined, or whose kubelet is silent, is not ready and has no room."""
    assert node(raw) == Node(name="new", labels={}, cpus=0, memory=0, pods=0, ready=False)


def test_a_demand_is_what_a_pod_requests(a_job: Callable[..., QLoRAJob]) -> None:
    """All ranks of a pod, and its own folders in memory."""
    job = a_job(
        topology={"pods": 3, "ranksPerPod": 2, "cpusPerRank": 4, "memoryPerRank": "16Gi"},
        isa={"allowed": ["avx2", "amx_bf16"]},
        scheduling={"nodeSelector": {"disk": "ssd"}, "tolerations": [{"operator": "Exists"}]},
    )

    assert demand(job, job.spec.scheduling) == Demand(
        pods=3,
        cpus=8,
        memory=32 * GIB + (256 + 2 * 64) * 2**20,
        node_selector={"disk": "ssd"},
        tolerations=(a_toleration(operator="Exists"),),
        tiers=("avx2", "amx_bf16"),
    )


@pytest.mark.parametrize(
    ("stage", "account", "gibibytes"),
    [("fetch", None, 4), ("fetch", "transfers", 2), ("publish", None, 2)],
    ids=["a fetch, and who looks at the data", "a fetch with an identity", "a publication"],
)
def test_a_transfer_demands_what_its_containers_request(
    stage: RunStage, account: str | None, gibibytes: int, a_job: Callable[..., QLoRAJob]
) -> None:
    """One pod, whatever the ranks are. It has a CPU, which may be all of a node's, however many containers share it."""
    job = a_job(topology={"pods": 3, "memoryPerRank": "16Gi"})
    wanted = transfer_demand(job, job.spec.scheduling, TransferSettings(service_account_name=account), stage)

    assert (wanted.pods, wanted.cpus, wanted.memory) == (1, 1, gibibytes * GIB)


@pytest.mark.parametrize(
    ("nodes", "wanted", "tiers"),
    [
        pytest.param([a_node("avx512")], {}, ("avx512", "avx2"), id="lesser tiers are there too"),
        pytest.param(
            [a_node("amx_bf16")], {"tiers": ("avx2", "amx_bf16")}, ("avx2", "amx_bf16"), id="the user's order"
        ),
        pytest.param(
            [a_node("amx_bf16", cpus=4), a_node("avx2", cpus=4)],
            {},
            ("avx2",),
            id="all pods of an attempt have one tier",
        ),
        pytest.param([a_node(), a_node()], {"cpus": 16}, ("avx512", "avx2"), id="one pod on each node"),
        pytest.param([a_node()], {"cpus": 8, "memory": 32 * GIB}, ("avx512", "avx2"), id="a node filled"),
        pytest.param([a_node()], {"node_selector": {}, "pods": 4}, ("avx512", "avx2"), id="four on a node"),
        pytest.param(
            [a_node(taints=(Taint("busy", "PreferNoSchedule"),))], {}, ("avx512", "avx2"), id="a mild taint"
        ),
        pytest.param(
            [a_node(labels=labels_of("avx2") | {"disk": "ssd"})],
            {"node_selector": {"disk": "ssd"}},
            ("avx2",),
            id="selected",
        ),
    ],
)
def test_tiers_are_those_that_the_whole_gang_fits_on(
    nodes: list[Node], wanted: dict[str, Any], tiers: tuple[str, ...]
) -> None:
    """All pods fit on nodes of the tier, several on one if it has the room."""
    found = feasible(nodes, a_demand(**wanted))

    assert (found.tiers, found.why) == (tiers, "")


@pytest.mark.parametrize(
    ("nodes", "wanted", "why"),
    [
        pytest.param(
            [
                *7 * [a_node("avx512")],
                *3 * [a_node("amx_bf16", memory=95 * GIB)],
                *2 * [a_node("amx_bf16", memory=128 * GIB, schedulable=False)],
            ],
            {"tiers": ("amx_bf16",), "memory": 96 * GIB},
            "0/12 nodes can take a rank pod: 7 lack AMXBF16, 3 have less than 96Gi of memory, 2 are cordoned",
            id="several reasons",
        ),
        pytest.param(
            [a_node(cpus=8), a_node(cpus=4), a_node(cpus=3), a_node(ready=False)],
            {"pods": 4},
            "3 pods fit on 2/4 nodes, 4 are needed: 1 has fewer than 4 CPUs, 1 is not ready",
            id="too few",
        ),
        pytest.param([a_node(cpus=4)], {}, "1 pod fits on 1/1 nodes, 2 are needed", id="too few, all fit"),
        pytest.param(
            [a_node(memory=16 * GIB)],
            {"memory": 16 * GIB + 320 * 2**20},
            "0/1 nodes can take a rank pod: 1 has less than 16.31Gi of memory",
            id="a part of a gibibyte",
        ),
        pytest.param(
            [a_node(cpus=0)], {"cpus": 1}, "0/1 nodes can take a rank pod: 1 has no whole CPU", id="no CPU"
        ),
        pytest.param(
            [a_node(pods=0)], {}, "0/1 nodes can take a rank pod: 1 has no room for pods", id="pods"
        ),
        pytest.param([a_node(pods=1)], {}, "1 pod fits on 1/1 nodes, 2 are needed", id="one place for pods"),
        pytest.param(
            [a_node(), a_node(labels=labels_of("avx2") | {"disk": "hdd"})],
            {"node_selector": {"disk": "ssd"}},
            "0/2 nodes can take a rank pod: 2 lack the label disk=ssd",
            id="not selected",
        ),
        pytest.param(
            [
                a_node(taints=(DEDICATED,)),
                *2 * [a_node(taints=(Taint("gpu", "NoExecute"), DEDICATED))],
                a_node(taints=(Taint("arch", "NoSchedule", "arm"),)),
            ],
            {},
            "0/4 nodes can take a rank pod: 2 have the taint gpu:NoExecute, "
            "1 has the taint arch=arm:NoSchedule, 1 has the taint dedicated=infra:NoSchedule",
            id="taints, the commonest first",
        ),
        pytest.param(
            [a_node("avx2", taints=(DEDICATED,), cpus=1, ready=False, schedulable=False)],
            {"tiers": ("avx512",)},
            "0/1 nodes can take a rank pod: 1 has the taint dedicated=infra:NoSchedule",
            id="counted once, what lasts first",
        ),
        pytest.param(
            [a_node(ready=False, taints=(Taint("node.kubernetes.io/not-ready", "NoExecute"),))],
            {},
            "0/1 nodes can take a rank pod: 1 is not ready",
            id="not ready, with the taint that says so",
        ),
        pytest.param(
            [a_node("avx2")],
            {"tiers": ("avx512", "amx_bf16")},
            "0/1 nodes can take a rank pod: 1 lacks AVX512F",
            id="the easiest tier, not the last",
        ),
        pytest.param(
            [a_node(labels={f"{TIER_LABELS['avx2'][0]}": "false"})],
            {},
            "0/1 nodes can take a rank pod: 1 lacks AVX2",
            id="a label that says no",
        ),
        pytest.param(
            [a_node(labels={"a": "b"})],
            {},
            "0/1 nodes can take a rank pod: 1 lacks AVX2; no node has labels "
            "feature.node.kubernetes.io/cpu-cpuid.*: install Node Feature Discovery, or label the nodes yourself",
            id="no labels at all",
        ),
        pytest.param([], {}, "the cluster has no nodes", id="no nodes"),
        pytest.param(
            [a_node(taints=(Taint(f"k{i}", "NoSchedule"),)) for i in range(10, 22)],
            {},
            "0/12 nodes can take a rank pod: "
            + "".join(f"1 has the taint {key}:NoSchedule, " for key in [f"k{i}" for i in range(10, 18)])
            + "4 cannot for other reasons",
            id="too many reasons",
        ),
    ],
)
def test_the_sentence_counts_each_node_once(nodes: list[Node], wanted: dict[str, Any], why: str) -> None:
    """Where no tier has enough nodes, each node stands under the first thing that keeps the job from it."""
    found = feasible(nodes, a_demand(**wanted))

    assert found.tiers == ()
    assert found.why == why


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        pytest.param({"key": "dedicated", "value": "infra", "effect": "NoSchedule"}, True, id="the same"),
        pytest.param({"key": "dedicated", "value": "infra"}, True, id="any effect"),
        pytest.param({"key": "dedicated", "operator": "Exists"}, True, id="any value"),
        pytest.param({"operator": "Exists"}, True, id="everything"),
        pytest.param({"operator": "Exists", "effect": "NoSchedule"}, True, id="everything of the effect"),
        pytest.param({"operator": "Exists", "effect": "NoExecute"}, False, id="another effect"),
        pytest.param({"key": "dedicated", "value": "gpu"}, False, id="another value"),
        pytest.param({"key": "dedicated"}, False, id="no value"),
        pytest.param({"key": "other", "operator": "Exists"}, False, id="another key"),
    ],
)
def test_tolerations_mean_what_they_mean_in_pods(toleration: dict[str, Any], tolerated: bool) -> None:
    """Unset key and effect match all; Exists matches every value."""
    found = feasible(
        [a_node(taints=(DEDICATED,))], a_demand(tolerations=(a_toleration(**toleration),), tiers=("avx2",))
    )

    assert bool(found.tiers) is tolerated


def test_every_taint_must_be_tolerated() -> None:
    """One that is not keeps the job away, and is the one that is named."""
    tolerations = (a_toleration(key="dedicated", operator="Exists"),)
    found = feasible(
        [a_node(taints=(DEDICATED, Taint("gpu", "NoSchedule")))], a_demand(tolerations=tolerations)
    )

    assert found.why == "0/1 nodes can take a rank pod: 1 has the taint gpu:NoSchedule"


def test_a_job_that_tolerates_a_cordon_may_go_to_a_cordoned_node() -> None:
    """The scheduler places it there, so it does not wait."""
    cordon = {"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}
    found = feasible([a_node(schedulable=False)], a_demand(tolerations=(a_toleration(**cordon),)))

    assert found.tiers == ("avx512", "avx2")


@pytest.mark.parametrize(
    ("tiers", "nodes", "found", "why"),
    [
        pytest.param(
            ISA_TIERS, [a_node("amx_bf16")], ("amx_bf16", "avx512_bf16"), "", id="native tiers only"
        ),
        pytest.param(
            ISA_TIERS,
            [a_node("avx512")],
            (),
            "0/1 nodes can take a rank pod: 1 lacks AVX512BF16; only amx_bf16 or avx512_bf16 will do, since the "
            "job has begun in bf16",
            id="none left",
        ),
        pytest.param(
            ("avx512",),
            [a_node("amx_bf16")],
            ("avx512_bf16",),
            "",
            id="none allowed, but there are better nodes",
        ),
        pytest.param(
            ("avx512",),
            [a_node("avx512")],
            (),
            "0/1 nodes can take a rank pod: 1 lacks AVX512BF16; only avx512_bf16 will do, since the job has begun "
            "in bf16",
            id="none allowed, and none there",
        ),
    ],
)
def test_a_job_that_began_in_bf16_goes_on_where_it_is_native(
    tiers: Any, nodes: list[Node], found: tuple[str, ...], why: str
) -> None:
    """Tiers that would emulate bf16 are left out, and the sentence says so."""
    feasibility = feasible(nodes, a_demand(tiers=tiers), native_bf16_only=True)

    assert (feasibility.tiers, feasibility.why) == (found, why)


def test_each_tier_tells_how_many_pods_it_has_room_for() -> None:
    """Also where they are too few: a job may make do with them."""
    nodes = [a_node("amx_bf16", name="a"), a_node("avx512", name="b")]
    found = feasible(nodes, a_demand(pods=9))

    assert found.tiers == ()
    assert list(found.pods) == list(ISA_TIERS)
    assert found.pods["avx2"] == found.pods["avx512"] == 2 * found.pods["amx_bf16"] > 0


def test_equal_nodes_are_the_nodes_of_every_tier() -> None:
    """A node of a better tier has the labels of the lesser ones, so a lesser tier finds no other room there."""
    found = feasible([a_node("amx_bf16", name=name) for name in "ab"], a_demand())

    assert found.tiers == ISA_TIERS
    assert set(found.nodes.values()) == {frozenset("ab")}


def test_a_lesser_tier_has_the_nodes_of_the_better_ones_and_its_own() -> None:
    """Of those that fit: a node that is too small is no room, whatever its processor."""
    nodes = [a_node("amx_bf16", name="a"), a_node("avx512", name="b"), a_node("avx2", name="c", cpus=1)]
    found = feasible(nodes, a_demand())

    assert found.nodes == {
        "amx_bf16": frozenset("a"),
        "avx512_bf16": frozenset("a"),
        "avx512": frozenset("ab"),
        "avx2": frozenset("ab"),
    }


some_nodes = st.lists(
    st.builds(
        a_node,
        st.sampled_from(ISA_TIERS),
        cpus=st.integers(0, 12),
        memory=st.integers(0, 64).map(lambda gib: gib * GIB),
        pods=st.integers(0, 3),
        taints=st.sampled_from([(), (DEDICATED,), (Taint("a", "NoExecute"),), (Taint("b", "NoExecute"),)]),
        ready=st.booleans(),
        schedulable=st.booleans(),
    ),
    max_size=12,
)


def placed(nodes: Sequence[Node], wanted: Demand, tier: IsaTier) -> int:
    """Pods that fit, put one by one where there is room, as a scheduler would."""
    count = 0
    for each in nodes:
        cpus, memory, pods = each.cpus, each.memory, each.pods
        usable = each.ready and each.schedulable and not each.taints
        usable = usable and all(each.labels.get(label) == "true" for label in TIER_LABELS[tier])
        while usable and cpus >= wanted.cpus and memory >= wanted.memory and pods:
            cpus, memory, pods, count = cpus - wanted.cpus, memory - wanted.memory, pods - 1, count + 1
    return count


@given(some_nodes, st.integers(1, 6))
def test_a_tier_is_feasible_just_when_its_pods_can_be_put_on_nodes(nodes: list[Node], pods: int) -> None:
    """Counting room agrees with placing pods, and there is a sentence just when there is no tier."""
    wanted = a_demand(pods=pods)
    found = feasible(nodes, wanted)

    assert found.tiers == tuple(tier for tier in ISA_TIERS if placed(nodes, wanted, tier) >= pods)
    assert bool(found.why) is not bool(found.tiers)


@given(some_nodes, st.randoms(use_true_random=False))
def test_the_order_of_the_nodes_changes_nothing(nodes: list[Node], random: Any) -> None:
    """The sentence is the same however the API server lists the nodes, so an unchanged status stays unwritten."""
    shuffled = list(nodes)
    random.shuffle(shuffled)

    assert feasible(shuffled, a_demand()) == feasible(nodes, a_demand())
