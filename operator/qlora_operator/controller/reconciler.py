"""One job, once: observe -> decide -> save -> act -> tell."""

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import ValidationError

from qlora_operator.api.loader import parse_api_object
from qlora_operator.api.messages import validation_faults
from qlora_operator.api.names import Key, Phase
from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.controller import job_metrics, logs
from qlora_operator.controller.api_client import EVENTS, NAMESPACE_TERMINATING, QLORAJOBS, ApiClient, ApiError
from qlora_operator.controller.cache import ObjectCache
from qlora_operator.controller.children import Children
from qlora_operator.controller.job_facts import JobFacts
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.observer import Observer
from qlora_operator.desired.defaults import with_defaults
from qlora_operator.desired.events import event as event_body
from qlora_operator.settings import Settings
from qlora_operator.status.actions import Event
from qlora_operator.status.api_failure import api_failure
from qlora_operator.status.decision import decide, managed_elsewhere
from qlora_operator.status.invalid_spec import invalid_spec_status
from qlora_operator.status.notices import Notice, cloud_event, undelivered
from qlora_operator.status.observation import Observation, Pod

log = logging.getLogger(__name__)

INVALID_SPEC_SECONDS = 60.0
"""How often a job that this operator cannot read is read again."""
RUNNING_PHASES = (Phase.FETCHING, Phase.RUNNING, Phase.PUBLISHING)


class ProgressTracker(Protocol):
    """Polls the progress of running attempts."""

    def track(self, key: Key, uid: str, attempt: int, job_uid: str, pods: Sequence[Pod]) -> None:
        """Poll this attempt from now on: its batch/v1 Job, and those of its pods that are known."""

    def untrack(self, uid: str) -> None:
        """Stop polling a job."""


class Deliverer(Protocol):
    """Notifies the receiver in the settings."""

    def offer(self, key: Key, uid: str, url: str, notice: Notice, event: dict[str, Any]) -> None:
        """Deliver an event to an address, unless that is under way."""


class Reconciler:
    """Brings a job from the state it is in to the one it should be in."""

    def __init__(
        self,
        client: ApiClient,
        cache: ObjectCache,
        facts: JobFacts,
        tracker: ProgressTracker,
        deliverer: Deliverer,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._client, self._cache, self._facts = client, cache, facts
        self._tracker, self._deliverer, self._metrics = tracker, deliverer, metrics
        self._settings = settings
        self._observer = Observer(client, cache, facts, settings)
        self._children = Children(client, cache, facts, settings)

    async def __call__(self, key: Key) -> float | None:
        """Reconcile one job. Returns the seconds until it is due again, None when only an event brings it back."""
        raw = self._cache.job(key)
        if raw is None:
            self._metrics.jobs.remove(*key)
            return None
        try:
            job, ignored = parse_api_object(raw)
        except ValidationError as error:
            # The API server accepts the object and this operator cannot read it: it is of another version.
            faults = "; ".join(f"{path} {message}" for path, message in validation_faults(error)[:3])
            log.error("%s/%s cannot be read: %s", *key, faults)  # noqa: TRY400 - the faults say it all
            status = invalid_spec_status(raw, faults, self._client.clock.now())
            saved = status is None or await self._save(raw, status)
            return INVALID_SPEC_SECONDS if saved else 0.0
        job = with_defaults(job, self._settings.of(key[0]))
        if ignored and self._facts.set_ignored_fields(raw["metadata"]["uid"], job.metadata.generation):
            log.warning(
                "%s/%s: fields that this release does not know are ignored: %s", *key, ", ".join(ignored)
            )
        attempt = job.status.attempt if job.status else None
        with logs.job(*key, attempt), self._metrics.reconcile_seconds.time():
            uid, begun = str(raw["metadata"]["uid"]), time.monotonic()
            try:
                delay = await self._reconcile(key, raw, job)
            except ApiError as error:
                # Who asked for a pause will answer after it.
                if error.code != 429 and self._facts.count_failure(uid, begun):
                    with contextlib.suppress(ApiError):
                        await self._tell_failure(key, uid, error)
                raise
            self._facts.clear_failures(uid)
            return delay

    async def _reconcile(self, key: Key, raw: dict[str, Any], job: QLoRAJob) -> float | None:
        uid, now = str(raw["metadata"]["uid"]), self._client.clock.now()
        seen = self._observer.known(job, uid)
        decision = decide(job, seen, now)
        while decision.reads:  # each time others, so at most as often as there are kinds of them
            seen = await self._observer.read(seen, decision.reads, key, job, uid)
            decision = decide(job, seen, now)
        # With actions even a status that is as it was, so that the API server tells whether the job is, too.
        if not await self._save(raw, decision.status, always=bool(decision.actions)):
            return 0.0
        job_metrics.record(self._metrics, key, job.status, decision.status, now)
        self._notify(key, uid, job, decision.status)
        try:
            for action in decision.actions:
                if not await self._children.act(action, job, uid):
                    return 0.0
        finally:  # the status says it, whether or not it could be acted upon
            for event in decision.events:
                await self._post(job, uid, event)
        last = decision.status.attempts[-1] if decision.status.attempts else None
        if decision.status.phase in RUNNING_PHASES and last is not None and last.job_uid is not None:
            self._tracker.track(key, uid, last.attempt, last.job_uid, seen.pods or ())
        else:
            self._tracker.untrack(uid)
        return None if decision.look_at is None else max((decision.look_at - now).total_seconds(), 0.0)

    # --- save

    async def _save(self, raw: dict[str, Any], status: QLoRAJobStatus, *, always: bool = False) -> bool:
        """Whether the job has this status now. Otherwise it has changed since it was read, and the decision is void.

        A status that is as it was is not written, unless `always`.
        """
        new = status.model_dump(by_alias=True, mode="json", exclude_none=True, exclude_defaults=False)
        if not always and _without_empty(new) == _without_empty(raw.get("status") or {}):
            return True
        try:
            self._cache.put_job(await self._client.save_status({**raw, "status": new}))
        except ApiError as error:
            if error.code not in (404, 409):
                raise
        else:
            return True
        # The watch may be behind: the cache has to know the job as it is before it is looked at again.
        key = (raw["metadata"]["namespace"], raw["metadata"]["name"])
        try:
            self._cache.put_job(await self._client.get(QLORAJOBS, *key))
        except ApiError as error:
            if error.code != 404:
                raise
            self._cache.drop_job(key, raw["metadata"]["uid"])
        return False

    # --- tell

    def _notify(self, key: Key, uid: str, job: QLoRAJob, status: QLoRAJobStatus) -> None:
        """Offer what the receiver, if there is one, was not told yet."""
        url = self._settings.of(key[0]).notifications.url
        if url is None or managed_elsewhere(job):
            return
        for notice in undelivered(status, self._client.clock.now()):
            self._deliverer.offer(key, uid, url, notice, cloud_event(job, status, uid, notice))

    async def _tell_failure(self, key: Key, uid: str, error: ApiError) -> None:
        """What the API server fails at, in the status and an Event."""
        raw = self._cache.job(key)
        if raw is None or raw["metadata"]["uid"] != uid:
            return
        job = with_defaults(parse_api_object(raw)[0], self._settings.of(key[0]))
        if managed_elsewhere(job):
            return
        decision = api_failure(
            job, Observation(self._cache.attempt_jobs(uid)), str(error), self._client.clock.now()
        )
        if decision is not None and await self._save(raw, decision.status):
            for event in decision.events:
                await self._post(job, uid, event)

    async def _post(self, job: QLoRAJob, uid: str, event: Event) -> None:
        """Post an Event. If that fails, the status says it, too."""
        body = event_body(job, uid, event.type, event.reason, event.message, self._client.clock.now())
        log.info("%s: %s", event.reason, event.message)
        try:
            await self._client.create(EVENTS, str(job.metadata.namespace), body)
        except ApiError as error:
            level = logging.DEBUG if error.reason == NAMESPACE_TERMINATING else logging.WARNING
            log.log(level, "an event could not be posted: %s", error)


def _without_empty(value: Any) -> Any:
    """Without empty lists and maps: the API server keeps them, and pydantic may or may not write them."""
    if isinstance(value, dict):
        items = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item not in ([], {}, None)}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value
