"""One job's reconciliation: against a real API server, without the watches, which the tests play."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from builders import ON_ONE_CLAIM, job_manifest, merged
from qlora_operator.api.names import TIER_LABELS, Key, Phase
from qlora_operator.controller import reconciler
from qlora_operator.controller.api_client import ApiClient
from qlora_operator.controller.cache import ObjectCache
from qlora_operator.controller.job_facts import JobFacts
from qlora_operator.controller.metrics import JobSample, Metrics
from qlora_operator.controller.reconciler import Reconciler
from qlora_operator.settings import Settings
from qlora_operator.status.notices import Notice
from qlora_operator.status.observation import Pod
from testcluster.client import Client
from testcluster.cluster import Cluster as Server
from testcluster.kubelet import Kubelet

NODE = dict.fromkeys(TIER_LABELS["avx512"], "true")
PATH = "/apis/qlora.dev/v1alpha1/namespaces/{}/qlorajobs"


class Requests(Metrics):
    """Metrics that remember each request that changes something."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry(), "1")
        self.writes: list[str] = []
        self.asked = 0

    def api_request(self, verb: str, resource: str, code: int | None, seconds: float) -> None:
        """One request."""
        self.asked += 1
        if verb != "get":
            self.writes.append(f"{verb} {resource} {code}")


class Tracker:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def track(self, key: Key, uid: str, attempt: int, job_uid: str, pods: Sequence[Pod]) -> None:
        """An attempt runs."""
        self.told.append((key, attempt, len(pods)))

    def untrack(self, uid: str) -> None:
        """The job does not run."""
        self.told.append("ended")


class Deliverer:
    """Remembers what it is offered."""

    def __init__(self) -> None:
        self.offered: list[tuple[str, dict[str, Any]]] = []

    def offer(self, key: Key, uid: str, url: str, notice: Notice, event: dict[str, Any]) -> None:
        """Something has happened."""
        self.offered.append((url, event))


class Table:
    """A reconciler, what it knows, and the job's namespace."""

    def __init__(self, client: Client, cluster: ApiClient, metrics: Requests, namespace: str) -> None:
        self.client, self.metrics, self.namespace = client, metrics, namespace
        self.key = (namespace, "job")
        self.path = PATH.format(namespace)
        self.store = ObjectCache()
        settings = Settings(trainer_image="registry.example/trainer:1")
        self.facts, self.tracker, self.deliverer = JobFacts(), Tracker(), Deliverer()
        self.reconciler = Reconciler(
            cluster, self.store, self.facts, self.tracker, self.deliverer, settings, metrics
        )

    def create(self, **spec: Any) -> dict[str, Any]:
        """A job, and the store knows it."""
        body = job_manifest(**merged({**ON_ONE_CLAIM, "topology": {"pods": 2}}, spec))
        raw: dict[str, Any] = self.client.post(self.path, body)
        self.store.put_job(raw)
        return raw

    def tell(self) -> None:
        """What the watches would have told by now."""
        self.store.put_job(self.client.get(f"{self.path}/job"))
        for raw in self.client.items(f"/apis/batch/v1/namespaces/{self.namespace}/jobs"):
            self.store.put_attempt_job(raw)

    async def turn(self) -> float | None:
        """Reconcile once."""
        return await self.reconciler(self.key)

    @property
    def status(self) -> dict[str, Any]:
        """As the API server has it."""
        return dict(self.client.get(f"{self.path}/job").get("status") or {})

    def children(self, kind: str) -> list[str]:
        """The names of the job's children."""
        return [raw["metadata"]["name"] for raw in self.client.items(kind.format(self.namespace))]


Test = Callable[[Table], Coroutine[Any, Any, None]]


@pytest.fixture
def play(
    api_cluster: Server, crd: None, kubelet: Kubelet, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Test], None]]:
    """play(test): run a coroutine function with a Table."""
    monkeypatch.setenv("KUBECONFIG", str(api_cluster.kubeconfig))
    kubelet.add_node(f"node-of-{namespace}", labels=NODE)

    def run(test: Test) -> None:
        async def main() -> None:
            metrics = Requests()
            async with ApiClient(metrics) as cluster:
                await test(Table(api_cluster.client, cluster, metrics, namespace))

        asyncio.run(asyncio.wait_for(main(), 60))

    return run


@pytest.mark.cluster
def test_a_new_job_is_begun_in_one_turn(play: Callable[[Test], None]) -> None:
    """The attempt is in the status before its children are created, each with one request, and the pods are
    looked at some seconds later."""

    async def test(table: Table) -> None:
        table.create()
        wait = await table.turn()
        first, *rest = table.metrics.writes
        assert first == "put qlorajobs 200"
        assert sorted(rest) == ["post jobs 201", "post networkpolicies 201", "post services 201"]
        assert (table.status["phase"], table.status["attempt"]) == ("Starting", 0)
        assert wait is not None
        assert 0 < wait <= 3

    play(test)


@pytest.mark.cluster
def test_a_turn_without_news_asks_for_nothing(play: Callable[[Test], None]) -> None:
    """A job whose attempt starts is neither written nor looked at again before its time."""

    async def test(table: Table) -> None:
        table.create()
        await table.turn()
        asked = table.metrics.asked
        await table.turn()
        assert table.metrics.asked == asked

    play(test)


@pytest.mark.cluster
def test_nothing_is_done_about_a_job_that_has_changed(play: Callable[[Test], None]) -> None:
    """A decision about what the job was is void: nothing is created, and the job is looked at as it is now."""

    async def test(table: Table) -> None:
        table.create()
        table.client.patch(f"{table.path}/job", {"spec": {"suspend": True}})
        assert await table.turn() == 0.0
        assert table.children("/apis/batch/v1/namespaces/{}/jobs") == []
        await table.turn()
        assert table.status["phase"] == "Suspended"

    play(test)


@pytest.mark.cluster
def test_a_job_that_is_gone_is_forgotten(play: Callable[[Test], None]) -> None:
    """When it turns out that the job is no more, nothing is created, and its metrics go with it."""

    async def test(table: Table) -> None:
        table.create()
        table.metrics.jobs.set(*table.key, JobSample(Phase.PENDING))
        table.client.delete(f"{table.path}/job")
        assert await table.turn() == 0.0
        assert table.store.jobs() == {}
        assert await table.turn() is None
        assert next(table.metrics.jobs.collect()).samples == []

    play(test)


@pytest.mark.cluster
def test_a_child_that_is_somebody_elses_is_left_alone(play: Callable[[Test], None]) -> None:
    """Where a child's name is taken, the status says by what, and the job begins when the name is free."""

    async def test(table: Table) -> None:
        services = f"/api/v1/namespaces/{table.namespace}/services"
        table.client.post(services, {"metadata": {"name": "job-ranks"}, "spec": {"clusterIP": "None"}})
        table.create()
        assert await table.turn() == 0.0
        await table.turn()
        assert "a Service named job-ranks is there that is not this job's" in table.status["message"]
        table.client.delete(f"{services}/job-ranks")
        await table.turn()
        assert table.children("/apis/batch/v1/namespaces/{}/jobs") == ["job-a0"]

    play(test)


@pytest.mark.cluster
def test_what_is_missing_is_created_again(play: Callable[[Test], None]) -> None:
    """Of the children that attempts share, the one that is gone comes back, and the other stays."""

    async def test(table: Table) -> None:
        uid = table.create()["metadata"]["uid"]
        await table.turn()
        path = f"/api/v1/namespaces/{table.namespace}/services/job-ranks"
        table.client.delete(path)
        table.facts.set_children_missing([uid])
        await table.turn()
        assert table.children("/api/v1/namespaces/{}/services") == ["job-ranks"]
        assert not table.facts.children_missing(uid)
        assert table.metrics.writes[-1].startswith("post ")

    play(test)


@pytest.mark.cluster
def test_a_suspended_job_loses_its_gang(play: Callable[[Test], None]) -> None:
    """The Job is deleted, once."""

    async def test(table: Table) -> None:
        table.create()
        await table.turn()
        table.client.patch(f"{table.path}/job", {"spec": {"suspend": True}})
        table.tell()
        await table.turn()
        assert table.metrics.writes.count("delete jobs 200") == 1

    play(test)


@pytest.mark.cluster
@pytest.mark.parametrize("deleting", [False, True])
def test_a_gang_that_is_gone_is_forgotten_at_once(play: Callable[[Test], None], deleting: bool) -> None:
    """Although the watch has missed its end: the attempt does not wait for the next sweep."""

    async def test(table: Table) -> None:
        table.create()
        await table.turn()
        path = f"/apis/batch/v1/namespaces/{table.namespace}/jobs/job-a0"
        raw = table.client.get(path)
        table.client.delete(path, {"propagationPolicy": "Background"})
        if deleting:
            raw["metadata"] |= {"deletionTimestamp": "2026-01-31T12:00:00Z", "resourceVersion": "999999999"}
            table.store.put_attempt_job(raw)
        table.client.patch(f"{table.path}/job", {"spec": {"suspend": True}})
        table.store.put_job(table.client.get(f"{table.path}/job"))
        async with asyncio.timeout(20):
            while "end" not in table.status["attempts"][0]:
                await table.turn()
                await asyncio.sleep(0.05)
        assert table.store.attempt_job_uids() == set()

    play(test)


@pytest.mark.cluster
def test_running_jobs_are_followed_and_ends_are_counted_once(
    play: Callable[[Test], None], kubelet: Kubelet
) -> None:
    """Who asks for progress is told when an attempt runs and when it has ended; the end is counted, and not again
    when the job is looked at later."""

    async def test(table: Table) -> None:
        told = table.tracker.told
        table.create()
        await table.turn()
        pods = kubelet.pods(table.namespace, "qlora.dev/job-name=job", 2)
        for each in pods:
            kubelet.running(each)
        await _until(table, "Running")
        assert (table.key, 0, 2) in told
        for each in pods:
            kubelet.succeeded(each)
        await _until(table, "Succeeded")
        await table.turn()
        assert told[-1] == "ended"
        ends = [s for s in table.metrics.jobs_finished.collect()[0].samples if s.name.endswith("_total")]
        assert [(s.labels, s.value) for s in ends] == [
            ({"namespace": table.namespace, "phase": "Succeeded"}, 1.0)
        ]

    play(test)


@pytest.mark.cluster
def test_what_cannot_be_read_is_said(play: Callable[[Test], None]) -> None:
    """An object that only another version of the operator understands is InvalidSpec, with the field."""

    async def test(table: Table) -> None:
        raw = table.create()
        raw["spec"]["training"]["schedule"] = "polynomial"
        table.store.put_job(raw)
        assert await table.turn() == reconciler.INVALID_SPEC_SECONDS
        assert "spec.training.schedule is the string 'polynomial'" in table.status["message"]

    play(test)


@pytest.mark.cluster
def test_orphans_are_seen_before_another_gang_starts(play: Callable[[Test], None], kubelet: Kubelet) -> None:
    """A Job that was deleted without its pods does not make room for another one while they live."""

    async def test(table: Table) -> None:
        table.create()
        await table.turn()
        kubelet.pods(table.namespace, "qlora.dev/job-name=job", 2)
        table.tell()
        raw = table.client.items(f"/apis/batch/v1/namespaces/{table.namespace}/jobs")[0]
        path = f"/apis/batch/v1/namespaces/{table.namespace}/jobs/job-a0"
        table.client.delete(path, {"propagationPolicy": "Orphan"})
        async with asyncio.timeout(20):
            while table.children("/apis/batch/v1/namespaces/{}/jobs"):
                await asyncio.sleep(0.05)
        table.store.drop_attempt_job(
            raw["metadata"]["labels"]["qlora.dev/job-uid"], "job-a0", raw["metadata"]["uid"]
        )
        await table.turn()
        assert table.metrics.writes.count("post jobs 201") == 1
        assert table.metrics.writes.count("delete pods 200") == 2

    play(test)


async def _until(table: Table, phase: str) -> None:
    """Reconcile, as often as the watches would have it, until the job is so."""
    async with asyncio.timeout(20):
        while table.status.get("phase") != phase:
            await asyncio.sleep(0.05)
            table.tell()
            await table.turn()
