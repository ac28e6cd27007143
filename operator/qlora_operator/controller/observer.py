"""Observe: what is known of a job without a request, and what a decision asks for besides."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qlora_contract.run_config import RunStage
from qlora_operator.api.names import Key
from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJob, Scheduling
from qlora_operator.controller.api_client import ApiClient
from qlora_operator.controller.cache import ObjectCache
from qlora_operator.controller.job_facts import JobFacts
from qlora_operator.controller.node_cache import NodeCache, NodeSnapshot
from qlora_operator.desired.admission import policy_violation
from qlora_operator.desired.defaults import scheduling
from qlora_operator.placement import nodes as placement
from qlora_operator.settings import Settings
from qlora_operator.status import stages
from qlora_operator.status.observation import (
    AttemptJob,
    Observation,
    Pod,
    Read,
    ReasonMessage,
    WarningEvent,
    deactivated,
    eviction,
    kept_workload,
    pod,
    queue_says,
)
from qlora_operator.status.policies import startup_grace
from qlora_operator.status.sanitize import sanitize
from qlora_operator.status.view import current_job

PODS_ASKED_ABOUT = 3
"""Of how many pods that do not start the warnings are read: mostly they wait for the same."""


class Observer:
    """Reads what decisions need."""

    def __init__(self, client: ApiClient, cache: ObjectCache, facts: JobFacts, settings: Settings) -> None:
        self._client, self._cache, self._facts, self._settings = client, cache, facts, settings
        self._nodes = NodeCache(client)

    def known(self, job: QLoRAJob, uid: str) -> Observation:
        """What is known of a job without a request."""
        violation = policy_violation(job, self._settings.of(job.metadata.namespace))
        return Observation(
            attempt_jobs=self._cache.attempt_jobs(uid),
            progress=self._facts.take_report(uid),
            image=job.spec.image or self._settings.trainer_image,
            price=self._settings.costs.price,
            policy_violation=None if violation is None else ReasonMessage(*violation),
            create_error=self._facts.create_error(uid),
            children_missing=self._facts.children_missing(uid),
            network_exists=self._facts.network_exists(uid),
            delivered=self._facts.delivered(uid),
            startup_grace=startup_grace(self._cache.starting),
        )

    async def read(
        self, seen: Observation, reads: frozenset[Read], key: Key, job: QLoRAJob, uid: str
    ) -> Observation:
        """The observation with these read besides, in the order in which they depend on each other."""
        if Read.JOBS in reads:
            seen = await self._with_jobs(seen, key, uid)
        if Read.PODS in reads:
            seen = replace(seen, pods=tuple(map(pod, await self._client.pods(key[0], uid))))
            if {pod.owner_uid for pod in seen.pods or ()} - {job.uid for job in seen.attempt_jobs}:
                # Orphans, or pods of a Job that the watch has not delivered yet: a list shows which.
                seen = await self._with_jobs(seen, key, uid)
        if Read.WORKLOAD in reads:
            mine = current_job(job, job.status or QLoRAJobStatus(), seen.attempt_jobs)
            attempts = job.status.attempts if job.status else []
            about = mine.uid if mine is not None else attempts[-1].job_uid if attempts else None
            found = await self._client.workloads(key[0], about) if about is not None else []
            evicted = eviction(found)
            seen = replace(
                seen,
                deactivated=sanitize(deactivated(found)),
                queue_says=sanitize(queue_says(found)),
                eviction=replace(evicted, message=sanitize(evicted.message)) if evicted else None,
                workload=kept_workload(found),
            )
        if Read.WARNINGS in reads:
            mine = current_job(job, job.status or QLoRAJobStatus(), seen.attempt_jobs)
            uids = asked_about(mine, seen.pods or ())
            events = [raw for uid in uids for raw in await self._client.warning_events(key[0], uid)]
            seen = replace(seen, warnings=newest_first(events))
        if reads & {Read.NODE_HEALTH, Read.FEASIBLE_TIERS}:
            occupied = {pod.node for pod in seen.pods or () if pod.node}
            nodes = await self._nodes.get(occupied)
            if Read.NODE_HEALTH in reads:
                seen = replace(seen, lost_nodes=lost_nodes(seen.pods or (), nodes))
            if Read.FEASIBLE_TIERS in reads:
                room = feasibility(job, nodes, self._settings.of(key[0]))
                seen = replace(
                    seen,
                    feasible_tiers=room.tiers,
                    tier_nodes=room.nodes,
                    tier_pods=room.pods,
                    infeasible_because=room.why,
                )
        return seen

    async def _with_jobs(self, seen: Observation, key: Key, uid: str) -> Observation:
        known = self._cache.attempt_jobs(uid)
        listed = await self._client.attempt_jobs(key[0], uid)
        for raw in listed:
            self._cache.put_attempt_job(raw)
        gone = {job.uid for job in known} - {raw["metadata"]["uid"] for raw in listed}
        for job in known:
            if job.uid in gone:
                self._cache.drop_attempt_job(uid, job.name, job.uid)
        return replace(seen, attempt_jobs=self._cache.attempt_jobs(uid), jobs_listed=True)


def feasibility(job: QLoRAJob, nodes: NodeSnapshot | None, settings: Settings) -> placement.Feasibility:
    """Where the pods of a job's open or next attempt can run. If the operator may not list nodes, every tier that it
    allows: then the labels of the first are required, unseen.

    A transfer waits for the room of its one pod, not for that of all ranks. Where there is room for them, sources are
    fetched on the tier that they will have.
    """
    if nodes is None:
        return placement.Feasibility(tuple(job.spec.isa.allowed), "")
    where = scheduling(job.spec.scheduling, settings)
    stage = stages.current_stage(job.spec, job.status or QLoRAJobStatus())
    if stage == "publish":
        demand = placement.transfer_demand(job, where, settings.transfer, stage)
        return nodes.feasible(demand, frozenset(), native_bf16_only=False)
    found = _room_for_ranks(job, nodes, where, stage)
    if stage == "fetch" and not found.tiers:
        demand = placement.transfer_demand(job, where, settings.transfer, stage)
        found = nodes.feasible(demand, frozenset(), native_bf16_only=False)
    if not found.tiers and not settings.placement_gate:
        # An autoscaler makes nodes for pods, not for jobs that wait to have some.
        return placement.Feasibility(
            placement.sought_tiers(job.spec.isa.allowed, native_bf16_only=_native(job)), ""
        )
    return found


def _room_for_ranks(
    job: QLoRAJob, nodes: NodeSnapshot, where: Scheduling, stage: RunStage
) -> placement.Feasibility:
    known = job.status.placement if job.status else None
    avoid = frozenset(known.avoid if known else ())
    found = nodes.feasible(placement.demand(job, where, stage), avoid, native_bf16_only=_native(job))
    if not (avoid and found.why):
        return found
    names = ", ".join(sorted(avoid))
    why = f"{found.why} (left out, since their ranks found less than the labels promise: {names})"
    return replace(found, why=why)


def _native(job: QLoRAJob) -> bool:
    """Whether the job has begun in bf16 that only some processors have. Who asks for it by name gets it on any,
    emulated where it must be."""
    known = job.status.placement if job.status else None
    return known is not None and known.dtype == "bf16" and job.spec.training.compute_dtype == "auto"


def lost_nodes(pods: Sequence[Pod], nodes: NodeSnapshot | None) -> frozenset[str]:
    """Nodes of pods that are not ready, or no longer exist; none if the operator may not list nodes."""
    if nodes is None or not nodes.names:
        return frozenset()
    return frozenset(pod.node for pod in pods if pod.node is not None and pod.node not in nodes.ready)


def asked_about(job: AttemptJob | None, pods: Sequence[Pod]) -> list[str]:
    """The uids of what warnings may tell about: the Job, if it lacks pods, and the first pods that do not start and do
    not say why. Each costs a request."""
    if job is None:
        return []
    mine = sorted((pod for pod in pods if pod.owner_uid == job.uid), key=lambda pod: pod.index)
    silent = [pod.uid for pod in mine if pod.phase == "Pending" and pod.unschedulable is None]
    lacks_pods = [job.uid] if len(mine) < (job.parallelism or 1) else []
    return [*lacks_pods, *silent[:PODS_ASKED_ABOUT]]


def newest_first(events: Sequence[dict[str, Any]]) -> tuple[WarningEvent, ...]:
    """What decisions need of these Events, the newest first."""
    return tuple(
        WarningEvent(raw.get("reason") or "", raw.get("message") or "", str(raw["involvedObject"]["uid"]))
        for raw in sorted(events, key=last_seen, reverse=True)
    )


def last_seen(event: dict[str, Any]) -> str:
    """When an Event happened last, RFC 3339, in whichever field its author has written that."""
    series = event.get("series") or {}
    return str(
        series.get("lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp")
        or ""
    )
