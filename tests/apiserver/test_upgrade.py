"""Another version of the operator, or other settings, between two attempts of a job."""

import signal
from collections.abc import Callable
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.cluster

MakeJob = Callable[..., Any]
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


def test_image_is_kept(operator: Any, make_job: MakeJob) -> None:
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


def test_run_config_version_is_kept(operator: Any, make_job: MakeJob) -> None:
    """A job whose first attempt had a RunConfig that this operator does not write waits for one that does."""
    job = make_job()
    job.pods(0)
    assert job.status["provenance"]["runConfigVersion"] == 1
    job.patch({"suspend": True})
    job.until(lambda status: status["attempts"][-1].get("end"))
    raw = job.get()
    raw["status"]["provenance"]["runConfigVersion"] = 2
    job.client.put(f"{job.path}/status", raw)

    job.patch({"suspend": False})

    status = job.until(lambda status: status["observedGeneration"] == 3 and status["phase"] == "Pending")
    assert "version 2 of the RunConfig" in status["message"]
    assert job.gangs() == []


def test_image_that_is_not_allowed(operator: Any, make_job: MakeJob) -> None:
    """A job that names an image which the settings do not allow waits, says so, and runs once they do."""
    job = make_job(image=ELSEWHERE)
    status = job.until_phase("Pending")
    assert job.condition("Initialized")["reason"] == "ImageNotAllowed"
    assert f"spec.image {ELSEWHERE} is not allowed here" in status["message"]
    assert job.gangs() == []

    restart(operator, allowedImages=["elsewhere.example/*"])

    assert {image_of(pod) for pod in job.pods(0)} == {ELSEWHERE}
    assert job.status["provenance"]["image"] == ELSEWHERE


def test_image_that_is_not_allowed_any_more(operator: Any, make_job: MakeJob) -> None:
    """A job that has begun goes on with its image when the settings no longer allow it to new jobs."""
    job = make_job(image="registry.example/special:1")
    pods = job.run()
    restart(operator, allowedImages=[])

    with job.kubelet.finish_terminations(job.namespace):
        job.kubelet.failed(pods[0], 1)
        assert {image_of(pod) for pod in job.pods(1)} == {"registry.example/special:1"}


def test_finished_while_the_operator_was_replaced(operator: Any, make_job: MakeJob) -> None:
    """A job that ends while no operator runs is found finished by the next one."""
    job = make_job()
    pods = job.run()
    operator.kill(signal.SIGTERM)
    for pod in pods:
        job.kubelet.succeeded(pod)
    operator.start()

    assert job.until_phase("Succeeded")["attempt"] == 0
