"""The ISA tiers that a cluster's nodes can give a job, or why they can give none.

This is not a second scheduler: what else runs on the nodes is ignored.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor
from typing import Any, NamedTuple

from qlora_contract.run_config import BF16_NATIVE, ISA_TIERS, IsaTier, RunStage
from qlora_operator.api.names import TIER_LABELS
from qlora_operator.api.pod_resources import pod_cpus, pod_memory, stage_topology
from qlora_operator.api.quantity import parse_memory, parse_quantity
from qlora_operator.api.v1alpha1 import QLoRAJob, Scheduling, Toleration
from qlora_operator.settings import TransferSettings

REASONS_SHOWN = 8
"""Different reasons in a message: it is not an inventory of the cluster."""

_CPUID = TIER_LABELS["avx2"][0].rpartition(".")[0]
"""What Node Feature Discovery's labels of processor features begin with."""


@dataclass(frozen=True)
class Taint:
    """What keeps away pods that do not tolerate it."""

    key: str
    effect: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.key}={self.value}:{self.effect}" if self.value else f"{self.key}:{self.effect}"


_CORDONED = Taint("node.kubernetes.io/unschedulable", "NoSchedule")
"""What a cordon is to the scheduler: a pod that tolerates it may go there all the same."""
_STATE_TAINTS = frozenset(
    f"node.kubernetes.io/{state}" for state in ("unschedulable", "not-ready", "unreachable")
)
"""Taints that only repeat what `schedulable` and `ready` say."""


@dataclass(frozen=True)
class Node:
    """What placement knows of a node."""

    name: str
    labels: Mapping[str, str]
    cpus: int
    """Whole CPUs that pods may have."""
    memory: int
    """Bytes that pods may have."""
    pods: int
    """How many pods it runs at most."""
    taints: tuple[Taint, ...] = ()
    ready: bool = True
    schedulable: bool = True
    """Not cordoned."""


@dataclass(frozen=True)
class Demand:
    """What a job requires of the nodes."""

    pods: int
    cpus: int
    """Whole CPUs of a pod. `pinning` makes no difference here: either way they are what the pod requests."""
    memory: int
    """Bytes of a pod."""
    node_selector: Mapping[str, str]
    tolerations: tuple[Toleration, ...]
    tiers: tuple[IsaTier, ...]
    """Those that the user allows, in order of preference."""
    kind: str = "rank pod"
    """What its pods are called in a message."""
    any_processor: bool = False
    """Nodes need none of the tiers' labels."""


@dataclass(frozen=True)
class Feasibility:
    """The tiers that a job could run on."""

    tiers: tuple[IsaTier, ...]
    """Tiers that enough nodes have, in the user's order of preference."""
    why: str = ""
    """Why there are none, in a sentence."""
    nodes: Mapping[IsaTier, frozenset[str]] = field(default_factory=dict)
    """Of each tier, the names of the nodes that fit, be they enough or not; empty where no tier has enough, and where
    nodes may not be listed."""
    pods: Mapping[IsaTier, int] = field(default_factory=dict)
    """How many pods each tier has room for, in the user's order of preference; empty where nodes may not be listed."""


class _Obstacle(NamedTuple):
    """What keeps a job from a node."""

    order: int
    """Its place among the reasons of a message: also the order in which a node is checked."""
    verb: tuple[str, str]
    """For one node, and for many."""
    rest: str


_HAS = ("has", "have")
_LACKS = ("lacks", "lack")
_IS = ("is", "are")


def node(raw: Mapping[str, Any]) -> Node:
    """A node from the API server's JSON. What is missing counts as nothing: no CPUs, not ready."""
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    allocatable = status.get("allocatable") or {}
    return Node(
        name=raw["metadata"]["name"],
        labels=raw["metadata"].get("labels") or {},
        cpus=_floor(allocatable, "cpu"),
        memory=_floor(allocatable, "memory"),
        pods=_floor(allocatable, "pods"),
        taints=tuple(
            Taint(taint["key"], taint["effect"], taint.get("value") or "")
            for taint in spec.get("taints") or ()
        ),
        ready=any(
            condition["type"] == "Ready" and condition["status"] == "True"
            for condition in status.get("conditions") or ()
        ),
        schedulable=not spec.get("unschedulable", False),
    )


def _floor(allocatable: Mapping[str, str], resource: str) -> int:
    return floor(parse_quantity(allocatable.get(resource, "0")))


def demand(job: QLoRAJob, scheduling: Scheduling, stage: RunStage = "train") -> Demand:
    """What the pods of a job that train or export, and may run where `scheduling` says, require of their nodes."""
    spec, topology = job.spec, stage_topology(job.spec.topology, stage)
    return Demand(
        pods=topology.pods,
        cpus=pod_cpus(topology),
        memory=pod_memory(topology),
        node_selector=scheduling.node_selector,
        tolerations=tuple(scheduling.tolerations),
        tiers=tuple(spec.isa.allowed),
    )


def transfer_demand(
    job: QLoRAJob, scheduling: Scheduling, transfer: TransferSettings, stage: RunStage
) -> Demand:
    """What the one pod of a transfer requires of its node.

    Sources are fetched where ranks may run, since a claim may be bound to the first node that uses it; it is bound when
    the adapter is sent.
    """
    checks = stage == "fetch" and transfer.checks_data
    return replace(
        demand(job, scheduling),
        pods=1,
        cpus=ceil(parse_quantity(transfer.cpu)),
        memory=parse_memory(transfer.memory) * (2 if checks else 1),
        kind="transfer's pod",
        any_processor=stage == "publish",
    )


def feasible(nodes: Sequence[Node], demand: Demand, *, native_bf16_only: bool = False) -> Feasibility:
    """The tiers on which all pods of a job fit, if nothing else ran on the nodes.

    Args:
        nodes: all of the cluster.
        demand: what the job asks for.
        native_bf16_only: the job's first steps were computed in bf16, so the later ones are too, and other
            tiers could only emulate it.
    """
    tiers = sought_tiers(demand.tiers, native_bf16_only=native_bf16_only)
    pods = {tier: _fitting(nodes, demand, tier) for tier in tiers}
    enough = tuple(tier for tier in tiers if pods[tier] >= demand.pods)
    if enough:
        fit = {
            tier: frozenset(node.name for node in nodes if _obstacle(node, demand, tier) is None)
            for tier in tiers
        }
        return Feasibility(enough, "", fit, pods)
    # Nodes of a better tier have the labels of the lesser ones too, so this one has most of the nodes.
    why = _why(nodes, demand, max(tiers, key=ISA_TIERS.index))
    if tiers != demand.tiers:
        why += f"; only {' or '.join(tiers)} will do, since the job has begun in bf16"
    return Feasibility((), why, pods=pods)


def sought_tiers(allowed: Sequence[IsaTier], *, native_bf16_only: bool) -> tuple[IsaTier, ...]:
    """The tiers that will do, in the user's order of preference; arguments as of `feasible`."""
    tiers = tuple(tier for tier in allowed if tier in BF16_NATIVE or not native_bf16_only)
    # It may have run on better nodes than the tiers it asks for, and there may be more of them.
    return tiers or tuple(tier for tier in ISA_TIERS if tier in BF16_NATIVE)[-1:]


def _fitting(nodes: Sequence[Node], demand: Demand, tier: IsaTier) -> int:
    """How many pods of a job the nodes of a tier have room for."""
    return sum(
        min(node.cpus // demand.cpus, node.memory // demand.memory, node.pods)
        for node in nodes
        if _obstacle(node, demand, tier) is None
    )


def _obstacle(node: Node, demand: Demand, tier: IsaTier) -> _Obstacle | None:
    """The first thing that keeps a job from a node. What is permanent comes before what is temporary: a node that is
    counted as cordoned only has to be uncordoned."""
    return (
        _wrong_labels(node, demand, tier)
        or _too_small(node, demand)
        or (None if node.ready else _Obstacle(6, _IS, "not ready"))
        or (None if node.schedulable or _tolerated(_CORDONED, demand) else _Obstacle(7, _IS, "cordoned"))
    )


def _wrong_labels(node: Node, demand: Demand, tier: IsaTier) -> _Obstacle | None:
    for key, value in demand.node_selector.items():
        if node.labels.get(key) != value:
            return _Obstacle(0, _LACKS, f"the label {key}={value}")
    for taint in node.taints:
        if taint.key not in _STATE_TAINTS and not _tolerated(taint, demand):
            return _Obstacle(1, _HAS, f"the taint {taint}")
    wanted = () if demand.any_processor else TIER_LABELS[tier]
    missing = [label for label in wanted if node.labels.get(label) != "true"]
    if missing:
        features = [label.rpartition(".")[2] for label in missing]
        # Rather the feature that the tier is named after: AMXBF16 tells more than AMXTILE.
        namesake = tier.replace("_", "").upper()
        return _Obstacle(2, _LACKS, namesake if namesake in features else features[0])
    return None


def _too_small(node: Node, demand: Demand) -> _Obstacle | None:
    if node.cpus < demand.cpus:
        return _Obstacle(3, _HAS, f"fewer than {demand.cpus} CPUs" if demand.cpus > 1 else "no whole CPU")
    if node.memory < demand.memory:
        # As a quantity: `96Gi`, `4.31Gi`.
        return _Obstacle(4, _HAS, f"less than {round(demand.memory / 2**30, 2):.12g}Gi of memory")
    if node.pods < 1:
        return _Obstacle(5, _HAS, "no room for pods")
    return None


def _tolerated(taint: Taint, demand: Demand) -> bool:
    """Whether the pods may run despite a taint. As in core/v1, what a toleration leaves unset matches everything."""
    return taint.effect == "PreferNoSchedule" or any(
        toleration.effect in (None, taint.effect)
        and toleration.key in (None, taint.key)
        and (toleration.operator == "Exists" or (toleration.value or "") == taint.value)
        for toleration in demand.tolerations
    )


def _why(nodes: Sequence[Node], demand: Demand, tier: IsaTier) -> str:
    """Why too few pods fit, each node counted once."""
    if not nodes:
        return "the cluster has no nodes"
    obstacles = [_obstacle(node, demand, tier) for node in nodes]
    fit, good = _fitting(nodes, demand, tier), obstacles.count(None)
    result = f"0/{len(nodes)} nodes can take a {demand.kind}"
    if good:
        pods_fit = "pod fits" if fit == 1 else "pods fit"
        result = f"{fit} {pods_fit} on {good}/{len(nodes)} nodes, {demand.pods} are needed"
    counted = Counter(obstacle for obstacle in obstacles if obstacle)
    # In the order of the obstacles, the most common of a kind first.
    ordered = sorted(counted.items(), key=lambda item: (item[0].order, -item[1], item[0].rest))
    reasons = [f"{count} {obstacle.verb[count != 1]} {obstacle.rest}" for obstacle, count in ordered]
    if len(reasons) > REASONS_SHOWN:
        others = sum(count for _, count in ordered[REASONS_SHOWN:])
        reasons[REASONS_SHOWN:] = [f"{others} cannot for other reasons"]
    # The most common mistake of all: the nodes have no labels of processor features whatsoever.
    unlabelled = not any(label.startswith(f"{_CPUID}.") for node in nodes for label in node.labels)
    hint = f"; no node has labels {_CPUID}.*: install Node Feature Discovery, or label the nodes yourself"
    return f"{result}: {', '.join(reasons)}{hint if unlabelled else ''}" if reasons else result
