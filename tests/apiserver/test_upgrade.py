"""Another version of the operator, or other settings, between two attempts of a job."""

import copy
import json
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_operator.api.names import CRD_NAME, RUN_CONFIG_ANNOTATION
from qlora_operator.api.schema import custom_resource_definition
from testcluster.cluster import Cluster
from testcluster.fixtures import install_crds
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

MakeJob = Callable[..., Any]
ARCHIVE = Path(__file__).parents[1] / "releases/0.1.0.tar.xz"
CRD_PATH = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{CRD_NAME}"
NEW = "registry.example/qlora-trainer:2"
ELSEWHERE = "elsewhere.example/qlora-trainer:1"


def restart(operator: Any, **settings: Any) -> None:
    """End the operator as an upgrade does, and start it with other settings."""
    operator.kill(signal.SIGTERM)
    known = yaml.safe_load(operator.settings.read_text())
    operator.settings.write_text(yaml.safe_dump({**known, **settings}))
    operator.start()


def image_of(pod: dict[str, Any]) -> str:
    """The image of a pod's container."""
    return str(pod["spec"]["containers"][0]["image"])


def test_a_job_keeps_the_image_of_its_first_attempt(operator: Any, make_job: MakeJob) -> None:
    """A job keeps the image of its first attempt, whatever the default is by then; new jobs get the new one."""
    job = make_job()
    pods = job.run()
    restart(operator, trainerImage=NEW)

    with job.kubelet.finish_terminations(job.namespace):
        job.kubelet.failed(pods[0], 1)
        job.until(lambda status: status["attempt"] == 1)
        assert {image_of(pod) for pod in job.pods(1)} == {image_of(pods[0])}

    assert job.status["provenance"]["image"] == image_of(pods[0])
    assert {image_of(pod) for pod in make_job("new").pods(0)} == {NEW}


def test_a_job_waits_for_an_operator_that_writes_its_run_config(operator: Any, make_job: MakeJob) -> None:
    """A job whose first attempt had a RunConfig that this operator does not write waits for one that does."""
    job = make_job()
    job.pods(0)
    assert job.status["provenance"]["runConfigVersion"] == 1
    job.patch({"suspend": True})
    job.until(lambda status: status["attempts"][-1].get("end"))
    raw = job.get()
    raw["status"]["provenance"]["runConfigVersion"] = 3
    job.client.put(f"{job.path}/status", raw)

    job.patch({"suspend": False})

    status = job.until(lambda status: status["observedGeneration"] == 3 and status["phase"] == "Pending")
    assert "version 3 of the RunConfig" in status["message"]
    assert job.gangs() == []


def test_a_job_with_an_image_that_is_not_allowed_waits(operator: Any, make_job: MakeJob) -> None:
    """A job that names an image which the settings do not allow waits, says so, and runs once they do."""
    job = make_job(image=ELSEWHERE)
    status = job.until_phase("Pending")
    assert job.condition("Initialized")["reason"] == "ImageNotAllowed"
    assert f"spec.image {ELSEWHERE} is not allowed here" in status["message"]
    assert job.gangs() == []

    restart(operator, allowedImages=["elsewhere.example/*"])

    assert {image_of(pod) for pod in job.pods(0)} == {ELSEWHERE}
    assert job.status["provenance"]["image"] == ELSEWHERE


def test_a_job_goes_on_with_an_image_that_is_not_allowed_any_more(operator: Any, make_job: MakeJob) -> None:
    """A job that has begun goes on with its image when the settings no longer allow it to new jobs."""
    job = make_job(image="registry.example/special:1")
    pods = job.run()
    restart(operator, allowedImages=[])

    with job.kubelet.finish_terminations(job.namespace):
        job.kubelet.failed(pods[0], 1)
        assert {image_of(pod) for pod in job.pods(1)} == {"registry.example/special:1"}


def test_a_job_that_ended_while_no_operator_ran_is_found_finished(operator: Any, make_job: MakeJob) -> None:
    """A job that ends while no operator runs is found finished by the next one."""
    job = make_job()
    pods = job.run()
    operator.kill(signal.SIGTERM)
    for pod in pods:
        job.kubelet.succeeded(pod)
    operator.start()

    assert job.until_phase("Succeeded")["attempt"] == 0


# --- another release


@pytest.fixture(scope="module")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator of release 0.1.0."""
    root = tmp_path_factory.mktemp("release")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture
def releases(
    new_operator: Callable[..., Any], namespace: str, old_release: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Any]:
    """start("old") or start("new") -> the operator, after the one that runs has ended."""
    operator = new_operator("--namespace", namespace)
    folders = os.pathsep.join(str(old_release / side) for side in ("operator", "trainer"))

    def start(release: str) -> Any:
        if operator.process is not None:
            operator.kill(signal.SIGTERM)
        monkeypatch.setenv("PYTHONPATH", folders if release == "old" else "")
        operator.start()
        return operator

    return start


@pytest.fixture
def newer_definition(api_cluster: Cluster) -> Iterator[Callable[[], None]]:
    """Installs the definition of a later release: spec has one more field, with a default."""

    def install() -> None:
        definition = api_cluster.client.get(CRD_PATH)
        definition["spec"] = copy.deepcopy(custom_resource_definition()["spec"])
        (version,) = definition["spec"]["versions"]
        fields = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        fields["notifications"] = {
            "type": "object",
            "default": {},
            "properties": {"onEnd": {"type": "boolean", "default": False}},
        }
        api_cluster.client.put(CRD_PATH, definition)

    yield install
    install_crds(api_cluster)


def jobs_in_every_phase(make_job: MakeJob) -> dict[str, Any]:
    """Phase -> a job in it."""
    jobs = {
        "Pending": make_job("pending", image=ELSEWHERE),
        "Running": make_job("running"),
        "Restarting": make_job("restarting"),
        "Suspended": make_job("suspended"),
        "Publishing": make_job("publishing", output={"destination": "s3://bucket/adapters"}),
        "Succeeded": make_job("succeeded"),
    }
    running = {phase: job.run() for phase, job in jobs.items() if phase not in ("Pending", "Publishing")}
    jobs["Publishing"].done(jobs["Publishing"].goes(0, "train"), "train")
    jobs["Publishing"].begins(1, "publish")
    jobs["Succeeded"].succeed(running["Succeeded"])
    suspended = jobs["Suspended"]
    suspended.patch({"suspend": True})
    with suspended.kubelet.finish_terminations(suspended.namespace):
        suspended.until(lambda status: status["attempts"][-1].get("end"))
    # Its other pod ends no sooner than a kubelet sees to it.
    jobs["Restarting"].kubelet.failed(running["Restarting"][0], 50)
    jobs["Restarting"].until_phase("Restarting")
    jobs["Pending"].until_phase("Pending")
    return jobs


def look_at(jobs: dict[str, Any], limit: int) -> None:
    """Every job is reconciled once more."""
    for job in jobs.values():
        job.patch({"backoffLimit": limit})
    for job in jobs.values():
        generation = job.get()["metadata"]["generation"]
        job.until(lambda status, wanted=generation: status.get("observedGeneration") == wanted)


def versions_of(job: Any) -> set[int]:
    """Versions of the RunConfig of all its attempts."""
    templates = [gang["spec"]["template"]["metadata"]["annotations"] for gang in job.gangs()]
    return {json.loads(annotations[RUN_CONFIG_ANNOTATION])["version"] for annotations in templates}


def finish(jobs: dict[str, Any]) -> None:
    """Every job goes through what is left of it."""
    namespace, kubelet = jobs["Running"].namespace, jobs["Running"].kubelet
    with kubelet.finish_terminations(namespace):
        jobs["Suspended"].patch({"suspend": False})
        jobs["Running"].succeed(jobs["Running"].pods(0))
        for phase in ("Restarting", "Suspended"):
            jobs[phase].until(lambda status: status["attempt"] == 1, 60)
            jobs[phase].succeed(jobs[phase].run(1))
        jobs["Pending"].succeed(jobs["Pending"].run(0))
        jobs["Publishing"].done(jobs["Publishing"].goes(1, "publish"), "publish")
    for phase in jobs:
        jobs[phase].until_phase("Succeeded")


@pytest.mark.parametrize("newer", [False, True], ids=["its definition", "a newer definition"])
@pytest.mark.parametrize(
    "order", [("old", "new"), ("new", "old", "new")], ids=["an upgrade", "a rollback and back"]
)
def test_no_job_fails_by_another_release(
    order: tuple[str, ...],
    newer: bool,
    releases: Callable[[str], Any],
    make_job: MakeJob,
    newer_definition: Callable[[], None],
) -> None:
    """Jobs in every phase outlive an upgrade, a rollback, and the definition of a later release."""
    operator = releases(order[0])
    jobs = jobs_in_every_phase(make_job)
    if newer:
        newer_definition()
        wait_for(lambda: "notifications" in jobs["Running"].get()["spec"], 30, or_else="the newer definition")
    for limit, release in enumerate(order[1:], start=4):
        releases(release)
        look_at(jobs, limit)
        phases = {phase: job.status["phase"] for phase, job in jobs.items()}
        assert "Failed" not in phases.values()
        assert phases["Succeeded"] == "Succeeded"

    restart(operator, allowedImages=["elsewhere.example/*"])
    finish(jobs)
    assert {phase: versions_of(job) for phase, job in jobs.items()} == {phase: {1} for phase in jobs}
    ignored = operator.log.read_text().count("fields that this release does not know are ignored")
    assert (ignored > 0) == newer


def test_a_job_of_this_release_goes_on_after_a_rollback(
    releases: Callable[[str], Any], make_job: MakeJob
) -> None:
    """It uses nothing that is new, so the operator and the image of the release before read its RunConfig."""
    releases("new")
    job = make_job()
    pods = job.run()
    releases("old")
    with job.kubelet.finish_terminations(job.namespace):
        job.kubelet.failed(pods[0], 50)
        job.until(lambda status: status["attempt"] == 1, 60)
        job.succeed(job.run(1))
