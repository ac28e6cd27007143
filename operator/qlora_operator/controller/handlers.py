"""kopf watches; every event ends in one work queue.

kopf serves as watcher, login and lifecycle only: with on.event handlers alone it leaves no annotation and no finalizer
on any object, and what it offers beyond them (per-object state, diffs, posting, peering) is switched off.
"""

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import itertools
import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import kopf
from prometheus_client import CollectorRegistry

from qlora_operator.api import names
from qlora_operator.controller import metrics
from qlora_operator.controller.api_client import (
    BATCH_JOBS,
    NETWORK_POLICIES,
    PAGE,
    QLORAJOBS,
    SERVICES,
    ApiClient,
    ApiError,
)
from qlora_operator.controller.cache import ObjectCache, job_uid_of, key_of, owner_key
from qlora_operator.controller.job_facts import JobFacts
from qlora_operator.controller.leadership import Leadership
from qlora_operator.controller.notifier import Notifier
from qlora_operator.controller.progress_poller import ProgressPoller
from qlora_operator.controller.reconciler import Reconciler
from qlora_operator.controller.workqueue import WorkQueue
from qlora_operator.desired.network import is_network_policy
from qlora_operator.desired.service import is_ranks_service
from qlora_operator.settings import load_settings

log = logging.getLogger(__name__)

CONFIG_ENV = "QLORA_OPERATOR_CONFIG"
"""Path of the settings file."""
NAMESPACES_ENV = "QLORA_OPERATOR_NAMESPACES"
"""Namespaces to serve, comma-separated; unset or empty: all."""
PORT_ENV = "QLORA_OPERATOR_PORT"
"""Port of /metrics, /healthz and /readyz."""
LEASE_ENV = "QLORA_OPERATOR_LEASE"
"""Lease that the copy which writes holds, as NAMESPACE/NAME; unset or empty: this one always writes."""
PORT = 8471
RESYNC_RETRY_SECONDS = 5.0
"""Delay after a failed resync."""
FIRST_ANSWER_SECONDS = 5.0
"""How long the API server's first answer is waited for."""
IDLE_SECONDS = 0.5
"""How long kopf keeps a task for an object after its last event; at the start it has one for every object."""
COALESCE_SECONDS = 0.1
"""Delay before reconciling for a healthy batch/v1 Job, so that jobs without pods go first under load."""
EXIT_SECONDS = 20.0
"""After how long an operator that was told to stop is killed, whatever it still waits for; it may be at any time."""
LOGIN_SECONDS = 2.0
"""Minimum interval between two logins."""


class Backoffs:
    """Seconds between kopf's tries of a request, without an end: when its tries are used up it ends the whole operator,
    and what one namespace refuses must not stop the others."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((1, 1, 2, 3, 5, 8, 13, 21), itertools.repeat(30.0))


class NullDiffBase(kopf.DiffBaseStorage):
    """kopf copies every object twice, to compute diffs later. None is used here, and the copies took a third of the
    operator's CPU time."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        """An empty essence: nothing to compare."""
        return cast(kopf.BodyEssence, {})

    def fetch(self, **_: Any) -> None:
        """No earlier essence."""

    def store(self, **_: Any) -> None:
        """Stores nothing."""


class Operator:
    """The parts of one running operator. Events of the watches go into `cache` and `queue`."""

    def __init__(self) -> None:
        self.settings = load_settings(Path(os.environ.get(CONFIG_ENV) or "/etc/qlora-operator/settings.yaml"))
        self.namespaces = tuple(filter(None, os.environ.get(NAMESPACES_ENV, "").split(",")))
        self.metrics = metrics.Metrics(CollectorRegistry(), importlib.metadata.version("qlora-operator"))
        self.cache = ObjectCache()
        self.leadership = self._leadership(os.environ.get(LEASE_ENV) or "")
        may_write = self.leadership.may_write if self.leadership else lambda: True
        self.client = ApiClient(self.metrics, may_write)
        self.facts = JobFacts()
        self.poller = ProgressPoller(self.client, self.facts, lambda key: self.queue.add(key))  # noqa: PLW0108 - made below
        self.notifier = Notifier(
            self.facts,
            self.metrics,
            lambda key: self.queue.add(key),  # noqa: PLW0108 - made below
            self.client.clock.now,
            may_write,
        )
        self.reconciler = Reconciler(
            self.client, self.cache, self.facts, self.poller, self.notifier, self.settings, self.metrics
        )
        self.queue = WorkQueue(self.reconciler, failed=self.metrics.reconcile_errors.inc)
        self.resynced = 0.0
        """Monotonic time of the last complete resync; 0: none yet."""
        self.resync_tried = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the parts; kopf starts the watches afterwards. A copy that does not lead knows all that one does which
        leads, and has everything queued."""
        await self.client.__aenter__()
        self.poller.start()
        self.notifier.start()
        port = int(os.environ.get(PORT_ENV) or PORT)
        self._server = await metrics.serve(self.metrics.registry, port, self.liveness, self.readiness)
        with contextlib.suppress(ApiError, TimeoutError):
            # Nothing is decided by this machine's clock: the server's first answer sets ours.
            async with asyncio.timeout(FIRST_ANSWER_SECONDS):
                await anext(self.client.list_all(QLORAJOBS, (*self.namespaces, None)[0]), None)
        self._tasks = [asyncio.create_task(self._resync_forever()), asyncio.create_task(self._start_anew())]
        if self.leadership is None:
            self._lead()
        else:
            await self.leadership.client.__aenter__()
            self._tasks.append(asyncio.create_task(self.leadership.run()))

    async def stop(self) -> None:
        """Stop: finish what is in progress, start nothing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.queue.stop()
        await self.notifier.close()
        if self.leadership is not None:
            await self.leadership.release()
            await self.leadership.client.__aexit__()
        self.metrics.leader.set(0)
        await self.poller.close()
        await self._server.cleanup()
        await self.client.__aexit__()

    # --- leadership

    def _leadership(self, lease: str) -> Leadership | None:
        if not lease:
            return None
        namespace, _, name = lease.partition("/")
        me = f"{socket.gethostname()}_{uuid.uuid4()}"
        return Leadership(ApiClient(self.metrics), namespace, name, me, self._lead, self._exit)

    def _lead(self) -> None:
        self.metrics.leader.set(1)
        self.metrics.queue_depth.set_function(lambda: len(self.queue))
        self.metrics.workers_busy.set_function(lambda: self.queue.busy)
        self.queue.start()

    def _exit(self) -> None:
        """Exit, to be started again."""
        self.metrics.leader.set(0)
        os.kill(os.getpid(), signal.SIGTERM)

    async def _start_anew(self) -> None:
        """Exit, to be started again, if the API server's data go back in time. Versions no longer tell then what is
        newer, neither here nor in the watches, and jobs would go unattended."""
        await self.client.went_back.wait()
        log.critical("the API server's data are older than before, as after a restore: exiting to start anew")
        self._exit()

    # --- resync

    async def _resync_forever(self) -> None:
        while True:
            self.resync_tried = time.monotonic()
            try:
                await self.resync()
                self.resynced = time.monotonic()
                self.metrics.sweep_time.set_to_current_time()
                await asyncio.sleep(self.settings.sweep_seconds)
            except ApiError as error:
                log.warning("resync failed: %s", error)
                await asyncio.sleep(error.retry_after or RESYNC_RETRY_SECONDS)
            except Exception:
                log.exception("resync failed")
                await asyncio.sleep(RESYNC_RETRY_SECONDS)

    async def resync(self) -> None:
        """List everything: finds what the watches have missed, above all deletions.

        A namespace whose lists are refused keeps what is known of it, and holds up no other: whoever administers it may
        have deleted the operator's RoleBinding there.
        """
        refused: dict[str, ApiError] = {}
        for namespace in self.namespaces or (None,):
            try:
                await self._resync(namespace)
            except ApiError as error:
                if namespace is None or error.code not in (403, 404):
                    raise
                refused[namespace] = error
                log.warning("the namespace %s cannot be served: %s", namespace, error)
        self.metrics.namespaces_refused.set(len(refused))
        if refused and len(refused) == len(self.namespaces):
            raise next(iter(refused.values()))

    async def _resync(self, namespace: str | None) -> None:
        """List a namespace, or all.

        A list is as old as its first page. What has been created since then stays, and what was deleted does not come
        back.
        """
        selector = names.JOB_UID_LABEL
        with self.cache.listing():
            known_attempt_jobs, attempt_jobs = self.cache.attempt_job_uids(namespace), set()
            async for raw in self.client.list_all(BATCH_JOBS, namespace, selector):
                self.cache.put_attempt_job(raw)
                attempt_jobs.add(raw["metadata"]["uid"])
            self.cache.drop_attempt_jobs(known_attempt_jobs - attempt_jobs)
            known, jobs = self.cache.jobs(namespace), set()
            async for raw in self.client.list_all(QLORAJOBS, namespace):
                self.cache.put_job(raw)
                jobs.add(raw["metadata"]["uid"])
            for key, uid in known.items():
                if uid not in jobs:
                    self.drop(key, uid)
        # Services and NetworkPolicies are not watched: one that was deleted or edited is restored after a resync.
        as_desired: list[set[str]] = []
        for resource, is_as_desired in ((SERVICES, is_ranks_service), (NETWORK_POLICIES, is_network_policy)):
            as_desired.append(set())
            async for raw in self.client.list_all(resource, namespace, selector):
                uid = raw["metadata"]["labels"][selector]
                self.facts.set_network_exists([uid])
                if is_as_desired(raw, self.settings):
                    as_desired[-1].add(uid)
        as_desired[0] |= self.cache.jobs_of_one_pod(namespace)  # they have none
        complete = set.intersection(*as_desired)
        self.facts.set_children_missing(set(self.cache.jobs(namespace).values()) - complete)
        for key in self.cache.jobs(namespace):
            self.queue.add(key)

    def drop(self, key: names.Key, uid: str) -> None:
        """Forget a job that was deleted."""
        self.cache.drop_job(key, uid)
        self.poller.untrack(uid)
        self.facts.forget(uid)
        self.queue.add(key)

    # --- probes

    def liveness(self) -> str | None:
        """What is wrong with this process; an API server that does not answer does not count."""
        if self.queue.idle() > self.settings.stuck_seconds:
            return f"jobs are due, and none has been reconciled for {self.queue.idle():.0f} s"
        if self.queue.longest() > 2 * self.settings.stuck_seconds:
            return f"a job has been in reconciliation for {self.queue.longest():.0f} s"
        if (
            time.monotonic() - self.resync_tried
            > 2 * self.settings.sweep_seconds + self.settings.stuck_seconds
        ):
            return "the last resync was too long ago"
        return None

    def readiness(self) -> str | None:
        """Why it is not reconciling yet."""
        return None if self.resynced else "the first resync has not completed"


def operator_of(memo: Any) -> Operator:
    """The operator in kopf's memo."""
    operator = memo.operator
    assert isinstance(operator, Operator)
    return operator


@kopf.on.startup()
async def _start(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 300
    settings.watching.connect_timeout = 30
    settings.watching.chunk_size = PAGE
    settings.watching.label_selectors["batch", "v1", "jobs"] = names.JOB_UID_LABEL
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.networking.error_backoffs = Backoffs()
    settings.process.ultimate_exiting_timeout = EXIT_SECONDS
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.persistence.diffbase_storage = NullDiffBase()
    settings.queueing.idle_timeout = IDLE_SECONDS
    memo.operator = Operator()
    settings.watching.inactivity_timeout = memo.operator.settings.watch_inactivity_seconds
    # A namespaced Role does not allow listing namespaces and custom resource definitions.
    settings.scanning.disabled = bool(memo.operator.namespaces)
    await memo.operator.start()


@kopf.on.cleanup()
async def _stop(memo: kopf.Memo, **_: Any) -> None:
    with contextlib.suppress(AttributeError):  # it never started
        await operator_of(memo).stop()


@kopf.on.login()
async def _login(memo: kopf.Memo, **arguments: Any) -> kopf.ConnectionInfo | None:
    """Credentials of the watches. kopf asks again whenever the API server has refused the last ones.

    kopf gives up, and does not always exit, when it gets credentials that were refused before; but a token may be
    rotated late, or refused for a moment. So each answer differs from the ones before, and none comes at once.
    """
    number, last = memo.get("login", (0, 0.0))
    await asyncio.sleep(max(last + LOGIN_SECONDS - time.monotonic(), 0.0) if number else 0.0)
    memo.login = (number + 1, time.monotonic())
    arguments["memo"] = memo
    found = kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)
    return found and dataclasses.replace(found, priority=number)


def _object(event: kopf.RawEvent) -> dict[str, Any]:
    return cast(dict[str, Any], event["object"])


@kopf.on.event(names.GROUP, names.VERSION, names.PLURAL)
async def _job(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    raw, operator = _object(event), operator_of(memo)
    if event["type"] == "DELETED":
        operator.drop(key_of(raw), raw["metadata"]["uid"])
        return
    if operator.cache.put_job(raw):
        operator.queue.add(key_of(raw))


@kopf.on.event("batch", "v1", "jobs", labels={names.JOB_UID_LABEL: kopf.PRESENT})
async def _attempt_job(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    raw, operator = _object(event), operator_of(memo)
    if event["type"] == "DELETED":
        metadata = raw["metadata"]
        operator.cache.drop_attempt_job(job_uid_of(raw), metadata["name"], metadata["uid"])
    elif not operator.cache.put_attempt_job(raw):
        return
    key = owner_key(raw)
    if key is not None:
        operator.queue.add(key, COALESCE_SECONDS if operator.cache.is_healthy(raw) else 0.0)
