"""The ISA tiers that a cluster's nodes can give a job, or why they can give none.

No second scheduler: what else runs on the nodes is not looked at.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any, NamedTuple

from qlora_contract.run import BF16_NATIVE, ISA_TIERS, IsaTier
from qlora_operator.api.names import TIER_LABELS
from qlora_operator.api.quantity import parse_quantity
from qlora_operator.api.sizes import pod_cpus, pod_memory
from qlora_operator.api.types import QLoRAJob, Toleration

REASONS_SHOWN = 8
"""Different reasons in a sentence: a status message is no inventory of the cluster."""

_CPUID = TIER_LABELS["avx2"][0].rpartition(".")[0]
"""What Node Feature Discovery's labels of processor features begin with."""


@dataclass(frozen=True)
class Taint:
    """What keeps pods away that do not tolerate it."""

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
    """A node, as far as placement looks at it."""

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
    """What a job asks of the nodes."""

    pods: int
    cpus: int
    """Whole CPUs of a pod. `pinning` makes no difference here: either way they are what the pod requests."""
    memory: int
    """Bytes of a pod."""
    node_selector: Mapping[str, str]
    tolerations: tuple[Toleration, ...]
    tiers: tuple[IsaTier, ...]
    """Those that the user allows, in order of preference."""


@dataclass(frozen=True)
class Feasibility:
    """Where a job can run."""

    tiers: tuple[IsaTier, ...]
    """Tiers that enough nodes have, in the user's order of preference."""
    why: str
    """Why there are none, in a sentence; empty when there are some."""


class _Obstacle(NamedTuple):
    """What keeps a job from a node. In order: what is listed first in a sentence, and looked at first."""

    order: int
    verb: tuple[str, str]
    """For one node, and for many."""
    rest: str


_HAS = ("has", "have")
_LACKS = ("lacks", "lack")
_IS = ("is", "are")


def node(raw: Mapping[str, Any]) -> Node:
    """A node from the API server's JSON. What it has not told yet counts as nothing: no CPUs, not ready."""
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


def demand(job: QLoRAJob) -> Demand:
    """What the pods of a job ask of their nodes."""
    spec = job.spec
    return Demand(
        pods=spec.topology.pods,
        cpus=pod_cpus(spec.topology),
        memory=pod_memory(spec.topology),
        node_selector=spec.scheduling.node_selector,
        tolerations=tuple(spec.scheduling.tolerations),
        tiers=tuple(spec.isa.allowed),
    )


def feasible(nodes: Sequence[Node], demand: Demand, *, native_bf16_only: bool = False) -> Feasibility:
    """The tiers on which all pods of a job fit, if nothing else ran on the nodes.

    Args:
        nodes: all of the cluster.
        demand: what the job asks for.
        native_bf16_only: the job's first steps were computed in bf16, so the later ones are too, and other
            tiers could only emulate it.
    """
    tiers = [tier for tier in demand.tiers if tier in BF16_NATIVE or not native_bf16_only]
    if not tiers:
        return Feasibility(
            (), "the job has begun in bf16, which no tier of spec.isa.allowed computes natively"
        )
    enough = tuple(tier for tier in tiers if _fitting(nodes, demand, tier) >= demand.pods)
    if enough:
        return Feasibility(enough, "")
    # Nodes of a better tier have the labels of the lesser ones too, so this one has most of the nodes.
    why = _why(nodes, demand, max(tiers, key=ISA_TIERS.index))
    if len(tiers) < len(demand.tiers):
        why += f"; only {' or '.join(tiers)} will do, since the job has begun in bf16"
    return Feasibility((), why)


def _fitting(nodes: Sequence[Node], demand: Demand, tier: IsaTier) -> int:
    return sum(_room(node, demand) for node in nodes if _obstacle(node, demand, tier) is None)


def _room(node: Node, demand: Demand) -> int:
    """Pods of a job that a node has the CPUs, the memory and the places for."""
    return min(node.cpus // demand.cpus, node.memory // demand.memory, node.pods)


def _obstacle(node: Node, demand: Demand, tier: IsaTier) -> _Obstacle | None:
    """The first thing that keeps a job from a node: what lasts before what passes, so that a node which is
    counted as cordoned needs no more than to be uncordoned."""
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
    missing = [label for label in TIER_LABELS[tier] if node.labels.get(label) != "true"]
    if missing:
        # The feature that the tier is named after, if it is missing: AMXBF16 tells more than AMXTILE.
        named = next((label for label in missing if _feature(label) == _namesake(tier)), missing[0])
        return _Obstacle(2, _LACKS, _feature(named))
    return None


def _too_small(node: Node, demand: Demand) -> _Obstacle | None:
    if node.cpus < demand.cpus:
        return _Obstacle(3, _HAS, f"fewer than {demand.cpus} CPUs" if demand.cpus > 1 else "no whole CPU")
    if node.memory < demand.memory:
        return _Obstacle(4, _HAS, f"less than {_gibibytes(demand.memory)} of memory")
    if node.pods < 1:
        return _Obstacle(5, _HAS, "no place for pods")
    return None


def _tolerated(taint: Taint, demand: Demand) -> bool:
    return taint.effect == "PreferNoSchedule" or any(_tolerates(each, taint) for each in demand.tolerations)


def _tolerates(toleration: Toleration, taint: Taint) -> bool:
    """As core/v1 means it: what is unset matches everything."""
    return (
        toleration.effect in (None, taint.effect)
        and toleration.key in (None, taint.key)
        and (toleration.operator == "Exists" or (toleration.value or "") == taint.value)
    )


def _why(nodes: Sequence[Node], demand: Demand, tier: IsaTier) -> str:
    """Why too few pods fit, each node counted once."""
    if not nodes:
        return "the cluster has no nodes"
    obstacles = [_obstacle(node, demand, tier) for node in nodes]
    fit, good = _fitting(nodes, demand, tier), obstacles.count(None)
    told = (
        f"{fit} {_plural(fit, 'pod fits', 'pods fit')} on {good}/{len(nodes)} nodes, {demand.pods} are needed"
        if good
        else f"0/{len(nodes)} nodes can take a rank pod"
    )
    reasons = _reasons(Counter(obstacle for obstacle in obstacles if obstacle))
    return f"{told}: {reasons}{_hint(nodes)}" if reasons else told


def _reasons(counted: Counter[_Obstacle]) -> str:
    """`7 lack AMXBF16, 1 is cordoned`, in the order of the obstacles, the commonest of a kind first."""
    ordered = sorted(counted.items(), key=lambda item: (item[0].order, -item[1], item[0].rest))
    told = [f"{count} {_plural(count, *obstacle.verb)} {obstacle.rest}" for obstacle, count in ordered]
    if len(told) > REASONS_SHOWN:
        others = sum(count for _, count in ordered[REASONS_SHOWN:])
        told[REASONS_SHOWN:] = [f"{others} cannot for other reasons"]
    return ", ".join(told)


def _hint(nodes: Sequence[Node]) -> str:
    """What is wrong where no node has any label of its processor's features: the commonest mistake of all."""
    if any(label.startswith(f"{_CPUID}.") for node in nodes for label in node.labels):
        return ""
    return f"; no node has labels {_CPUID}.*: Node Feature Discovery must be installed, or the nodes labelled"


def _feature(label: str) -> str:
    return label.rpartition(".")[2]


def _namesake(tier: IsaTier) -> str:
    return tier.replace("_", "").upper()


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _gibibytes(count: int) -> str:
    """`96Gi`, `4.31Gi`."""
    return f"{round(count / 2**30, 2):.12g}Gi"
