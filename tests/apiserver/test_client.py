"""The Python client and `kubectl qlora` against a real API server, with the operator; the test plays the kubelet."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import ON_ONE_CLAIM, a_job
from qlora_operator.client import POLL_SECONDS, Client, ClusterError, WaitTimeoutError
from qlora_operator.kubectl.main import main
from testcluster.cluster import Cluster
from testcluster.kubelet import Kubelet
from testcluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_operator", "terminations")]

MakeJob = Callable[..., Any]


@pytest.fixture
def client(api_cluster: Cluster, namespace: str, crd: None) -> Client:
    """A client of the test's namespace."""
    return Client(kubeconfig=str(api_cluster.kubeconfig), namespace=namespace)


@pytest.fixture
def kubectl_qlora(api_cluster: Cluster, namespace: str) -> Callable[..., int]:
    """kubectl_qlora(command, *arguments) -> the exit code, in the test's namespace."""

    def run(command: str, *arguments: str) -> int:
        flags = ["--kubeconfig", str(api_cluster.kubeconfig), "-n", namespace]
        return main([command, *flags, *arguments])

    return run


def test_a_job_is_created_followed_and_cancelled(client: Client, make_job: MakeJob, namespace: str) -> None:
    """Typed objects go in and out; a wait ends with the condition, in vain, or in time."""
    created = client.create(a_job("mine", **ON_ONE_CLAIM))
    handle = make_job("other")
    with pytest.raises(WaitTimeoutError, match=r"^other is not Running after 0.1 s: "):
        client.wait("other", "Running", timeout=0.1)
    handle.run()
    running = client.wait("other", "Running", timeout=20)
    with pytest.raises(ClusterError, match="already exists"):
        client.create(a_job("mine", **ON_ONE_CLAIM))
    for pod in handle.pods(0):
        handle.kubelet.succeeded(pod)
    finished = client.wait("other", timeout=20)
    with pytest.raises(ClusterError, match="other has finished and is not Suspended"):
        client.wait("other", "Suspended")
    with pytest.raises(ClusterError, match="nothing to restart"):
        client.restart("other")
    client.cancel("mine")

    assert (created.metadata.namespace, created.spec.training.max_steps) == (namespace, 10)
    assert running.status is not None
    assert running.status.placement is not None
    assert finished.status is not None
    assert finished.status.phase == "Succeeded"
    wait_for(lambda: [job.metadata.name for job in client.jobs()] == ["other"])
    with pytest.raises(ClusterError, match='"mine" not found'):
        client.get("mine")


def test_what_the_command_does_the_operator_follows(
    kubectl_qlora: Callable[..., int],
    client: Client,
    make_job: MakeJob,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """list, status, suspend, resume and restart, on a job that runs."""
    job = make_job()
    job.run()
    assert kubectl_qlora("list") == 0
    assert "Running" in capsys.readouterr().out
    assert kubectl_qlora("suspend", "job") == 0
    job.until_phase("Suspended")
    assert kubectl_qlora("resume", "job") == 0
    job.run(1)
    restart = threading.Thread(target=kubectl_qlora, args=("restart", "job", "--timeout", "60"))
    restart.start()
    job.run(2)
    restart.join(60)
    assert kubectl_qlora("status", "job") == 0
    shown = capsys.readouterr().out

    assert "job: restarted" in shown
    assert "Suspended" in shown
    assert client.status("job").attempt == 2
    assert kubectl_qlora("status", "nobody") == 1
    assert '"nobody" not found' in capsys.readouterr().err


def test_the_pod_of_a_log_is_the_newest_attempt_s_first(client: Client, make_job: MakeJob) -> None:
    """Rank 0's pod, unless another index or attempt is asked for; that there is none is said."""
    job = make_job()
    first = [pod["metadata"]["name"] for pod in job.run()]
    job.patch({"suspend": True})
    job.until_phase("Suspended")
    job.patch({"suspend": False})
    second = [pod["metadata"]["name"] for pod in job.run(1)]

    assert first
    assert client.pod("job") == second[0]
    assert client.pod("job", index=1) == second[1]
    with pytest.raises(ClusterError, match=r"job has no pod 7, or it is gone: "):
        client.pod("job", index=7)


def test_the_chat_pod_is_admitted_and_removed(
    kubectl_qlora: Callable[..., int],
    api_cluster: Cluster,
    make_job: MakeJob,
    namespace: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under Pod Security *restricted* the pod is created; it does not run here, which ends the command, and it goes.
    The job is not disturbed."""
    api_cluster.client.patch(
        f"/api/v1/namespaces/{namespace}",
        {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
    )
    make_job(suspend=True)
    assert kubectl_qlora("chat", "job") == 1
    assert "job has not trained yet" in capsys.readouterr().err
    job_handle = make_job("job2")
    job_handle.run()
    code = kubectl_qlora("chat", "job2", "--pod-running-timeout", "1")
    told = capsys.readouterr().err
    pods = f"/api/v1/namespaces/{namespace}/pods?labelSelector=app.kubernetes.io/component=chat"

    assert code == 1
    assert "starting pod job2-chat-" in told
    assert "the pod does not run after 1 s" in told
    wait_for(lambda: not api_cluster.client.items(pods))
    assert job_handle.status["phase"] == "Running"


def test_an_export_is_a_pod_of_its_own_after_the_job(
    kubectl_qlora: Callable[..., int],
    api_cluster: Cluster,
    make_job: MakeJob,
    namespace: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under Pod Security *restricted*, for a job that has succeeded; how the pod ends is how the command ends, and the
    pod goes. The job's status names what was made, and is as it was besides."""
    api_cluster.client.patch(
        f"/api/v1/namespaces/{namespace}",
        {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
    )
    job = make_job()
    pods = job.run()
    assert kubectl_qlora("export", "job", "--format", "merged") == 1
    assert "job has no finished adapter" in capsys.readouterr().err
    job.done(pods, "train")
    before = job.until_phase("Succeeded")
    ends: list[Callable[[Any], None]] = [
        lambda pod: job.done([pod], "export"),
        lambda pod: job.refuses(pod, 14, "no space is left"),
    ]
    codes = []
    for end in ends:

        def kubelet(end: Callable[[Any], None] = end) -> None:
            (pod,) = job.kubelet.pods(namespace, "app.kubernetes.io/component=export", 1)
            end(job.kubelet.running(pod))

        thread = threading.Thread(target=kubelet)
        thread.start()
        codes.append(kubectl_qlora("export", "job", "--format", "gguf", "--gguf-type", "q8_0"))
        thread.join()
    told = capsys.readouterr()

    assert codes == [0, 14]
    assert told.out.strip() == "pvc://work/here/jobs/job/exports/gguf-q8_0"
    assert "starting pod job-export" in told.err
    assert "no space is left" in told.err
    path = f"/api/v1/namespaces/{namespace}/pods?labelSelector=app.kubernetes.io/component=export"
    wait_for(lambda: not api_cluster.client.items(path))
    exported = {**before["adapter"], "exports": ["gguf-q8_0"]}
    wait_for(lambda: job.status == {**before, "adapter": exported})


NOTEBOOK = Path(__file__).parents[2] / "docs" / "client.ipynb"
RUN_CELLS = """
import json, sys
scope = {}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), scope)
"""


def test_the_notebook_runs(api_cluster: Cluster, kubelet: Kubelet, namespace: str, tmp_path: Path) -> None:
    """All cells of docs/client.ipynb, one after another, with the namespace of the kubeconfig's context."""
    config = yaml.safe_load(api_cluster.kubeconfig.read_text())
    for context in config["contexts"]:
        context["context"]["namespace"] = namespace
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_CELLS, str(NOTEBOOK)],
        env={**os.environ, "KUBECONFIG": str(tmp_path / "kubeconfig")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        selector = "qlora.dev/job-name=docs-assistant"
        (pod,) = kubelet.pods(namespace, selector, 1, seconds=60)
        kubelet.running(pod)
        api = f"/apis/qlora.dev/v1alpha1/namespaces/{namespace}/qlorajobs/docs-assistant"
        wait_for(lambda: api_cluster.client.get(api)["status"]["phase"] == "Running", 20)
        time.sleep(2 * POLL_SECONDS)  # it looks at the running job
        kubelet.succeeded(pod)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 0, out
    assert "('spec', 'epochs') Extra inputs are not permitted" in out
    assert "Suspended - " in out
    assert "Running avx512 [" in out
    assert "Succeeded after 1 attempt(s)" in out


def test_kubectl_finds_the_command(
    api_cluster: Cluster, make_job: MakeJob, namespace: str, tmp_path: Path
) -> None:
    """As a plug-in on the PATH, with kubectl's own name for it."""
    make_job()
    plugin = tmp_path / "kubectl-qlora"
    plugin.write_text(f'#!/bin/sh\nexec {sys.executable} -m qlora_operator.kubectl "$@"\n')
    plugin.chmod(0o755)
    environ = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "KUBECONFIG": str(api_cluster.kubeconfig),
    }
    done = subprocess.run(
        [api_cluster._kubectl, "qlora", "list", "-n", namespace],
        env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[0] == "job"
