"""kopf: events in, one queue. Run with `kopf run -m qlora_operator.handlers`, or as `python -m qlora_operator`.

Only on.event handlers are used: kopf then leaves no annotation and no finalizer on anybody's objects.
"""

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import time
from pathlib import Path
from typing import Any, cast

import kopf
from prometheus_client import CollectorRegistry

from qlora_operator import metrics
from qlora_operator.api import names
from qlora_operator.cluster import GANGS, JOBS, NETWORK_POLICIES, PAGE, SERVICES, ApiError, Cluster
from qlora_operator.poller import Poller
from qlora_operator.reconcile import Reconciler
from qlora_operator.settings import load_settings
from qlora_operator.store import Store, key_of, owner_key
from qlora_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

CONFIG_ENV = "QLORA_OPERATOR_CONFIG"
"""Path of the settings."""
NAMESPACES_ENV = "QLORA_OPERATOR_NAMESPACES"
"""Namespaces to serve, separated by commas; unset or empty: all."""
PORT_ENV = "QLORA_OPERATOR_PORT"
"""Port of /metrics, /healthz and /readyz."""
PORT = 8471
SWEEP_RETRY_SECONDS = 5.0
"""When a sweep that failed is made again."""
IDLE_SECONDS = 0.5
"""For how long kopf keeps an object, with a task of its own, after its last event: at the start, all of them."""
CALM_SECONDS = 0.1
"""After which it is told that pods are up. In a rush, jobs that have none yet go first thereby (see workqueue)."""
LOGIN_SECONDS = 2.0
"""Between two logins."""


class NoDiffs(kopf.DiffBaseStorage):
    """kopf copies every object twice to tell later what has changed in it. Nobody asks that here, and it was a
    third of all that the operator's processor did."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        """Nothing to compare."""
        return cast(kopf.BodyEssence, {})

    def fetch(self, **_: Any) -> None:
        """Nothing to compare with."""

    def store(self, **_: Any) -> None:
        """Nothing to keep."""


class Operator:
    """Everything one operator holds. The watches' events go into `store` and `queue`."""

    def __init__(self) -> None:
        self.settings = load_settings(Path(os.environ.get(CONFIG_ENV) or "/etc/qlora-operator/settings.yaml"))
        self.namespaces = tuple(filter(None, os.environ.get(NAMESPACES_ENV, "").split(",")))
        self.metrics = metrics.Metrics(CollectorRegistry(), importlib.metadata.version("qlora-operator"))
        self.store = Store()
        self.cluster = Cluster(self.metrics, self.namespaces)
        self.reconciler = Reconciler(self.cluster, self.store, self.settings, self.metrics)
        self.queue = WorkQueue(self.reconciler, failed=self.metrics.reconcile_errors.inc)
        self.swept = 0.0
        self.tried = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin; the watches follow."""
        await self.cluster.__aenter__()
        self.poller = Poller(self.cluster, self.reconciler, self.queue)
        self.reconciler.follow = self.poller.follow
        self.reconciler.unfollow = self.poller.forget
        port = int(os.environ.get(PORT_ENV) or PORT)
        self._server = await metrics.serve(self.metrics.registry, port, self.liveness, self.readiness)
        self.metrics.queue_depth.set_function(lambda: len(self.queue))
        self.metrics.workers_busy.set_function(lambda: self.queue.busy)
        self.queue.start()
        self._tasks = [asyncio.create_task(self._sweeps())]

    async def stop(self) -> None:
        """End: what is being done is done, nothing is begun."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.queue.stop()
        await self.poller.close()
        await self._server.cleanup()
        await self.cluster.__aexit__()

    # --- the sweep

    async def _sweeps(self) -> None:
        while True:
            self.tried = time.monotonic()
            try:
                await self.sweep()
                self.swept = time.monotonic()
                self.metrics.sweep_time.set_to_current_time()
                await asyncio.sleep(self.settings.sweep_seconds)
            except ApiError as error:
                log.warning("the sweep failed: %s", error)
                await asyncio.sleep(error.retry_after or SWEEP_RETRY_SECONDS)
            except Exception:
                log.exception("the sweep failed")
                await asyncio.sleep(SWEEP_RETRY_SECONDS)

    async def sweep(self) -> None:
        """Take stock: what the watches may have missed, above all what has gone."""
        known = self.store.jobs()
        selector = names.JOB_UID_LABEL
        gangs = set()
        async for raw in self.cluster.all(GANGS, selector):
            self.store.put_gang(raw)
            gangs.add(raw["metadata"]["uid"])
        jobs = set()
        async for raw in self.cluster.all(JOBS):
            self.store.put_job(raw)
            jobs.add(raw["metadata"]["uid"])
        for key, uid in known.items():
            if uid not in jobs:
                self.drop(key, uid)
        self.store.drop_gangs_but(gangs)
        await self._look_for_missing()
        for key in self.store.jobs():
            self.queue.add(key)

    async def _look_for_missing(self) -> None:
        """Services and NetworkPolicies are not watched: who deletes one gets it back with the next sweep."""
        selector = names.JOB_UID_LABEL
        owners = [
            {raw["metadata"]["labels"][selector] async for raw in self.cluster.all(resource, selector)}
            for resource in (SERVICES, NETWORK_POLICIES)
        ]
        complete = set.intersection(*owners)
        self.reconciler.incomplete.update(set(self.store.jobs().values()) - complete)

    def drop(self, key: names.Key, uid: str) -> None:
        """A job is gone."""
        self.store.drop_job(key, uid)
        self.poller.forget(uid)
        self.reconciler.forget(uid)
        self.queue.add(key)

    # --- probes

    def liveness(self) -> str | None:
        """What is wrong with this process; an API server that does not answer is not."""
        if self.queue.oldest() > self.settings.stuck_seconds:
            return f"a job has waited for {self.queue.oldest():.0f} s to be reconciled"
        if time.monotonic() - self.tried > 2 * self.settings.sweep_seconds + self.settings.stuck_seconds:
            return "the jobs were not looked at for long"
        return None

    def readiness(self) -> str | None:
        """Why it does not reconcile yet."""
        return None if self.swept else "the jobs were not looked at yet"


def of(memo: Any) -> Operator:
    """The operator that kopf carries around."""
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
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.persistence.diffbase_storage = NoDiffs()
    settings.queueing.idle_timeout = IDLE_SECONDS
    memo.operator = Operator()
    settings.watching.inactivity_timeout = memo.operator.settings.watch_inactivity_seconds
    # A role of one namespace lets nobody see which namespaces and kinds there are.
    settings.scanning.disabled = bool(memo.operator.namespaces)
    await memo.operator.start()


@kopf.on.cleanup()
async def _stop(memo: kopf.Memo, **_: Any) -> None:
    with contextlib.suppress(AttributeError):  # it never started
        await of(memo).stop()


@kopf.on.login()
async def _login(memo: kopf.Memo, **arguments: Any) -> kopf.ConnectionInfo | None:
    """As whom to watch. Asked again whenever the API server has refused the last answer.

    kopf gives up, and does not always end, when it is told again what was refused before; but a token may be
    replaced late, or refused for a moment. So each answer differs from those before, and none comes soon.
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
    raw, operator = _object(event), of(memo)
    if event["type"] == "DELETED":
        operator.drop(key_of(raw), raw["metadata"]["uid"])
        return
    if operator.store.put_job(raw):
        operator.queue.add(key_of(raw))


@kopf.on.event("batch", "v1", "jobs", labels={names.JOB_UID_LABEL: kopf.PRESENT})
async def _gang(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    raw, operator = _object(event), of(memo)
    if event["type"] == "DELETED":
        operator.store.drop_gang(raw)
    elif not operator.store.put_gang(raw):
        return
    key = owner_key(raw)
    if key is not None:
        operator.queue.add(key, CALM_SECONDS if operator.store.does_well(raw) else 0.0)
