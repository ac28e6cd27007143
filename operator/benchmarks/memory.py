"""How much memory the operator's caches need in a large cluster: 5,000 nodes, 5,000 jobs, 100,000 warning Events.

    python operator/benchmarks/memory.py [--nodes 5000] [--jobs 5000] [--events 100000]

The operator's own client, caches and reconciler in this process, with all that the operator imports; instead of an API
server, answers of the size that a real one's have. Half of the jobs run, the others' pods do not start and do not say
why, which costs most to look at; each of these 5,000 pods has its share of the Events. Every job is looked at twice, as
many at a time as the operator does. Prints one JSON object: MiB, and how many objects were handed out.
"""

import argparse
import asyncio
import json
import resource
import time
from collections import Counter as Count
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from qlora_operator.api.names import ATTEMPT_LABEL, JOB_NAME_LABEL, JOB_UID_LABEL, TIER_LABELS, Key
from qlora_operator.controller import handlers, node_cache
from qlora_operator.controller.api_client import PAGE, ApiClient
from qlora_operator.controller.cache import ObjectCache
from qlora_operator.controller.job_facts import JobFacts
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.reconciler import Reconciler
from qlora_operator.settings import Settings

WORKERS = 16
NAMESPACES = 50
NODE_BYTES = 19_000
"""Of a node as the API server sends it: labels of Node Feature Discovery, and fifty images."""
EVENT_BYTES = 1_900
LONG_AGO = "2026-01-31T11:00:00Z"

Object = dict[str, Any]


def memory() -> float:
    """What this process occupies, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def padded(raw: Object, size: int) -> Object:
    """With an annotation that makes its JSON so long."""
    text = "x" * max(0, size - len(json.dumps(raw)))
    return {**raw, "metadata": {**raw["metadata"], "annotations": {"padding": text}}}


def a_node(number: int) -> Object:
    """A node of all tiers, without room for the jobs."""
    labels = {label: "true" for tier in TIER_LABELS.values() for label in tier}
    status = {
        "allocatable": {"cpu": "64", "memory": "256Gi", "pods": "110"},
        "conditions": [{"type": "Ready", "status": "True"}],
        "images": [{"names": [f"registry.example/image-{index}@sha256:{index:064}"]} for index in range(50)],
    }
    return padded(
        {"metadata": {"name": f"node-{number}", "labels": labels}, "spec": {}, "status": status}, NODE_BYTES
    )


def an_event(number: int, about: str) -> Object:
    """A warning."""
    raw = {
        "metadata": {"name": f"event-{number}"},
        "type": "Warning",
        "reason": "FailedCreatePodSandBox",
        "message": "Failed to create pod sandbox",
        "lastTimestamp": LONG_AGO,
        "involvedObject": {"uid": about},
    }
    return padded(raw, EVENT_BYTES)


def key(number: int) -> Key:
    """Namespace and name of a job."""
    return f"team-{number % NAMESPACES}", f"job-{number}"


def a_job(number: int, *, running: bool) -> Object:
    """A job with an attempt that runs, or whose pods have not started for an hour."""
    namespace, name = key(number)
    said = {"message": "as usual", "lastTransitionTime": LONG_AGO}
    state = "True" if running else "False"
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {
            "namespace": namespace,
            "name": name,
            "uid": f"uid-{number}",
            "resourceVersion": "1",
            "generation": 1,
        },
        "spec": {
            "workspace": "pvc://work/here",
            "model": {"source": "pvc://work/model"},
            "dataset": {"source": "pvc://work/data"},
            "training": {"maxSteps": 10},
            "topology": {"pods": 2, "memoryPerRank": "16Gi"},
        },
        "status": {
            "attempt": 0,
            "attempts": [{"attempt": 0, "start": LONG_AGO, "jobUid": f"batch-{number}"}],
            "placement": {"isa": "avx512", "worldSize": 2},
            "startTime": LONG_AGO,
            "conditions": [
                {"type": "Initialized", "status": "True", "reason": "Started", **said},
                {"type": "Running", "status": state, "reason": "Training" if running else "Starting", **said},
            ],
        },
    }


def owned(number: int, name: str, uid: str, owner: str) -> Object:
    """The metadata of a child."""
    namespace, job_name = key(number)
    labels = {JOB_UID_LABEL: f"uid-{number}", JOB_NAME_LABEL: job_name, ATTEMPT_LABEL: "0"}
    owners = [{"kind": "QLoRAJob", "name": job_name, "uid": owner, "controller": True}]
    version = {"resourceVersion": "1"}
    return {
        "namespace": namespace,
        "name": name,
        "uid": uid,
        "labels": labels,
        "ownerReferences": owners,
        **version,
    }


def batch_job(number: int, *, running: bool) -> Object:
    """The Job of the attempt."""
    return {
        "metadata": owned(number, f"job-{number}-a0", f"batch-{number}", f"uid-{number}"),
        "spec": {"parallelism": 2},
        "status": {"ready": 2 if running else 0, "startTime": LONG_AGO},
    }


def a_pod(number: int, index: int) -> Object:
    """A pod that does not start, and does not say why."""
    raw = {
        "metadata": owned(number, f"job-{number}-a0-{index}", f"pod-{number}-{index}", f"batch-{number}"),
        "spec": {"containers": [{"name": "trainer"}]},
        "status": {"phase": "Pending"},
    }
    return padded(raw, 6_000)


class Fed(ApiClient):
    """The operator's client, with answers from here."""

    def __init__(self, metrics: Metrics, nodes: int, events: int, jobs: int) -> None:
        super().__init__(metrics)
        self.nodes_there, self.events_each = nodes, max(1, events // max(1, jobs))
        self.handed_out: Count[str] = Count()
        """Objects of each kind."""

    async def _send(
        self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        await asyncio.sleep(0)
        if method != "GET":
            return 200, {}, json.dumps(body).encode()
        return 200, {}, json.dumps(self._listed(path, query)).encode()

    def _listed(self, path: str, query: Mapping[str, str]) -> Object:
        start, kind = int(query.get("continue") or 0), urlsplit(path).path.rsplit("/", 1)[1]
        uid = (query.get("fieldSelector") or "").rpartition("involvedObject.uid=")[2]
        number = int((query.get("labelSelector") or "-0").rpartition("-")[2])
        if kind == "nodes":
            total, make = self.nodes_there, a_node
        elif kind == "events":
            total, make = self.events_each, lambda index: an_event(index, uid)
        elif kind == "pods":
            total, make = 2, lambda index: a_pod(number, index)
        else:
            total, make = 1, lambda _: batch_job(number, running=False)
        end = min(start + PAGE, total)
        proceed = str(end) if end < total else ""
        self.handed_out[kind] += end - start
        items = [make(index) for index in range(start, end)]
        return {"metadata": {"resourceVersion": "1", "continue": proceed}, "items": items}


class Nobody:
    """Neither polls nor delivers."""

    def track(self, *_: object) -> None:
        """Poll."""

    def untrack(self, *_: object) -> None:
        """Poll no more."""

    def offer(self, *_: object) -> None:
        """Deliver."""


async def measure(nodes: int, jobs: int, events: int) -> dict[str, float]:
    """The process's memory as it goes."""
    told = {"imported": memory()}
    metrics, cache, facts = Metrics(CollectorRegistry(), "1"), ObjectCache(), JobFacts()
    client = Fed(metrics, nodes, events, jobs)
    for number in range(jobs):
        cache.put_job(a_job(number, running=number % 2 == 0))
        cache.put_attempt_job(batch_job(number, running=number % 2 == 0))
    told["jobs cached"] = memory()
    # On a machine that others use, a list takes longer than it serves; each of the two looks gets one of its own.
    node_cache.NODES_SECONDS = 3600.0
    settings = Settings(trainer_image="registry.example/trainer:1")
    reconciler = Reconciler(client, cache, facts, Nobody(), Nobody(), settings, metrics)
    turns, most = asyncio.Semaphore(WORKERS), memory()

    async def look(number: int) -> None:
        nonlocal most
        async with turns:
            await reconciler(key(number))
            most = max(most, memory())

    begun = time.process_time()
    for again in ("once", "twice"):
        reconciler._observer._nodes._snapshot.keep(0.0)
        await asyncio.gather(*(look(number) for number in range(jobs)))
        told[f"looked at {again}"] = memory()
    told["most"] = max(most, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    told["CPU seconds"] = time.process_time() - begun
    return told | {kind: float(count) for kind, count in client.handed_out.items()}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("--nodes", 5000), ("--jobs", 5000), ("--events", 100_000)):
        parser.add_argument(name, type=int, default=default)
    asked = parser.parse_args()
    assert handlers.__doc__, "imported, as in the operator: kopf is a part of its memory"
    told = asyncio.run(measure(asked.nodes, asked.jobs, asked.events))
    print(json.dumps({name: round(value, 1) for name, value in told.items()}))


if __name__ == "__main__":
    main()
