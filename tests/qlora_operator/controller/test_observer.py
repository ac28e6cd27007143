"""What a decision asks for besides what the watches tell."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import builders
from qlora_contract.run_config import IsaTier
from qlora_operator.api.names import TIER_LABELS
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.controller.node_cache import NodeSnapshot
from qlora_operator.controller.observer import asked_about, feasibility, lost_nodes, newest_first
from qlora_operator.placement.nodes import node
from qlora_operator.settings import Settings, TransferSettings
from qlora_operator.status.observation import AttemptJob, Pod, WarningEvent

JOB = AttemptJob("job-a0", "job-uid", 0, controlled=True)
POD = Pod("p", "pod-uid", 0, 0, "Running", owner_uid="job-uid", node="n")
PENDING = Pod("q", "pending", 0, 0, "Pending", owner_uid="job-uid")


def snapshot(**ready: bool) -> NodeSnapshot:
    """Nodes of tier avx512 by their names."""
    labels = dict.fromkeys(TIER_LABELS["avx512"], "true")
    allocatable = {"cpu": "64", "memory": "512Gi", "pods": "10"}
    return NodeSnapshot(
        [
            node(
                {
                    "metadata": {"name": name, "labels": labels},
                    "status": {
                        "allocatable": allocatable,
                        "conditions": [{"type": "Ready", "status": str(is_ready)}],
                    },
                }
            )
            for name, is_ready in ready.items()
        ]
    )


def warning(reason: str, uid: str, **times: Any) -> dict[str, Any]:
    """An Event."""
    metadata = {"creationTimestamp": times.pop("created", None)}
    return {"reason": reason, "message": "m", "involvedObject": {"uid": uid}, "metadata": metadata, **times}


def test_warnings_are_sorted_by_whichever_time_they_have() -> None:
    """Newest first."""
    events = [
        warning("Oldest", "pod-uid", created="2026-01-31T12:00:00Z"),
        warning("Series", "pod-uid", series={"lastObservedTime": "2026-01-31T12:00:03Z"}, eventTime="2026"),
        warning("Last", "job-uid", lastTimestamp="2026-01-31T12:00:02Z", created="2026-01-31T13:00:00Z"),
        warning("Event", "pod-uid", eventTime="2026-01-31T12:00:01.000001Z"),
    ]

    found = newest_first(events)

    assert [(each.reason, each.about) for each in found] == [
        ("Series", "pod-uid"),
        ("Last", "job-uid"),
        ("Event", "pod-uid"),
        ("Oldest", "pod-uid"),
    ]
    assert isinstance(found[0], WarningEvent)


@pytest.mark.parametrize(
    ("job", "pods", "uids"),
    [
        pytest.param(None, [POD], [], id="no Job"),
        pytest.param(JOB, [], ["job-uid"], id="a Job without pods"),
        pytest.param(JOB, [PENDING], ["pending"], id="a pod that does not say why"),
        pytest.param(JOB, [replace(PENDING, unschedulable="no room")], [], id="a pod that does"),
        pytest.param(JOB, [POD], [], id="a pod that runs"),
        pytest.param(
            JOB, [replace(PENDING, owner_uid="other")], ["job-uid"], id="a pod that somebody else has made"
        ),
        pytest.param(
            replace(JOB, parallelism=512),
            [replace(PENDING, uid=str(index), index=index) for index in range(512)],
            ["0", "1", "2"],
            id="many pods",
        ),
    ],
)
def test_warnings_are_read_of_what_says_nothing_itself(
    job: AttemptJob | None, pods: list[Pod], uids: list[str]
) -> None:
    """Each costs a request, and a namespace may be full of Events about anything."""
    assert asked_about(job, pods) == uids


@pytest.mark.parametrize(
    ("nodes", "lost"),
    [
        (snapshot(n=True), set()),
        (snapshot(n=False), {"n"}),
        (snapshot(other=True), {"n"}),
        (snapshot(), set()),
        (None, set()),
    ],
    ids=["ready", "not ready", "gone", "no nodes at all", "not permitted to list them"],
)
def test_a_lost_node_is_not_ready_or_gone(nodes: NodeSnapshot | None, lost: set[str]) -> None:
    """Of the nodes that the pods are on."""
    assert lost_nodes([POD, Pod("q", "q", 0, 1, "Pending")], nodes) == lost


SMALL_ROOM = Settings(
    trainer_image="registry.example/trainer:1",
    transfer=TransferSettings(cpu="500m", memory="1Gi"),
)
REMOTE = {"model": {"source": "hf://org/model"}, "output": {"destination": "s3://bucket/adapters"}}
FETCHED = {"modelRevision": "c0ffee"}
TRAINED = {"provenance": FETCHED, "adapter": {"uri": "pvc://team/work/jobs/job/adapter"}}


def small_nodes(tier: IsaTier | None) -> NodeSnapshot:
    """Two nodes of one CPU, which no rank pod fits on."""
    labels = dict.fromkeys(TIER_LABELS[tier], "true") if tier else {}
    allocatable = {"cpu": "1", "memory": "4Gi", "pods": "10"}
    ready = [{"type": "Ready", "status": "True"}]
    status = {"allocatable": allocatable, "conditions": ready}
    return NodeSnapshot([node({"metadata": {"name": n, "labels": labels}, "status": status}) for n in "ab"])


@pytest.mark.parametrize(
    ("status", "tier", "tiers"),
    [
        pytest.param({}, "avx512", True, id="sources are fetched where ranks may run"),
        pytest.param({}, None, False, id="and nowhere else"),
        pytest.param({"provenance": FETCHED}, "avx512", False, id="ranks need all of their room"),
        pytest.param(TRAINED, None, True, id="the adapter is sent from any node"),
    ],
)
def test_a_transfer_waits_for_its_own_room_only(
    status: dict[str, Any], tier: IsaTier | None, *, tiers: bool
) -> None:
    """One pod of the administrator's size, whatever the ranks need."""
    topology = {"pods": 4, "cpusPerRank": 8, "memoryPerRank": "8Gi"}
    job = builders.a_job(status=status, topology=topology, **REMOTE)

    found = feasibility(job, small_nodes(tier), SMALL_ROOM)

    assert bool(found.tiers) == tiers
    assert bool(found.why) is not bool(found.tiers)


@pytest.mark.parametrize(("memory", "tiers"), [("64Mi", ("avx512",)), ("8Gi", ())])
def test_an_export_waits_for_the_room_of_one_rank(memory: str, tiers: tuple[str, ...]) -> None:
    """On the tier of the ranks; that of all four pods may be taken by then."""
    topology = {"pods": 4, "ranksPerPod": 2, "cpusPerRank": 1, "memoryPerRank": memory}
    output = {"formats": ["merged"]}
    job = builders.a_job(
        status=TRAINED, topology=topology, isa={"allowed": ["avx512"]}, **{**REMOTE, "output": output}
    )

    assert feasibility(job, small_nodes("avx512"), SMALL_ROOM).tiers == tiers


def test_sources_are_fetched_on_the_tier_of_the_ranks() -> None:
    """The claim may be bound there: not on a better tier that has room for a small pod only."""
    big, small = snapshot(a=True, b=True), small_nodes("amx_bf16")
    job = builders.a_job(topology={"pods": 2, "cpusPerRank": 8}, **REMOTE)
    both = NodeSnapshot([*big._nodes, *small._nodes])

    assert feasibility(job, both, SMALL_ROOM).tiers[0] == "avx512"


@pytest.mark.parametrize(("status", "why"), [({}, "1 lacks AVX2"), (TRAINED, "1 is not ready")])
def test_the_sentence_is_about_the_transfers_pod(status: dict[str, Any], why: str) -> None:
    """Nobody looks for the room of a rank, and for the last transfer not for its processor."""
    job = builders.a_job(status=status, **REMOTE)

    assert feasibility(job, snapshot(a=False), SMALL_ROOM).why == (
        f"0/1 nodes can take a transfer's pod: {why}"
    )


def test_without_permission_every_allowed_tier_is_feasible(a_job: Callable[..., QLoRAJob]) -> None:
    """Then the labels of the first are required, unseen."""
    job = a_job(isa={"allowed": ["avx512", "avx2"]})

    assert feasibility(job, None, SMALL_ROOM).tiers == ("avx512", "avx2")


@pytest.mark.parametrize(("asked", "tiers"), [("auto", ()), ("bf16", ("avx512",))])
def test_bf16_that_was_asked_for_may_be_emulated(asked: str, tiers: tuple[str, ...]) -> None:
    """A job that chose it goes on where it began; one that merely found it stays on processors that have it."""
    status = {"placement": {"isa": "avx512", "dtype": "bf16"}}
    training = {"maxSteps": 1, "computeDtype": asked}
    job = builders.a_job(status=status, training=training, isa={"allowed": ["avx512"]})

    assert feasibility(job, snapshot(a=True, b=True), SMALL_ROOM).tiers == tiers


def test_nodes_to_avoid_are_named_when_there_are_no_others() -> None:
    """The user learns why nodes that look right are not taken."""
    status = {"placement": {"isa": "avx512", "avoid": ["b", "a"]}}
    job = builders.a_job(status=status)

    found = feasibility(job, snapshot(a=True, b=True), SMALL_ROOM)

    assert found.tiers == ()
    assert found.why.endswith("(left out, since their ranks found less than the labels promise: a, b)")
    assert feasibility(job, snapshot(a=True, b=True, c=True), SMALL_ROOM).why == ""


@pytest.mark.parametrize(
    ("gate", "placement", "tiers"),
    [
        (True, {}, ()),
        (False, {}, ("amx_bf16", "avx512")),
        (False, {"isa": "amx_bf16", "dtype": "bf16"}, ("amx_bf16",)),
    ],
    ids=["jobs wait for nodes", "pods make nodes come", "of the processors that the job has begun on"],
)
def test_pools_that_are_empty_grow_for_pods(
    gate: bool, placement: dict[str, Any], tiers: tuple[str, ...]
) -> None:
    """No autoscaler makes nodes for a job that creates no pods before they are there."""
    job = builders.a_job(status={"placement": placement}, isa={"allowed": ["amx_bf16", "avx512"]})
    settings = Settings(trainer_image="registry.example/trainer:1", placement_gate=gate)

    assert feasibility(job, NodeSnapshot([]), settings).tiers == tiers
