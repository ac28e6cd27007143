"""Releases on a real API server: what comes, changes, stays and goes."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from builders import ON_ONE_CLAIM, job_manifest
from testcluster.chart import CHART, RELEASE, HelmError, Releases, find, render
from testcluster.client import ApiError
from testcluster.control_plane import ControlPlane
from testcluster.fixtures import install_crds
from testcluster.kubelet import Kubelet
from testcluster.processes import with_parent
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

JOB = job_manifest(**ON_ONE_CLAIM)


def jobs(namespace: str) -> str:
    """Path of the QLoRAJobs of a namespace."""
    return f"/apis/qlora.dev/v1alpha1/namespaces/{namespace}/qlorajobs"


def create_job(cluster: ControlPlane, namespace: str) -> None:
    """Create one, as soon as the kind is served."""

    def created() -> bool:
        try:
            return bool(cluster.client.post(jobs(namespace), JOB))
        except ApiError as error:
            if error.code != 404:
                raise
            return False

    wait_for(created, or_else="the kind QLoRAJob")


def settings(releases: Releases) -> str:
    """What the operator of the release reads."""
    path = f"/api/v1/namespaces/{releases.namespace}/configmaps/{RELEASE}"
    text: str = releases.cluster.client.get(path)["data"]["settings.yaml"]
    return text


def test_pods_are_admitted_where_pod_security_is_restricted(
    new_releases: Callable[[], Releases], chart_cluster: ControlPlane
) -> None:
    """The operator's pod and the test's are let into a namespace that enforces restricted."""
    releases = new_releases()
    releases.install()
    pods = f"/api/v1/namespaces/{releases.namespace}/pods"

    wait_for(lambda: chart_cluster.client.items(pods), or_else="the operator's pod")
    pod = find(render(namespace=releases.namespace), "Pod")
    assert chart_cluster.client.post(f"{pods}?dryRun=All", pod)


def test_notes_show_the_next_command(new_releases: Callable[[], Releases]) -> None:
    """After an installation helm says how to see that it works, and what to do then."""
    releases = new_releases()
    notes = releases.install({"namespaces": [releases.namespace]})

    assert f"kubectl -n {releases.namespace} rollout status deployment/{RELEASE}" in notes
    assert f"helm -n {releases.namespace} test {RELEASE}" in notes
    assert f"kubectl -n {releases.namespace} apply -f job.yaml" in notes


def test_upgrade_rollback_and_uninstall_lose_no_job(
    new_releases: Callable[[], Releases], chart_cluster: ControlPlane, has_definition: Callable[[], bool]
) -> None:
    """A job outlives an upgrade, a rollback, the release's end and its coming back."""
    releases = new_releases()
    releases.install()
    first = settings(releases)
    create_job(chart_cluster, releases.namespace)
    uid = chart_cluster.client.items(jobs(releases.namespace))[0]["metadata"]["uid"]

    releases.install({"jobs": {"limits": {"pods": 4}}})
    assert '"pods":4' in settings(releases)
    releases("rollback", RELEASE, "1")
    assert settings(releases) == first
    releases("uninstall", RELEASE)
    assert has_definition()
    releases.install()

    assert [job["metadata"]["uid"] for job in chart_cluster.client.items(jobs(releases.namespace))] == [uid]


def test_a_definition_that_is_not_kept_goes_with_the_release(
    new_releases: Callable[[], Releases], has_definition: Callable[[], bool]
) -> None:
    """With crds.keep=false nothing is left."""
    releases = new_releases()
    releases.install({"crds": {"keep": False}})
    assert has_definition()
    releases("uninstall", RELEASE)

    wait_for(lambda: not has_definition(), 120, or_else="the end of the definition")


def test_an_upgrade_brings_the_new_definition(
    new_releases: Callable[[], Releases], chart_cluster: ControlPlane, tmp_path: Path
) -> None:
    """A field that the next version's definition has is known after the upgrade, and the job is still there."""
    releases = new_releases()
    older = tmp_path / "chart"
    subprocess.run(["cp", "-r", str(CHART), str(older)], check=True)
    template = older / "templates" / "crd.yaml"
    text = template.read_text()
    assert text.count("    shortNames:\n    - qlj\n") == 1
    template.write_text(text.replace("    shortNames:\n    - qlj\n", ""))
    releases("install", RELEASE, str(older))
    create_job(chart_cluster, releases.namespace)
    releases.install()

    definition = chart_cluster.client.get(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qlorajobs.qlora.dev"
    )
    assert definition["spec"]["names"]["shortNames"] == ["qlj"]
    assert len(chart_cluster.client.items(jobs(releases.namespace))) == 1


def test_the_definition_has_one_owner(new_releases: Callable[[], Releases]) -> None:
    """A second release that would own the definition too is refused; one that does not is not."""
    first, second = new_releases(), new_releases()
    first.install({"namespaces": [first.namespace]})

    with pytest.raises(HelmError, match=r"qlorajobs\.qlora\.dev"):
        second.install({"namespaces": [second.namespace]})
    second.install({"namespaces": [second.namespace], "crds": {"enabled": False}})


def test_a_definition_that_was_kept_can_change_hands(new_releases: Callable[[], Releases]) -> None:
    """A release of another namespace takes over a definition that a former one left, when it is told to."""
    former, later = new_releases(), new_releases()
    former.install()
    former("uninstall", RELEASE)

    with pytest.raises(HelmError, match=r"qlorajobs\.qlora\.dev"):
        later.install()
    assert "STATUS: deployed" in later("install", RELEASE, str(CHART), "--take-ownership")


def test_a_definition_that_kubectl_made_can_be_taken_over(
    new_releases: Callable[[], Releases], chart_cluster: ControlPlane
) -> None:
    """Who began with kubectl goes on with helm: the definition and its jobs stay."""
    releases = new_releases()
    install_crds(chart_cluster)
    create_job(chart_cluster, releases.namespace)
    releases.install({}, "--take-ownership", "--force-conflicts")

    assert len(chart_cluster.client.items(jobs(releases.namespace))) == 1


def test_an_aggregated_role_lets_users_write_jobs(
    new_releases: Callable[[], Releases], chart_cluster: ControlPlane
) -> None:
    """Who has the role edit in a namespace may create jobs there; who has view may only look."""
    releases = new_releases()
    releases.install()
    namespace = releases.namespace
    may = {}
    for role in ("view", "edit", "admin"):
        subject = {"kind": "User", "name": role, "apiGroup": "rbac.authorization.k8s.io"}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role}
        binding = {"metadata": {"name": role}, "roleRef": reference, "subjects": [subject]}
        chart_cluster.client.post(
            f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings", binding
        )
        may[role] = {
            verb for verb in ("get", "create", "delete") if can(chart_cluster, role, verb, namespace)
        }

    assert may == {
        "view": {"get"},
        "edit": {"get", "create", "delete"},
        "admin": {"get", "create", "delete"},
    }


def can(cluster: ControlPlane, user: str, verb: str, namespace: str) -> bool:
    """Whether a user may do this with the namespace's jobs, soon: roles are aggregated a moment later."""
    attributes = {"group": "qlora.dev", "resource": "qlorajobs", "verb": verb, "namespace": namespace}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "resourceAttributes": attributes},
    }
    expected = verb == "get" or user != "view"

    def allowed() -> bool:
        answer = cluster.client.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
        return bool(answer["status"]["allowed"])

    return bool(wait_for(allowed)) if expected else allowed()


# --- operators with a release's settings and permissions


class Operator:
    """The program that a release's Deployment runs, as a process of its own with the release's permissions."""

    def __init__(self, cluster: ControlPlane, releases: Releases, folder: Path) -> None:
        self.cluster = cluster
        path = f"/apis/apps/v1/namespaces/{releases.namespace}/deployments/{RELEASE}"
        container = cluster.client.get(path)["spec"]["template"]["spec"]["containers"][0]
        file = folder / f"{releases.namespace}.yaml"
        file.write_text(settings(releases))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        arguments = [each for each in container["args"] if not each.startswith("--config=")]
        command = [sys.executable, *container["command"][1:], *arguments]
        command += [f"--config={file}", f"--port={self.port}"]
        kubeconfig = cluster.kubeconfig_for(RELEASE, releases.namespace)
        self.log = folder / f"{releases.namespace}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                with_parent(command),
                env={**os.environ, "KUBECONFIG": str(kubeconfig)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def check(self, releases: Releases, seconds: int) -> subprocess.CompletedProcess[str]:
        """Run what `helm test` runs, as the namespace's default service account."""
        folder = self.log.parent
        path = f"/api/v1/namespaces/{releases.namespace}/serviceaccounts/default/token"
        (folder / "token").write_text(self.cluster.client.post(path, {"spec": {}})["status"]["token"])
        (folder / "ca.crt").write_bytes((self.cluster.folder / "pki" / "ca.crt").read_bytes())
        pod = find(render(namespace=releases.namespace), "Pod")["spec"]["containers"][0]
        code, *_ = pod["args"]
        where = [self.cluster.server, f"http://127.0.0.1:{self.port}", str(folder), str(seconds)]
        command = [sys.executable, *pod["command"][1:], code, *where]
        return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait(30)


@pytest.fixture
def operate(chart_cluster: ControlPlane, tmp_path: Path) -> Iterator[Callable[[Releases], Operator]]:
    """operate(releases) -> the release's operator, running; it ends with the test."""
    made: list[Operator] = []

    def make(releases: Releases) -> Operator:
        made.append(Operator(chart_cluster, releases, tmp_path))
        return made[-1]

    yield make
    for operator in made:
        operator.close()


def refusals(log: Path) -> list[str]:
    """What the API server refused to an operator."""
    return [line for line in log.read_text().splitlines() if "forbidden" in line]


def test_two_releases_serve_a_namespace_each(
    new_releases: Callable[[], Releases],
    chart_cluster: ControlPlane,
    operate: Callable[[Releases], Operator],
) -> None:
    """Two operators, each with the permissions of its own namespace alone, run the jobs there and no others."""
    Kubelet(chart_cluster.client).add_node(
        "big", labels={f"feature.node.kubernetes.io/cpu-cpuid.{flag}": "true" for flag in ("AVX512F", "AVX2")}
    )
    first, second = new_releases(), new_releases()
    first.install({"namespaces": [first.namespace]})
    second.install(
        {
            "namespaces": [second.namespace],
            "crds": {"enabled": False},
            "rbac": {"nodes": False},
            "jobs": {"image": {"tag": "2"}},
        }
    )
    operators = [operate(first), operate(second)]
    for releases in (first, second):
        create_job(chart_cluster, releases.namespace)

    images = {}
    for releases, operator in zip((first, second), operators, strict=True):
        gangs = f"/apis/batch/v1/namespaces/{releases.namespace}/jobs"
        (gang,) = wait_for(
            lambda path=gangs: chart_cluster.client.items(path),
            30,
            or_else=lambda o=operator: o.log.read_text(),
        )
        images[releases.namespace] = gang["spec"]["template"]["spec"]["containers"][0]["image"]
        checked = operator.check(releases, 30)
        assert (checked.returncode, checked.stderr) == (0, "")
    refused = [refusals(operator.log) for operator in operators]
    assert refused[0] == []
    assert all("nodes is forbidden" in line for line in refused[1])
    assert images == {first.namespace: "qlora-trainer:0.1.0", second.namespace: "qlora-trainer:2"}


def test_helm_test_says_what_is_wrong(
    new_releases: Callable[[], Releases],
    chart_cluster: ControlPlane,
    operate: Callable[[Releases], Operator],
) -> None:
    """Without an operator that answers, the test of the installation fails and names it."""
    releases = new_releases()
    releases.install()
    operator = operate(releases)
    operator.close()
    create_job(chart_cluster, releases.namespace)
    checked = operator.check(releases, 1)

    assert checked.returncode == 1
    assert "the API server knows QLoRAJobs: yes" in checked.stdout
    assert "the operator is ready: no: " in checked.stdout
    assert "refused" in checked.stdout


def test_values_are_yaml_that_a_user_can_copy(new_releases: Callable[[], Releases]) -> None:
    """`helm show values` gives a file that installs as it is."""
    releases = new_releases()
    values = yaml.safe_load(releases("show", "values", str(CHART)))

    assert RELEASE in releases.install(values)
