"""Plays the kubelet on a cluster without nodes: pods get, through the real API, the states that nodes give them.

A pod is a dict as the API gave it; only its namespace, name and spec are used,
so that it may be out of date. Each function gives the pod as it is afterwards.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from testcluster import pod_status
from testcluster.client import STRATEGIC_PATCH, ApiError, Client, Object
from testcluster.errors import ClusterError

NODE = "played-node"
INDEX = "batch.kubernetes.io/job-completion-index"
TAINT_MANAGER = "DeletionByTaintManager"
EVICTION_API = "EvictionByEvictionAPI"
KUBELET = "TerminationByKubelet"


class Kubelet:
    """The kubelet of every played node."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._addresses = itertools.count(1)
        self._nodes: list[str] = []

    def add_node(
        self, name: str, *, labels: dict[str, str] | None = None, cpu: str = "8", memory: str = "32Gi"
    ) -> None:
        """A ready node that the scheduler uses, until `remove_nodes`. It sends no heartbeats."""
        self._make_node(name, labels or {}, cpu, memory, cordoned=False)
        self._nodes.append(name)

    def remove_nodes(self) -> None:
        """Remove every node that was added."""
        while self._nodes:
            self.client.delete(f"/api/v1/nodes/{self._nodes.pop()}")

    def pods(self, namespace: str, selector: str, count: int, *, seconds: float = 30) -> list[Object]:
        """The pods of a gang, once exactly `count` of them live, in the order of their completion index.

        Pods that have ended or are being deleted do not count. Raises
        ClusterError after `seconds`.
        """
        deadline = time.monotonic() + seconds
        path = f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}"
        while len(found := [pod for pod in self.client.items(path) if _lives(pod)]) != count:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{len(found)} pods match {selector} in {namespace} after {seconds:g} s, not {count}"
                )
            time.sleep(0.02)
        return sorted(found, key=lambda pod: int(pod["metadata"].get("annotations", {}).get(INDEX, 0)))

    def play(
        self, namespace: str, selector: str, count: int, state: Callable[[Object], Object]
    ) -> list[Object]:
        """Wait for a gang's pods and bring each into a state: play(ns, "app=x", 2, kubelet.running)."""
        return [state(pod) for pod in self.pods(namespace, selector, count)]

    def bind(self, pod: Object, node: str = NODE) -> Object:
        """Put the pod on a node, as the scheduler does; a missing node is made, closed to other pods. A pod that
        the scheduler has bound meanwhile stays where it is."""
        current = self.client.get(_path(pod))
        if "nodeName" in current["spec"]:
            return dict(current)
        try:
            self.client.get(f"/api/v1/nodes/{node}")
        except ApiError as error:
            if error.code != 404:
                raise
            self._make_node(node, {}, "8", "32Gi", cordoned=True)
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        metadata = {"name": current["metadata"]["name"]}
        binding = {"kind": "Binding", "apiVersion": "v1", "metadata": metadata, "target": target}
        try:
            self.client.post(f"{_path(pod)}/binding", binding)
        except ApiError as error:
            if error.code != 409:
                raise
        bound: Object = self.client.get(_path(pod))
        if "nodeName" not in bound["spec"]:
            raise ClusterError(f"pod {metadata['name']} could not be bound to {node}")
        return bound

    def running(self, pod: Object, *, ip: str | None = None, ready: bool = True) -> Object:
        """Every container runs; a pod without a node is bound first."""
        return self._report(pod, pod_status.running(pod, ip or self._address(), ready=ready))

    def succeeded(self, pod: Object, *, message: str = "", others: dict[str, str] | None = None) -> Object:
        """Every container ended with 0, having left the termination message; `others`: those of other containers."""
        return self._report(pod, pod_status.terminated(pod, 0, "Completed", message, others))

    def failed(self, pod: Object, exit_code: int, *, message: str = "", reason: str = "Error") -> Object:
        """Every container ended with the code; `reason` is Error, or OOMKilled with 137."""
        return self._report(pod, pod_status.terminated(pod, exit_code, reason, message))

    def disrupted(self, pod: Object, reason: str = TAINT_MANAGER, *, exit_code: int = 137) -> Object | None:
        """The cluster takes the pod away, and its containers end with the code.

        EvictionByEvictionAPI is done by the eviction API itself (a drain); for
        any other reason the condition DisruptionTarget is written, and the pod
        deleted unless the reason is TerminationByKubelet. Gives None when the
        pod is gone.
        """
        pod = self.bind(pod)
        if reason == EVICTION_API:
            self.client.post(f"{_path(pod)}/eviction", _eviction(pod))
        else:
            target = pod_status.condition("DisruptionTarget", "True", reason, f"played: {reason}")
            self._report(pod, {"conditions": [target]})
        if reason == KUBELET:
            return self.failed(pod, exit_code)
        if reason != EVICTION_API:
            self.client.delete(_path(pod))
        return self.finish_termination(pod, exit_code=exit_code)

    def rejected(
        self,
        pod: Object,
        reason: str = "TopologyAffinityError",
        message: str = "Resources cannot be allocated with Topology locality",
    ) -> Object:
        """The kubelet's admission refuses the pod."""
        self._event(pod, "Warning", reason, message)
        return self._report(pod, pod_status.rejected(reason, message))

    def evicted(self, pod: Object, resource: str = "memory") -> Object:
        """The kubelet ends the pod because the node is short of the resource."""
        status = pod_status.evicted(pod, resource)
        self._event(pod, "Warning", "Evicted", status["message"])
        return self._report(pod, status)

    def unpullable(self, pod: Object, image: str | None = None) -> Object:
        """The image cannot be pulled: the pod waits, and the kubelet tries again for ever."""
        image = image or pod["spec"]["containers"][0]["image"]
        error = f'failed to resolve reference "{image}": {image}: not found'
        self._event(pod, "Warning", "Failed", f'Failed to pull image "{image}": {error}')
        self._event(pod, "Warning", "Failed", "Error: ErrImagePull")
        self._event(pod, "Normal", "BackOff", f'Back-off pulling image "{image}"')
        self._event(pod, "Warning", "Failed", "Error: ImagePullBackOff")
        message = f'Back-off pulling image "{image}": ErrImagePull: {error}'
        return self._report(pod, pod_status.waiting(pod, "ImagePullBackOff", message))

    def missing_volume(self, pod: Object, volume: str, error: str = "object not found") -> Object:
        """A volume cannot be mounted: the pod waits, and the kubelet tries again for ever."""
        self._event(
            pod, "Warning", "FailedMount", f'MountVolume.SetUp failed for volume "{volume}" : {error}'
        )
        return self._report(pod, pod_status.waiting(pod, "ContainerCreating"))

    def finish_termination(self, pod: Object, *, exit_code: int = 143) -> Object | None:
        """What a kubelet does with a pod that is being deleted: its containers end, then the object may go.

        Gives the pod while a finalizer keeps it, else None.
        """
        try:
            current = self.client.get(_path(pod))
            if not pod_status.is_finished(current):
                self.failed(current, exit_code) if exit_code else self.succeeded(current)
            same = {"uid": current["metadata"]["uid"]}
            self.client.delete(_path(pod), {"gracePeriodSeconds": 0, "preconditions": same})
            kept: Object = self.client.get(_path(pod))
        except ApiError as error:
            if error.code in (404, 409):  # gone, or another pod of that name
                return None
            raise
        return kept

    @contextmanager
    def finish_terminations(self, namespace: str, *, exit_code: int = 143) -> Iterator[None]:
        """While in the block, every pod of the namespace that is being deleted ends with the code."""
        stop = threading.Event()
        errors: list[Exception] = []

        def work() -> None:
            done: set[str] = set()
            try:
                while not stop.wait(0.05):
                    self._finish_all(namespace, exit_code, done)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=work, name=f"kubelet of {namespace}")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        if errors:
            raise errors[0]

    def _finish_all(self, namespace: str, exit_code: int, done: set[str]) -> None:
        for pod in self.client.items(f"/api/v1/namespaces/{namespace}/pods"):
            if pod["metadata"].get("deletionTimestamp") and pod["metadata"]["uid"] not in done:
                done.add(pod["metadata"]["uid"])
                self.finish_termination(pod, exit_code=exit_code)

    def _report(self, pod: Object, status: Object) -> Object:
        """Write a part of the pod's status; conditions are merged by type."""
        self.bind(pod)
        return self.client.patch(f"{_path(pod)}/status", {"status": status}, STRATEGIC_PATCH)

    def _event(self, pod: Object, kind: str, reason: str, message: str) -> None:
        metadata = pod["metadata"]
        involved = {
            "apiVersion": "v1",
            "kind": "Pod",
            **{key: metadata[key] for key in ("name", "namespace", "uid")},
        }
        event = {
            "metadata": {"generateName": f"{metadata['name']}."},
            "involvedObject": involved,
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": "kubelet", "host": NODE},
            "firstTimestamp": pod_status.now(),
            "lastTimestamp": pod_status.now(),
            "count": 1,
        }
        self.client.post(f"/api/v1/namespaces/{metadata['namespace']}/events", event)

    def _make_node(self, name: str, labels: dict[str, str], cpu: str, memory: str, *, cordoned: bool) -> None:
        size = {"cpu": cpu, "memory": memory, "pods": "110", "ephemeral-storage": "100Gi"}
        ready = {
            **pod_status.condition("Ready", "True", "KubeletReady"),
            "lastHeartbeatTime": pod_status.now(),
        }
        all_labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **labels}
        node = {
            "metadata": {"name": name, "labels": all_labels},
            "spec": {"unschedulable": cordoned},
            "status": {"capacity": size, "allocatable": size, "conditions": [ready]},
        }
        try:
            self.client.post("/api/v1/nodes", node)
        except ApiError as error:
            if not cordoned or error.reason != "AlreadyExists":  # another thread was first
                raise

    def _address(self) -> str:
        number = next(self._addresses)
        return f"10.244.{number // 250 % 250}.{number % 250 + 1}"


def _lives(pod: Object) -> bool:
    return "deletionTimestamp" not in pod["metadata"] and not pod_status.is_finished(pod)


def _path(pod: Object) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _eviction(pod: Object) -> Object:
    names = {key: pod["metadata"][key] for key in ("name", "namespace")}
    return {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": names}
