"""What the watches' events and the sweep make of the store and the queue."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import kopf
import pytest

from builders import ON_ONE_CLAIM, batch_job, job_manifest
from qlora_operator.controller import handlers
from qlora_operator.controller.api_client import BATCH_JOBS, QLORAJOBS, ApiError, Resource
from qlora_operator.controller.handlers import NullDiffBase, Operator
from testcluster.cluster import Cluster as Server

KEY = ("team", "job")


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operator:
    """One that has not started."""
    return made(tmp_path, monkeypatch)


def made(folder: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Operator:
    """An operator with these variables set."""
    settings = folder / "settings.yaml"
    settings.write_text("trainerImage: registry.example/trainer:1\n")
    monkeypatch.setenv(handlers.CONFIG_ENV, str(settings))
    monkeypatch.setenv(handlers.PORT_ENV, "0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Operator()


def job(version: int = 1, uid: str = "uid", **status: Any) -> dict[str, Any]:
    """A QLoRAJob."""
    metadata = {"namespace": "team", "uid": uid, "resourceVersion": str(version)}
    return job_manifest(metadata=metadata, status=status)


def child_job(version: int = 1, **status: Any) -> dict[str, Any]:
    """Its Job."""
    return batch_job(job_uid="uid", metadata={"uid": "g", "resourceVersion": str(version)}, status=status)


def happens(operator: Operator, kind: str | None, raw: dict[str, Any]) -> list[tuple[str, str]]:
    """An event comes in; the keys that wait then to be reconciled."""
    handler: Any = handlers._job if "labels" not in raw["metadata"] else handlers._attempt_job

    async def main() -> list[tuple[str, str]]:
        await handler(event={"type": kind, "object": raw}, memo=SimpleNamespace(operator=operator))
        return waiting(operator)

    return asyncio.run(main())


def waiting(operator: Operator) -> list[tuple[str, str]]:
    """The keys that are to be reconciled, which then are not any more."""
    found = []
    while (key := operator.queue._take()[0]) is not None:
        found.append(key)
    return found


# --- events


def test_a_job_is_known_and_reconciled(operator: Operator) -> None:
    """Whether it was there from the start, is new or has changed."""
    assert happens(operator, None, job(1)) == [KEY]
    assert happens(operator, "MODIFIED", job(2, phase="Running")) == [KEY]
    assert (operator.cache.job(KEY) or {})["status"] == {"phase": "Running"}


def test_what_the_operator_wrote_itself_is_no_news(operator: Operator) -> None:
    """The echo of our own write, and what is older, wake nobody."""
    operator.cache.put_job(job(5, phase="Starting"))

    assert happens(operator, "MODIFIED", job(5, phase="Starting")) == []
    assert happens(operator, "MODIFIED", job(4)) == []


def test_a_job_that_is_deleted_is_forgotten(operator: Operator) -> None:
    """It is reconciled once more, and everything that was kept of it goes."""
    happens(operator, "ADDED", job(1))
    operator.facts.set_children_missing(["uid"])

    assert happens(operator, "DELETED", job(2)) == [KEY]
    assert operator.cache.jobs() == {}
    assert not operator.facts.children_missing("uid")


def test_only_facts_of_a_batch_job_wake_its_qlorajob(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Job's change matters when it changes what decisions need: not each of its pods' comings and goings."""
    monkeypatch.setattr(handlers, "COALESCE_SECONDS", 0.0)
    assert happens(operator, "ADDED", child_job(1, active=1)) == [KEY]
    assert happens(operator, "MODIFIED", child_job(2, active=2)) == []
    assert happens(operator, "MODIFIED", child_job(3, active=2, ready=2)) == [KEY]
    assert happens(operator, "DELETED", child_job(4)) == [KEY]
    assert operator.cache.attempt_jobs("uid") == ()


def test_a_healthy_batch_job_yields_to_jobs_without_pods(operator: Operator) -> None:
    """That pods are up is told a moment later, so that jobs that have none yet go first; a failure at once."""
    failed = {"type": "FailureTarget", "status": "True", "lastTransitionTime": "2026-01-31T12:00:00Z"}

    assert happens(operator, "MODIFIED", child_job(1, ready=2)) == []
    assert KEY in operator.queue._delayed
    assert happens(operator, "MODIFIED", child_job(2, conditions=[failed])) == [KEY]


# --- the sweep


class Lists:
    """An API server that lists these objects; something happens before it does."""

    def __init__(self, listed: list[dict[str, Any]], happens: Callable[[], object]) -> None:
        self.listed, self.happens = listed, happens

    async def list_all(
        self, resource: Resource, namespace: str | None, selector: str = ""
    ) -> AsyncIterator[dict[str, Any]]:
        """The Jobs, and nothing of another kind."""
        if resource != BATCH_JOBS:
            return
        self.happens()
        for raw in self.listed:
            yield raw


@pytest.mark.parametrize(
    ("known", "listed", "event", "left"),
    [
        pytest.param([], [], "ADDED", {"g"}, id="created since"),
        pytest.param([child_job()], [child_job()], "DELETED", set(), id="deleted since"),
        pytest.param([child_job()], [], None, set(), id="its end was missed"),
    ],
)
def test_a_sweep_knows_that_its_lists_are_old(
    operator: Operator, known: Any, listed: Any, event: str | None, left: set[str]
) -> None:
    """What was created since the list was made stays known, and what was deleted does not come back."""

    async def main() -> None:
        def happen() -> None:
            if event == "ADDED":
                operator.cache.put_attempt_job(child_job(2))
            elif event == "DELETED":
                operator.cache.drop_attempt_job("uid", "job-a0", "g")

        for raw in known:
            operator.cache.put_attempt_job(raw)
        operator.client = Lists(listed, happen)  # type: ignore[assignment]
        await operator.resync()

    asyncio.run(main())

    assert operator.cache.attempt_job_uids() == left


class Tenants(Lists):
    """An API server that refuses the lists of some namespaces."""

    def __init__(self, refused: set[str], code: int = 403) -> None:
        super().__init__([], lambda: None)
        self.refused, self.code = refused, code

    async def list_all(
        self, resource: Resource, namespace: str | None, selector: str = ""
    ) -> AsyncIterator[dict[str, Any]]:
        """The namespace's job and nothing else."""
        if namespace in self.refused:
            raise ApiError(self.code, "Forbidden", "no")
        if resource == QLORAJOBS:
            yield job_manifest(metadata={"namespace": namespace, "uid": namespace, "resourceVersion": "2"})


@pytest.mark.parametrize(
    ("refused", "code", "queued", "fails"),
    [
        pytest.param(set(), 403, ["a", "b"], False, id="none"),
        pytest.param({"a"}, 403, ["b"], False, id="a RoleBinding is gone"),
        pytest.param({"a"}, 404, ["b"], False, id="a namespace is gone"),
        pytest.param({"a", "b"}, 403, [], True, id="all"),
        pytest.param({"a"}, 0, [], True, id="the API server does not answer"),
    ],
)
def test_a_namespace_that_refuses_the_operator_stops_no_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: set[str],
    code: int,
    queued: list[str],
    *,
    fails: bool,
) -> None:
    """Who administers a namespace may take the operator's role from it. What was known there stays known."""

    async def main() -> Operator:
        operator = made(tmp_path, monkeypatch, **{handlers.NAMESPACES_ENV: "a,b"})
        known = job_manifest(metadata={"namespace": "a", "uid": "a", "resourceVersion": "1"})
        operator.cache.put_job(known)
        operator.client = Tenants(refused, code)  # type: ignore[assignment]
        with pytest.raises(ApiError) if fails else contextlib.nullcontext():
            await operator.resync()
        return operator

    operator = asyncio.run(main())

    assert [key[0] for key in waiting(operator)] == queued
    assert ("a", "job") in operator.cache.jobs()


def test_kopf_never_gives_up_a_request() -> None:
    """It ends the whole operator when its tries are used up, for one namespace that refuses it."""
    tries = list(itertools.islice(handlers.Backoffs(), 1000))

    assert sum(tries) > 1000
    assert max(tries) <= 30


# --- the settings


def test_namespaces_are_those_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them when none is."""
    assert made(tmp_path, monkeypatch, **{handlers.NAMESPACES_ENV: "a,b"}).namespaces == ("a", "b")
    assert made(tmp_path, monkeypatch, **{handlers.NAMESPACES_ENV: ""}).namespaces == ()


def test_kopf_keeps_nothing_of_an_object() -> None:
    """What kopf compares objects by is empty, whatever the object, and nothing is stored on it."""
    body, patch = kopf.Body({"metadata": {"name": "x"}, "spec": {"field": 1}}), kopf.Patch()
    storage = NullDiffBase()

    assert storage.build(body=body) == {}
    assert storage.fetch(body=body) is None
    storage.store(body=body, patch=patch, essence=storage.build(body=body))
    assert not patch


# --- probes


def test_ready_once_the_first_resync_is_through(operator: Operator) -> None:
    """Until the first resync is through, readiness says so."""
    assert operator.readiness() == "the first resync has not completed"
    operator.resynced = time.monotonic()
    assert operator.readiness() is None


def test_alive_while_it_reconciles(operator: Operator) -> None:
    """A job that waits for too long, or a resync that does not come, is what a restart may help against."""
    assert operator.liveness() is None
    late = time.monotonic() - operator.settings.stuck_seconds - 10
    operator.queue._ready["team"] = {KEY: late}
    assert operator.liveness() is None, "another operator leads, and nothing is due here"
    operator.queue._finished = late
    assert "none has been reconciled for" in str(operator.liveness())
    operator.queue._finished = time.monotonic()
    assert operator.liveness() is None, "others have been, and its turn will come"
    operator.queue._ready.clear()
    operator.queue._busy[KEY] = late - operator.settings.stuck_seconds
    assert "a job has been in reconciliation" in str(operator.liveness())
    operator.queue._busy.clear()
    operator.resync_tried = late - 2 * operator.settings.sweep_seconds
    assert operator.liveness() == "the last resync was too long ago"


# --- against an API server


def against(
    server: Server,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    namespace: str,
    test: Callable[[Operator], Coroutine[Any, Any, None]],
) -> None:
    """Run a coroutine function with an operator that has the namespace and does not reconcile."""
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))

    async def main() -> None:
        operator = made(folder, monkeypatch, **{handlers.NAMESPACES_ENV: namespace})
        operator.queue = handlers.WorkQueue(operator.reconciler, workers=0)
        async with operator.client:
            await test(operator)

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.cluster
def test_the_sweep_sees_what_the_watches_missed(
    api_cluster: Server, crd: None, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that nobody told of is known afterwards, one that is gone is forgotten, and a missing Service shows."""
    path = f"/apis/qlora.dev/v1alpha1/namespaces/{namespace}/qlorajobs"
    uid = api_cluster.client.post(path, job_manifest(**ON_ONE_CLAIM))["metadata"]["uid"]
    gone = job_manifest("gone", metadata={"namespace": namespace, "uid": "gone", "resourceVersion": "1"})

    async def test(operator: Operator) -> None:
        operator.cache.put_job(gone)
        await operator.resync()
        assert operator.cache.jobs() == {(namespace, "job"): uid}
        assert sorted(waiting(operator)) == sorted([(namespace, "gone"), (namespace, "job")])
        assert operator.facts.children_missing(uid)
        assert not operator.facts.children_missing("gone")

    against(api_cluster, tmp_path, monkeypatch, namespace, test)


@pytest.mark.cluster
def test_it_starts_and_stops(
    api_cluster: Server, crd: None, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started, it sweeps by itself, is ready and shows its metrics; stopped, nothing of it is left."""
    monkeypatch.setenv("KUBECONFIG", str(api_cluster.kubeconfig))

    async def main() -> None:
        operator = made(tmp_path, monkeypatch, **{handlers.NAMESPACES_ENV: namespace})
        before = asyncio.all_tasks()
        await operator.start()
        while operator.readiness() is not None:
            await asyncio.sleep(0.01)
        # Of IPv6 it has another free port.
        (port,) = (address[1] for address in operator._server.addresses if address[0] == "0.0.0.0")
        url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
            text = await answer.text()
        assert "qlora_last_successful_sweep_timestamp_seconds" in text
        assert handlers.operator_of(SimpleNamespace(operator=operator)) is operator
        await operator.stop()
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(main(), 60))
