"""One job, once: observe -> decide -> save -> act -> tell."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import astuple
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from qlora_contract.progress import ProgressReport
from qlora_operator.api.faults import validation_faults
from qlora_operator.api.names import Key, Phase, Reason
from qlora_operator.api.types import QLoRAJob, QLoRAJobStatus
from qlora_operator.controller import logs
from qlora_operator.controller.api_client import (
    BATCH_JOBS,
    EVENTS,
    NAMESPACE_TERMINATING,
    NETWORK_POLICIES,
    PODS,
    QLORAJOBS,
    SERVICES,
    ApiClient,
    ApiError,
    Resource,
)
from qlora_operator.controller.cache import ObjectCache
from qlora_operator.controller.metrics import JobSample, Metrics
from qlora_operator.desired.allowed import refusal
from qlora_operator.desired.events import event
from qlora_operator.desired.gang import gang_job
from qlora_operator.desired.network import network_policy
from qlora_operator.desired.service import ranks_service
from qlora_operator.placement import nodes as placement
from qlora_operator.settings import Settings
from qlora_operator.status.decision import decide
from qlora_operator.status.draft import (
    Action,
    Decision,
    DeleteGang,
    DeleteJob,
    DeletePod,
    Event,
    RestoreNetwork,
    StartAttempt,
)
from qlora_operator.status.needs import Needs, needs
from qlora_operator.status.observation import Feasible, Gang, Observation, Pod, Said, Warned, pod
from qlora_operator.status.pending import by_quota
from qlora_operator.status.policies import DONE, patience
from qlora_operator.status.quote import quote
from qlora_operator.status.unreadable import unreadable

log = logging.getLogger(__name__)

T = TypeVar("T")

NODES_KEPT_SECONDS = 10.0
"""How long one look at the nodes, or at a namespace's events, serves all jobs."""
DENIED_SECONDS = 600.0
"""How long a missing permission to list nodes is taken for granted."""
UNREADABLE_SECONDS = 60.0
ENDS = (Phase.SUCCEEDED, Phase.FAILED)


class Reconciler:
    """What brings a job from the state it is in to the one it should be in."""

    def __init__(self, cluster: ApiClient, store: ObjectCache, settings: Settings, metrics: Metrics) -> None:
        self._cluster, self._store, self._settings, self._metrics = cluster, store, settings, metrics
        self._nodes: Kept[Nodes | None] = Kept(self._list_nodes)
        self._warnings: dict[str, Kept[list[dict[str, Any]]]] = {}
        self._obstacles: dict[str, Said] = {}
        self.incomplete: set[str] = set()
        """Uids of jobs of which a child other than the Job is known to be missing."""
        self.reports: dict[str, ProgressReport] = {}
        """By a job's uid: what rank 0 said since the job was last reconciled."""
        self.follow: Callable[[Key, str, int, list[Pod]], None] = lambda *_: None
        """Is told which attempts run, so that their progress is asked for."""
        self.unfollow: Callable[[str], None] = lambda _: None
        """Is told of jobs that do not run any more, by their uid."""

    def forget(self, uid: str) -> None:
        """A job is gone."""
        self._obstacles.pop(uid, None)
        self.reports.pop(uid, None)
        self.incomplete.discard(uid)

    async def __call__(self, key: Key) -> float | None:
        """Reconcile one job; seconds until it is due again."""
        raw = self._store.job(key)
        if raw is None:
            self._metrics.jobs.remove(*key)
            return None
        try:
            job = QLoRAJob.model_validate(raw)
        except ValidationError as error:
            return await self._unreadable(raw, error)
        attempt = job.status.attempt if job.status else None
        with logs.job(*key, attempt), self._metrics.reconcile_seconds.time():
            return await self._reconcile(key, raw, job)

    async def _reconcile(self, key: Key, raw: dict[str, Any], job: QLoRAJob) -> float | None:
        uid = str(job.metadata.uid)
        now = datetime.now(UTC)
        patient = patience(self._store.starting)
        wanted = needs(job, self._store.attempt_jobs(uid), now, patient)
        seen = await self._observe(key, uid, job, wanted, patient)
        decision = decide(job, seen, now)
        self._show(key, decision.status)
        saved = await self._save(raw, decision.status, guard=bool(decision.actions))
        if saved is None:
            return 0.0
        self._count(key[0], job.status, decision)
        try:
            for action in decision.actions:
                if not await self._act(action, job, uid):
                    return 0.0
        finally:  # the status says it, whether or not it could be acted upon
            for told in decision.events:
                await self._tell(job, uid, told)
        self._follow(key, uid, decision.status, seen)
        after = job.model_copy(update={"status": decision.status})
        if _more(needs(after, self._store.attempt_jobs(uid), now, patient), wanted):
            # At once, since no event will come of it: what we did ourselves is no news.
            return await self._reconcile(key, saved, after)
        return None if decision.look_at is None else max((decision.look_at - now).total_seconds(), 0.0)

    # --- observe

    async def _observe(
        self, key: Key, uid: str, job: QLoRAJob, wanted: Needs, patient: timedelta
    ) -> Observation:
        gangs = self._store.attempt_jobs(uid)
        if wanted.pods and wanted.fresh:
            # Before another gang may start, the watch's word is not enough.
            gangs = await self._list_gangs(key, uid)
        pods = tuple(map(pod, await self._cluster.pods(key[0], uid))) if wanted.pods else None
        if {each.owner_uid for each in pods or ()} - {gang.uid for gang in gangs}:
            # Orphans, or pods of a Job that is newer than what is known: asked after them, it is told.
            gangs = await self._list_gangs(key, uid)
        nodes = await self._nodes_of(pods or ()) if wanted.nodes or (wanted.pods and wanted.stuck) else None
        return Observation(
            gangs=gangs,
            pods=pods,
            warnings=await self._about(key, gangs, pods) if wanted.warnings else (),
            feasible=self._feasible(job, nodes) if wanted.nodes else None,
            lost_nodes=_lost(pods or (), nodes),
            progress=self.reports.pop(uid, None),
            image=job.spec.image or self._settings.trainer_image,
            refusal=self._refusal(job),
            obstacle=self._obstacles.get(uid),
            incomplete=uid in self.incomplete,
            patience=patient,
        )

    async def _list_gangs(self, key: Key, uid: str) -> tuple[Gang, ...]:
        for raw in await self._cluster.attempt_jobs(key[0], uid):
            self._store.put_attempt_job(raw)
        return self._store.attempt_jobs(uid)

    def _refusal(self, job: QLoRAJob) -> Said | None:
        said = refusal(job.spec, self._settings)
        return None if said is None else Said(*said)

    def _feasible(self, job: QLoRAJob, nodes: "Nodes | None") -> Feasible:
        if nodes is None:
            return Feasible(tuple(job.spec.isa.allowed))
        known = job.status.placement if job.status else None
        avoid = frozenset(known.avoid if known else ())
        native = known is not None and known.dtype == "bf16"
        found = nodes.feasible(placement.demand(job), avoid, native_bf16_only=native)
        why = found.why
        if avoid and why:
            why = f"{why} (left out, since their ranks found less than the labels promise: {', '.join(sorted(avoid))})"
        return Feasible(found.tiers, why)

    async def _nodes_of(self, pods: tuple[Pod, ...]) -> "Nodes | None":
        """The nodes; asked for anew when a pod is on one that has joined, or gone, since they were."""
        nodes = await self._nodes.get()
        if nodes is not None and {each.node for each in pods if each.node} - nodes.names:
            self._nodes.hold(0.0)
            nodes = await self._nodes.get()
        return nodes

    async def _list_nodes(self) -> "Nodes | None":
        """None without the permission: then the labels of the first tier are required, unseen."""
        try:
            return Nodes([placement.node(raw) for raw in await self._cluster.nodes()])
        except ApiError as error:
            if error.code != 403:
                raise
            log.warning("the nodes may not be listed, so their labels are not looked at: %s", error)
            self._nodes.hold(DENIED_SECONDS)
            return None

    async def _about(
        self, key: Key, gangs: tuple[Gang, ...], pods: tuple[Pod, ...] | None
    ) -> tuple[Warned, ...]:
        """Warnings about the job's Jobs and pods, newest first."""
        namespace = key[0]
        kept = self._warnings.setdefault(namespace, Kept(lambda: self._cluster.warning_events(namespace)))
        uids = {gang.uid for gang in gangs} | {each.uid for each in pods or ()}
        mine = [raw for raw in await kept.get() if _about_uid(raw) in uids]
        mine.sort(key=_when, reverse=True)
        return tuple(
            Warned(raw.get("reason") or "", raw.get("message") or "", _about_uid(raw)) for raw in mine
        )

    # --- save

    async def _save(
        self, raw: dict[str, Any], status: QLoRAJobStatus, *, guard: bool = False
    ) -> dict[str, Any] | None:
        """The job with this status; None when it has changed since it was read, so that the decision is void.

        What changes nothing is not written, unless it is to guard what is done about it: the API server stores
        nothing then, but tells whether the job is still as it was.
        """
        new = status.model_dump(by_alias=True, mode="json", exclude_none=True, exclude_defaults=False)
        old = raw.get("status") or {}
        if _pruned(new) == _pruned(old) and not guard:
            return raw
        try:
            saved = await self._cluster.save_status({**raw, "status": new})
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            await self._refresh(raw)
            return None
        self._store.put_job(saved)
        return saved

    async def _refresh(self, raw: dict[str, Any]) -> None:
        metadata = raw["metadata"]
        key = (metadata["namespace"], metadata["name"])
        try:
            self._store.put_job(await self._cluster.get(QLORAJOBS, *key))
        except ApiError as error:
            if error.code != 404:
                raise
            self._store.drop_job(key, metadata["uid"])

    # --- act

    async def _act(self, action: Action, job: QLoRAJob, uid: str) -> bool:
        """Whether to go on; else the job is looked at anew."""
        namespace = str(job.metadata.namespace)
        match action:
            case StartAttempt():
                return await self._start(action, job, uid)
            case RestoreNetwork():
                return await self._create(uid, self._network(job, uid))
            case DeleteGang(name, gang_uid):
                await self._cluster.delete(BATCH_JOBS, namespace, name, gang_uid)
            case DeletePod(name, pod_uid):
                await self._cluster.delete(PODS, namespace, name, pod_uid)
            case DeleteJob():
                await self._cluster.delete(QLORAJOBS, namespace, job.metadata.name, uid)
        return True

    async def _start(self, action: StartAttempt, job: QLoRAJob, uid: str) -> bool:
        gang = gang_job(
            job,
            uid=uid,
            attempt=action.attempt,
            isa=action.isa,
            image=action.image,
            settings=self._settings,
            avoid=action.avoid,
            stage=action.stage,
            fetched=action.fetched,
        )

        async def children() -> None:
            await self._network(job, uid)
            self._store.put_attempt_job(await self._ensure(BATCH_JOBS, gang, uid))

        return await self._create(uid, children())

    async def _network(self, job: QLoRAJob, uid: str) -> None:
        """What every attempt shares."""
        policy = network_policy(job, uid=uid, settings=self._settings)
        await asyncio.gather(
            self._ensure(SERVICES, ranks_service(job, uid=uid), uid),
            self._ensure(NETWORK_POLICIES, policy, uid),
        )
        self.incomplete.discard(uid)

    async def _create(self, uid: str, children: Awaitable[None]) -> bool:
        """Whether to go on. What is in the way is kept, to be told to the user."""
        try:
            await children
        except ApiError as error:
            said = _obstacle(error)
            if said is None:
                raise
            known = self._obstacles.get(uid)
            # Not by the message: a webhook may name each request in it.
            news = known is None or known.reason != said.reason
            self._obstacles[uid] = said
            return not news
        self._obstacles.pop(uid, None)
        return True

    async def _ensure(self, resource: Resource, body: dict[str, Any], uid: str) -> dict[str, Any]:
        """Create a child unless it is there. Raises ApiError with reason NameConflict for somebody else's."""
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        try:
            return await self._cluster.create(resource, namespace, body)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        there = await self._cluster.get(resource, namespace, name)
        owners = there["metadata"].get("ownerReferences") or []
        if not any(owner["uid"] == uid and owner.get("controller") for owner in owners):
            message = (
                f"a {body['kind']} named {name} is there that is not this job's: delete or rename either"
            )
            raise ApiError(409, Reason.NAME_CONFLICT, message)
        return there

    # --- tell

    async def _tell(self, job: QLoRAJob, uid: str, told: Event) -> None:
        namespace = str(job.metadata.namespace)
        body = event(job, uid, told.type, told.reason, told.message, datetime.now(UTC))
        log.info("%s: %s", told.reason, told.message)
        try:
            await self._cluster.create(EVENTS, namespace, body)
        except ApiError as error:  # the status says it too
            level = logging.DEBUG if error.reason == NAMESPACE_TERMINATING else logging.WARNING
            log.log(level, "an event could not be posted: %s", error)

    def _show(self, key: Key, status: QLoRAJobStatus) -> None:
        seen = status.progress
        self._metrics.jobs.set(
            *key,
            JobSample(
                phase=Phase(status.phase or Phase.PENDING),
                tokens_per_second=seen.tokens_per_second if seen else None,
                loss=seen.loss if seen else None,
            ),
        )

    def _count(self, namespace: str, before: QLoRAJobStatus | None, decision: Decision) -> None:
        """What the metrics count, once the decision is a fact."""
        after = decision.status
        if after.phase in ENDS and (before is None or before.phase not in ENDS):
            self._metrics.jobs_finished.labels(namespace, after.phase).inc()
        if after.attempt is not None and (before is None or before.attempt != after.attempt):
            self._metrics.attempts_started.inc()
        if not after.attempts or after.attempts[-1].reason in (None, *DONE):
            return
        last, was = after.attempts[-1], before.attempts[-1] if before and before.attempts else None
        if was is not None and was.attempt == last.attempt and was.reason is None:
            old, new = before.restarts if before else None, after.restarts
            user = (new.user if new else 0) - (old.user if old else 0)
            infrastructure = (new.infrastructure if new else 0) - (old.infrastructure if old else 0)
            budget = "user" if user else "infrastructure" if infrastructure else "none"
            self._metrics.restarts.labels(last.reason, budget).inc()

    def _follow(self, key: Key, uid: str, status: QLoRAJobStatus, seen: Observation) -> None:
        if status.phase in (Phase.FETCHING, Phase.RUNNING, Phase.PUBLISHING) and status.attempt is not None:
            self.follow(key, uid, status.attempt, list(seen.pods or ()))
        else:
            self.unfollow(uid)

    async def _unreadable(self, raw: dict[str, Any], error: ValidationError) -> float:
        """An object that the API server took and we cannot read: of another version than ours."""
        faults = "; ".join(f"{path} {message}" for path, message in validation_faults(error)[:3])
        log.error("%s/%s cannot be read: %s", raw["metadata"]["namespace"], raw["metadata"]["name"], faults)
        status = unreadable(raw, faults, datetime.now(UTC))
        if status is not None and await self._save(raw, status) is None:
            return 0.0
        return UNREADABLE_SECONDS


class Nodes:
    """The nodes at one moment. Jobs that ask for the same find the same room, so it is looked for once."""

    def __init__(self, nodes: Sequence[placement.Node]) -> None:
        self._nodes = nodes
        self.names = frozenset(node.name for node in nodes)
        self.ready = frozenset(node.name for node in nodes if node.ready)
        self._found: dict[tuple[str, frozenset[str], bool], placement.Feasibility] = {}

    def feasible(
        self, demand: placement.Demand, avoid: frozenset[str], *, native_bf16_only: bool
    ) -> placement.Feasibility:
        """As placement says it of the nodes but these."""
        asked = (repr(demand), avoid, native_bf16_only)
        if asked not in self._found:
            nodes = [node for node in self._nodes if node.name not in avoid]
            self._found[asked] = placement.feasible(nodes, demand, native_bf16_only=native_bf16_only)
        return self._found[asked]


class Kept(Generic[T]):
    """The answer to a question that many ask: asked again only after a while, by one at a time."""

    def __init__(self, ask: Any, seconds: float = NODES_KEPT_SECONDS) -> None:
        self._ask, self._seconds = ask, seconds
        self._until = 0.0
        self._lock = asyncio.Lock()
        self._answer: T

    async def get(self) -> T:
        """The answer, at most some seconds old."""
        async with self._lock:
            if time.monotonic() >= self._until:
                self._until = 0.0
                self._answer = await self._ask()
                self._until = max(self._until, time.monotonic() + self._seconds)
            return self._answer

    def hold(self, seconds: float) -> None:
        """The answer that is being given is good for longer."""
        self._until = time.monotonic() + seconds


def _more(after: Needs, before: Needs) -> bool:
    """Whether something is to be looked at now that was not before."""
    return any(new and not old for new, old in zip(astuple(after), astuple(before), strict=True))


def _lost(pods: tuple[Pod, ...], nodes: Nodes | None) -> frozenset[str]:
    """Nodes of pods that do not answer, or are no longer there."""
    if nodes is None or not nodes.names:
        return frozenset()
    return frozenset(each.node for each in pods if each.node is not None and each.node not in nodes.ready)


def _about_uid(raw: dict[str, Any]) -> str:
    return str((raw.get("involvedObject") or {}).get("uid") or "")


def _when(raw: dict[str, Any]) -> str:
    series = raw.get("series") or {}
    return str(
        series.get("lastObservedTime")
        or raw.get("lastTimestamp")
        or raw.get("eventTime")
        or raw["metadata"].get("creationTimestamp")
        or ""
    )


def _obstacle(error: ApiError) -> Said | None:
    """What to tell the user when the API server does not take a child; None when trying again will do."""
    if error.reason == Reason.NAME_CONFLICT:
        return Said(Reason.NAME_CONFLICT, str(error))
    if error.code in (400, 403, 422):
        reason = Reason.QUOTA_EXCEEDED if by_quota(str(error)) else Reason.REFUSED
        return Said(reason, f"the API server refuses a child of the job: {quote(str(error))}")
    return None


def _pruned(value: Any) -> Any:
    """Without empty lists and maps: an API server keeps them, and pydantic writes them, or not."""
    if isinstance(value, dict):
        pruned = {key: _pruned(item) for key, item in value.items()}
        return {key: item for key, item in pruned.items() if item not in ([], {}, None)}
    if isinstance(value, list):
        return [_pruned(item) for item in value]
    return value
