"""How fast the operator is, and how large, against a real API server with KWOK's nodes.

    PYTHONPATH=tests/cluster python operator/benchmarks/scale.py [--jobs 500] [--rounds 3] [--idle 60]

In one run, interleaved: bursts of bare Indexed Jobs with the very pods that the operator would make, and bursts
of as many QLoRAJobs. Then the operator alone: one job, a gang's restart, kill -9 with all jobs running, memory,
and what it costs when nothing happens. Prints one JSON object; the medians go into LOG.md by hand. Of each
burst there are the CPU seconds of every program, too, and the operator's requests: on a machine that others use,
believe these.
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter as Count
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import yaml

from qlora_operator.api.names import TIER_LABELS
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.attempt_job import attempt_job
from qlora_operator.settings import Settings
from testcluster.chart import install_rbac
from testcluster.client import Client
from testcluster.control_plane import ControlPlane
from testcluster.fleet import Fleet
from testcluster.kubelet import Kubelet

ROOT = Path(__file__).parents[2]
NODES = 50
PODS = 2
CREATORS = 8
"""Threads that create jobs, for either side."""
IMAGE = "registry.example/trainer:1"
JOBS = "/apis/qlora.dev/v1alpha1"
ALIVE = 600.0
"""Seconds after which a phase that has not ended is given up."""

Object = dict[str, Any]


def job(name: str, namespace: str) -> Object:
    """A QLoRAJob of two pods."""
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "workspace": "pvc://work/here",
            "model": {"source": "pvc://work/model"},
            "dataset": {"source": "pvc://work/data"},
            "training": {"maxSteps": 10},
            "topology": {"pods": PODS, "cpusPerRank": 1, "memoryPerRank": "1Gi"},
            "terminationGracePeriodSeconds": 1,
        },
    }


def bare(name: str, namespace: str) -> Object:
    """The Indexed Job that the operator would make of it, owned by nobody."""
    body = QLoRAJob.model_validate(job(name, namespace))
    settings = Settings(trainer_image=IMAGE)
    made = attempt_job(body, uid=name, attempt=0, isa="avx2", image=IMAGE, settings=settings)
    del made["metadata"]["ownerReferences"]
    return made


class Watch:
    """Counts the objects that appear at a path, as metadata only."""

    def __init__(self, client: Client, path: str) -> None:
        self.seen: dict[str, float] = {}
        self.ready = threading.Event()
        self._client, self._path, self._over = client, path, False
        threading.Thread(target=self._run, daemon=True).start()
        self.ready.wait(30)

    def _run(self) -> None:
        settings = self._client._settings  # the benchmark's own tool
        url = f"{settings.host}{self._path}?watch=1&timeoutSeconds=3600"
        headers = {"Accept": "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"}
        answer = self._client._pool.request("GET", url, headers=headers, preload_content=False, timeout=3600)
        self.ready.set()
        rest = b""
        for chunk in answer.stream(65536):
            if self._over:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event["type"] == "ADDED":
                    self.seen.setdefault(event["object"]["metadata"]["name"], time.monotonic())

    def until(self, count: int, say: str, prefix: str = "") -> float:
        """When there were so many whose names begin like this."""
        deadline = time.monotonic() + ALIVE
        while len(times := [at for name, at in self.seen.copy().items() if name.startswith(prefix)]) < count:
            if time.monotonic() > deadline:
                raise SystemExit(f"{say}: {len(times)} of {count} after {ALIVE:.0f} s")
            time.sleep(0.005)
        return sorted(times)[count - 1]

    def stop(self) -> None:
        """Count no more."""
        self._over = True


class Operator:
    """The operator as a process, with its own service account."""

    def __init__(self, cluster: ControlPlane, folder: Path) -> None:
        cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "manifests" / "crd"))
        cluster.kubectl("wait", "--for=condition=Established", "-f", str(ROOT / "manifests" / "crd"))
        install_rbac(cluster)
        self.kubeconfig = cluster.kubeconfig_for("qlora-operator", "qlora-system")
        self.settings = folder / "settings.yaml"
        self.settings.write_text(yaml.safe_dump({"trainerImage": IMAGE}))
        self.log = folder / "operator.log"

    def start(self) -> float:
        """Begin; when."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        begun = time.monotonic()
        command = [sys.executable, "-m", "qlora_operator", "--config", str(self.settings)]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
        )
        return begun

    def ready(self) -> None:
        """Wait for its readiness."""
        until(lambda: self.get("/readyz") is not None, "the operator is not ready")

    def get(self, path: str) -> str | None:
        """What it answers; None when it does not."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return None

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        total = 0.0
        for line in (self.get("/metrics") or "").splitlines():
            if line.startswith((f"{name}{{", f"{name} ")) and all(
                f'{key}="{value}"' in line for key, value in labels.items()
            ):
                total += float(line.rpartition(" ")[2])
        return total

    def requests(self) -> Count[str]:
        """How many so far, by verb and resource."""
        pattern = re.compile(r'qlora_api_requests_total{.*resource="(\w+)",verb="(\w+)"} (\S+)')
        found: Count[str] = Count()
        for resource, verb, number in pattern.findall(self.get("/metrics") or ""):
            found[f"{verb} {resource}"] += int(float(number))
        return found

    def writes(self) -> float:
        """Requests so far that changed something."""
        return sum(self.metric("qlora_api_requests_total", verb=verb) for verb in ("post", "put", "delete"))

    def memory(self) -> float:
        """Resident MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def cpu(self) -> float:
        """CPU seconds so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def cpu(cluster: ControlPlane, operator: Operator) -> dict[str, float]:
    """CPU seconds so far of the cluster's programs, and of the operator."""
    times = {name: psutil.Process(pid).cpu_times() for name, pid in cluster.processes.items()}
    return {**{name: each.user + each.system for name, each in times.items()}, "operator": operator.cpu()}


def since(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """What was used in between."""
    return {name: round(seconds - before[name], 2) for name, seconds in now.items()}


def until(check: Callable[[], Any], say: str, every: float = 0.02) -> float:
    """When it came about."""
    deadline = time.monotonic() + ALIVE
    while not check():
        if time.monotonic() > deadline:
            raise SystemExit(f"{say}, after {ALIVE:.0f} s")
        time.sleep(every)
    return time.monotonic()


def burst(
    cluster: ControlPlane, namespace: str, count: int, path: str, make: Callable[[str, str], Object]
) -> float:
    """Seconds from the first create to the last pod's existence."""
    prepare(cluster, namespace)
    watch = Watch(cluster.client, f"/api/v1/namespaces/{namespace}/pods")
    begun = time.monotonic()
    with ThreadPoolExecutor(CREATORS) as pool:
        for result in [
            pool.submit(cluster.client.post, path.format(namespace), make(f"j{index}", namespace))
            for index in range(count)
        ]:
            result.result()
    ended = watch.until(PODS * count, f"pods of {namespace}")
    watch.stop()
    return ended - begun


def prepare(cluster: ControlPlane, namespace: str) -> None:
    """A namespace with the bound claim that the jobs name."""
    size = {"storage": "1Gi"}
    common: Object = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume = {**common, "capacity": size, "hostPath": {"path": "/nowhere"}}
    claim = {**common, "resources": {"requests": size}, "volumeName": namespace}
    path = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
    cluster.client.post("/api/v1/namespaces", {"metadata": {"name": namespace}})
    cluster.client.post("/api/v1/persistentvolumes", {"metadata": {"name": namespace}, "spec": volume})
    cluster.client.post(path, {"metadata": {"name": "work"}, "spec": claim})
    bound = lambda: cluster.client.get(f"{path}/work").get("status", {}).get("phase") == "Bound"  # noqa: E731
    until(lambda: _account(cluster, namespace) and bound(), f"{namespace} is not ready")


def _account(cluster: ControlPlane, namespace: str) -> bool:
    return bool(cluster.client.items(f"/api/v1/namespaces/{namespace}/serviceaccounts"))


def empty(cluster: ControlPlane, namespace: str) -> None:
    """Delete everything in a namespace and wait until it is gone."""
    options = {"propagationPolicy": "Background"}
    cluster.client.delete(f"{JOBS}/namespaces/{namespace}/qlorajobs", options)
    cluster.client.delete(f"/apis/batch/v1/namespaces/{namespace}/jobs", options)
    pods = f"/api/v1/namespaces/{namespace}/pods?limit=1"
    until(lambda: not cluster.client.items(pods), f"{namespace} is not empty", 0.5)


def running(cluster: ControlPlane, namespace: str) -> int:
    """QLoRAJobs whose phase is Running."""
    found = cluster.client.items(f"{JOBS}/namespaces/{namespace}/qlorajobs")
    return sum((each.get("status") or {}).get("phase") == "Running" for each in found)


def single(cluster: ControlPlane, namespace: str, name: str) -> dict[str, float]:
    """One job: seconds from create to its child Job, its pods, and Running."""
    gangs = Watch(cluster.client, f"/apis/batch/v1/namespaces/{namespace}/jobs")
    pods = Watch(cluster.client, f"/api/v1/namespaces/{namespace}/pods")
    begun = time.monotonic()
    cluster.client.post(f"{JOBS}/namespaces/{namespace}/qlorajobs", job(name, namespace))
    child = gangs.until(1, "the child Job", name)
    both = pods.until(PODS, "both pods", name)
    path = f"{JOBS}/namespaces/{namespace}/qlorajobs/{name}"
    up = until(lambda: cluster.client.get(path)["status"]["phase"] == "Running", "not running", 0.005)
    gangs.stop()
    pods.stop()
    return {"child_job": child - begun, "pods": both - begun, "running": up - begun}


def restart(cluster: ControlPlane, namespace: str, name: str) -> float:
    """Seconds from a pod's failure to both pods of the next attempt."""
    selector = f"qlora.dev/job-name={name},qlora.dev/attempt="
    path = f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}"
    pod = cluster.client.items(f"{path}0")[0]
    begun = time.monotonic()
    Kubelet(cluster.client).failed(pod, 1)
    return until(lambda: len(cluster.client.items(f"{path}1")) == PODS, "no restart", 0.005) - begun


def kill_and_reconcile(operator: Operator, count: int) -> float:
    """Seconds from the start of a new process to every job having been looked at."""
    operator.kill()
    begun = operator.start()
    done = lambda: (  # noqa: E731
        operator.metric("qlora_reconcile_duration_seconds_count") >= count
        and operator.metric("qlora_queue_depth") == 0
    )
    return until(done, "not reconciled", 0.05) - begun


def idle(operator: Operator, seconds: float) -> float:
    """Percent of a core that it uses meanwhile."""
    begun, used = time.monotonic(), operator.cpu()
    time.sleep(seconds)
    return 100 * (operator.cpu() - used) / (time.monotonic() - begun)


def measure(options: argparse.Namespace, folder: Path) -> Object:
    """Everything, in order."""
    cluster = ControlPlane.start(folder / "cluster")
    fleet = Fleet.start(cluster)
    found: Object = {"jobs": options.jobs, "bare": [], "operator": []}
    try:
        fleet.add_nodes(
            NODES, labels=dict.fromkeys(TIER_LABELS["avx512"] + TIER_LABELS["avx2"], "true"), cpu="128"
        )
        operator = Operator(cluster, folder)
        operator.start()
        operator.ready()
        found["memory_empty_mib"] = operator.memory()
        _bursts(options, cluster, operator, found)
        _alone(options, cluster, operator, found)
        operator.kill()
    finally:
        cluster.stop()
    return found


def _bursts(options: argparse.Namespace, cluster: ControlPlane, operator: Operator, found: Object) -> None:
    gangs, jobs = "/apis/batch/v1/namespaces/{}/jobs", JOBS + "/namespaces/{}/qlorajobs"
    for turn in range(options.rounds):
        used = cpu(cluster, operator)
        found["bare"].append(burst(cluster, f"bare-{turn}", options.jobs, gangs, bare))
        found["cpu_s_bare"] = since(used, cpu(cluster, operator))
        empty(cluster, f"bare-{turn}")
        before, asked, used = operator.writes(), operator.requests(), cpu(cluster, operator)
        found["operator"].append(burst(cluster, f"ours-{turn}", options.jobs, jobs, job))
        found["cpu_s_operator"] = since(used, cpu(cluster, operator))
        last = turn == options.rounds - 1
        until(lambda: running(cluster, f"ours-{turn}") == options.jobs, "not all running", 0.5)  # noqa: B023
        found["writes_per_job"] = (operator.writes() - before) / options.jobs
        asked = operator.requests() - asked
        found["requests_per_job"] = {kind: round(number / options.jobs, 2) for kind, number in asked.items()}
        if not last:
            empty(cluster, f"ours-{turn}")
        print(json.dumps(found), file=sys.stderr)
    found["cpu_ratio"] = sum(found["cpu_s_operator"].values()) / sum(found["cpu_s_bare"].values())
    found["ratio"] = statistics.median(found["operator"]) / statistics.median(found["bare"])


def _alone(options: argparse.Namespace, cluster: ControlPlane, operator: Operator, found: Object) -> None:
    namespace = f"ours-{options.rounds - 1}"
    found["memory_mib"] = operator.memory()
    found["kill_and_reconcile_s"] = kill_and_reconcile(operator, options.jobs)
    found["memory_after_restart_mib"] = operator.memory()
    time.sleep(5)
    # At first it looks for every rank 0, none of which answers here.
    found["idle_core_percent_at_first"] = idle(operator, options.idle)
    found["idle_core_percent"] = idle(operator, options.idle)
    found["memory_after_idle_mib"] = operator.memory()
    prepare(cluster, "single")
    each = [single(cluster, "single", f"one{index}") for index in range(5)]
    found["single_s"] = {key: statistics.median(one[key] for one in each) for key in each[0]}
    found["gang_restart_s"] = statistics.median(restart(cluster, "single", f"one{i}") for i in range(5))
    for number in range(options.events):
        path = f"{JOBS}/namespaces/{namespace}/qlorajobs/j{number % options.jobs}"
        cluster.client.patch(path, {"metadata": {"annotations": {"touched": str(number)}}})
    until(lambda: operator.metric("qlora_queue_depth") == 0, "the queue does not drain", 0.5)
    found["memory_after_events_mib"] = operator.memory()
    found["events"] = options.events


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=float, default=60, help="seconds to watch it do nothing")
    parser.add_argument("--events", type=int, default=10_000, help="changes without meaning to send it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qlora-scale-") as folder:
        print(json.dumps(measure(options, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
