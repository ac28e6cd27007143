"""What the administrator's settings let jobs ask for, and give to those that transfer."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.cluster

MakeJob = Callable[..., Any]


def test_a_job_with_a_source_that_is_not_allowed_waits(
    new_operator: Callable[..., Any], make_remote_job: MakeJob, namespace: str
) -> None:
    """The job waits with the field and its value in the message, nothing is created for it, and it starts once
    the administrator allows it."""
    strict = new_operator("--namespace", namespace, allowedSources=["hf://*", "s3://bucket/docs*"])
    strict.start()
    job = make_remote_job()

    job.until(lambda _: job.condition("Initialized").get("reason") == "SourceNotAllowed")
    assert "spec.output.destination s3://bucket/adapters is not allowed here" in job.status["message"]
    assert job.status["phase"] == "Pending"
    job.until_event("SourceNotAllowed")
    assert job.children() == []
    strict.kill()
    new_operator("--namespace", namespace).start()

    job.goes(0, "fetch")


def test_a_job_that_is_too_large_waits_until_it_is_smaller(
    new_operator: Callable[..., Any], make_job: MakeJob, namespace: str
) -> None:
    """A job above a limit waits, and starts when its user has suspended it and made it smaller."""
    new_operator("--namespace", namespace, limits={"pods": 1, "memory": "64Gi"}).start()
    job = make_job()

    job.until(lambda _: job.condition("Initialized").get("reason") == "LimitExceeded")
    assert "spec.topology asks for 2 pods in all, and a job may have 1" in job.status["message"]
    assert job.children() == []
    job.patch({"suspend": True})
    job.until_phase("Suspended")
    job.patch({"suspend": False, "topology": {"pods": 1}})

    job.run(0, 1)


def test_the_administrators_network_is_the_transfers(
    new_operator: Callable[..., Any], make_remote_job: MakeJob, namespace: str
) -> None:
    """Service account, proxy and mirror reach the fetch's pod through the real API, and none of the ranks'."""
    transfer = {
        "serviceAccountName": "default",
        "httpsProxy": "http://proxy.example:3128",
        "hubEndpoint": "https://hub.example",
        "caBundleConfigMap": "authorities",
        "cpu": "250m",
    }
    new_operator("--namespace", namespace, transfer=transfer).start()
    job = make_remote_job()

    (fetcher,) = job.goes(0, "fetch")
    environment = {each["name"]: each.get("value") for each in fetcher["spec"]["containers"][0]["env"]}
    assert environment["HTTPS_PROXY"] == "http://proxy.example:3128"
    assert environment["HF_ENDPOINT"] == "https://hub.example"
    assert environment["SSL_CERT_FILE"] == "/etc/qlora/ca/ca.crt"
    assert fetcher["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "250m"
    job.done([fetcher], "fetch")
    ranks = job.goes(1, "train")
    names = {each["name"] for pod in ranks for each in pod["spec"]["containers"][0]["env"]}
    assert names & {"HTTPS_PROXY", "HF_ENDPOINT", "SSL_CERT_FILE"} == set()
    assert [volume for pod in ranks for volume in pod["spec"]["volumes"] if "configMap" in volume] == []
