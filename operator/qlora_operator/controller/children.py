"""Act: create and delete a job's children."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from qlora_operator.api import names
from qlora_operator.api.names import Reason
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.controller.api_client import (
    BATCH_JOBS,
    NETWORK_POLICIES,
    PODS,
    QLORAJOBS,
    SERVICES,
    ApiClient,
    ApiError,
    Resource,
)
from qlora_operator.controller.cache import ObjectCache
from qlora_operator.controller.job_facts import JobFacts
from qlora_operator.desired.attempt_job import attempt_job
from qlora_operator.desired.metadata import owner, owning_job
from qlora_operator.desired.network import is_network_policy, network_policy
from qlora_operator.desired.service import has_service, is_ranks_service, ranks_service
from qlora_operator.settings import Settings
from qlora_operator.status.actions import (
    Action,
    DeleteAttemptJob,
    DeleteJob,
    DeleteNetwork,
    DeletePod,
    DropWorkload,
    KeepWorkload,
    RestoreNetwork,
    StartAttempt,
    TellCheckpoint,
)
from qlora_operator.status.observation import ReasonMessage, kept_workload
from qlora_operator.status.sanitize import sanitize
from qlora_operator.status.waiting import is_quota_error

log = logging.getLogger(__name__)


class Children:
    """Does what a decision says is to be done."""

    def __init__(self, client: ApiClient, cache: ObjectCache, facts: JobFacts, settings: Settings) -> None:
        self._client, self._cache, self._facts, self._settings = client, cache, facts, settings

    async def act(self, action: Action, job: QLoRAJob, uid: str) -> bool:
        """Whether to continue with the other actions; otherwise the job is decided anew."""
        namespace = str(job.metadata.namespace)
        match action:
            case StartAttempt():
                return await self._try(uid, self._start(action, job, uid))
            case RestoreNetwork():
                return await self._try(uid, self._create_network(job, uid))
            case DeleteAttemptJob(name, job_uid):
                if not await self._client.delete(BATCH_JOBS, namespace, name, job_uid):
                    self._cache.drop_attempt_job(uid, name, job_uid)
                    return False
            case DeleteJob():
                if not await self._client.delete(QLORAJOBS, namespace, job.metadata.name, uid):
                    self._cache.drop_job((namespace, job.metadata.name), uid)
                    return False
            case _:
                await self._do(action, job, uid)
        return True

    async def _do(self, action: Action, job: QLoRAJob, uid: str) -> None:
        """What the other actions follow in any case."""
        namespace = str(job.metadata.namespace)
        match action:
            case TellCheckpoint():
                await self._tell_checkpoint(namespace, action)
            case KeepWorkload():
                await self._keep_workload(action, job, uid)
            case DropWorkload(name):
                await self._client.delete_workload(namespace, name)
            case DeleteNetwork():
                await self._delete_network(job, uid)
            case DeletePod(name, pod_uid):
                await self._client.delete(PODS, namespace, name, pod_uid)

    async def _try(self, uid: str, children: Awaitable[None]) -> bool:
        """Create children. What keeps them from being created is kept for the next decision, which tells the user."""
        try:
            await children
        except ApiError as api_error:
            error = create_error(api_error)
            if error is None:
                raise
            return not self._facts.set_create_error(uid, error)
        self._facts.set_create_error(uid, None)
        return True

    async def _start(self, action: StartAttempt, job: QLoRAJob, uid: str) -> None:
        body = attempt_job(
            job,
            uid=uid,
            attempt=action.attempt,
            isa=action.isa,
            image=action.image,
            settings=self._settings.of(job.metadata.namespace),
            avoid=action.avoid,
            shun=action.shun,
            pods=action.pods,
            stage=action.stage,
            fetched=action.fetched,
            checkpoint_time=action.checkpoint_time,
            requested=action.requested,
            workload=await self._take_over(action.workload, job, uid),
        )
        # A Job that is refused is tried again and again, and the rest need not be.
        if not (self._facts.create_error(uid) and self._facts.children_complete(uid)):
            await self._create_network(job, uid)
        self._cache.put_attempt_job(await self._ensure(BATCH_JOBS, body, uid))

    async def _keep_workload(self, action: KeepWorkload, job: QLoRAJob, uid: str) -> None:
        """Make the job an owner of a Workload beside the Job that it was made for, and that is about to go."""
        owners = [owner(job, uid), owning_job(action.job_name, action.job_uid)]
        await self._own_workload(action.name, job, owners)

    async def _take_over(self, workload: str | None, job: QLoRAJob, uid: str) -> str | None:
        """A Workload that was kept, with no Job that controls it, ready for the next one's; None if it is of no use."""
        if workload is None:
            return None
        found = await self._own_workload(workload, job, [owner(job, uid)])
        return kept_workload([found]) if found is not None else None

    async def _own_workload(
        self, name: str, job: QLoRAJob, owners: list[dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Give a Workload these owners. Without it, or the permission, the job queues anew: None."""
        namespace = str(job.metadata.namespace)
        try:
            return await self._client.patch_workload(
                namespace, name, {"metadata": {"ownerReferences": owners}}
            )
        except ApiError as error:
            if error.code not in (403, 404, 409, 422):
                raise
            log.info("the place in the queue is lost: %s", error)
            return None

    async def _create_network(self, job: QLoRAJob, uid: str) -> None:
        """The Service, if the job needs one, and the NetworkPolicy, which all attempts share."""
        policy = network_policy(job, uid=uid, settings=self._settings)
        children = [self._restore(NETWORK_POLICIES, policy, uid, is_network_policy)]
        if has_service(job):
            children.append(self._restore(SERVICES, ranks_service(job, uid=uid), uid, is_ranks_service))
        await asyncio.gather(*children)
        self._facts.set_children_complete(uid)

    async def _tell_checkpoint(self, namespace: str, action: TellCheckpoint) -> None:
        """Annotate an attempt's Job. Training goes on without: the Job may just have gone, or the operator's role be of
        an earlier release."""
        metadata = {"uid": action.uid, "annotations": {names.CHECKPOINT_ANNOTATION: action.time}}
        try:
            found = await self._client.patch(BATCH_JOBS, namespace, action.name, {"metadata": metadata})
        except ApiError as error:
            if error.code not in (403, 404, 409, 422):
                raise
            log.debug("%s could not be annotated: %s", action.name, error)
        else:
            self._cache.put_attempt_job(found)

    async def _delete_network(self, job: QLoRAJob, uid: str) -> None:
        namespace, name = str(job.metadata.namespace), job.metadata.name
        for resource, child in (
            (SERVICES, names.ranks_service(name)),
            (NETWORK_POLICIES, names.ranks_network_policy(name)),
        ):
            try:
                found = await self._client.get(resource, namespace, child)
            except ApiError as error:
                if error.code != 404:
                    raise
            else:
                if _is_owned(found, uid):
                    await self._client.delete(resource, namespace, child, found["metadata"]["uid"])
        self._facts.set_network_gone(uid)

    async def _restore(
        self,
        resource: Resource,
        body: dict[str, Any],
        uid: str,
        is_as_desired: Callable[[dict[str, Any], Settings], bool],
    ) -> None:
        """Create a child, or make one that exists what it should be: somebody may have edited it, or an operator with
        other settings has made it. Labels first, by which the operator finds it again."""
        found = await self._ensure(resource, body, uid)
        metadata = {**found["metadata"], "labels": body["metadata"]["labels"]}
        if not is_as_desired({**found, "metadata": metadata}, self._settings):
            spec = {**found["spec"], **body["spec"]}
            await self._client.replace(resource, {**body, "metadata": metadata, "spec": spec})

    async def _ensure(self, resource: Resource, body: dict[str, Any], uid: str) -> dict[str, Any]:
        """Create a child unless it exists. Raises ApiError with reason NameConflict if its name is taken."""
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        try:
            return await self._client.create(resource, namespace, body)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        existing = await self._client.get(resource, namespace, name)
        if not _is_owned(existing, uid):
            message = (
                f"a {body['kind']} named {name} is there that is not this job's: delete or rename either"
            )
            raise ApiError(409, Reason.NAME_CONFLICT, message)
        return existing


def _is_owned(raw: dict[str, Any], uid: str) -> bool:
    owners = raw["metadata"].get("ownerReferences") or []
    return any(owner["uid"] == uid and owner.get("controller") for owner in owners)


def create_error(error: ApiError) -> ReasonMessage | None:
    """What to tell the user when a child cannot be created; None when it is to be tried again without a word."""
    if error.reason == Reason.NAME_CONFLICT:
        return ReasonMessage(Reason.NAME_CONFLICT, str(error))
    if error.code in (400, 403, 422):
        reason = Reason.QUOTA_EXCEEDED if is_quota_error(str(error)) else Reason.REFUSED
        message = f"the API server refuses a child of the job: {sanitize(str(error))}"
        return ReasonMessage(reason, message)
    return None
