"""Transfers that end while no operator is there to see it."""

from collections.abc import Callable
from typing import Any

import pytest

from testcluster.cluster import Cluster
from testcluster.witness import Witness

pytestmark = pytest.mark.cluster

MakeJob = Callable[..., Any]
STAGES = ("fetch", "train", "publish")
COMMIT = "c0ffee" * 6 + "c0ff"


def test_a_stage_that_ends_while_no_operator_runs_is_noticed(
    new_operator: Callable[..., Any], make_remote_job: MakeJob, namespace: str, witness: Witness
) -> None:
    """A stage that ends while no operator is there is noticed by the next one: each stage runs once."""
    operator = new_operator("--namespace", namespace)
    operator.start()
    job = make_remote_job(backoffLimit=0, infrastructureBackoffLimit=0)

    for attempt, stage in enumerate(STAGES):
        pods = job.goes(attempt, stage)
        operator.kill()
        job.done(pods, stage)
        job.until_gang(attempt, lambda gang: gang["status"].get("completionTime"))
        operator.start()

    status = job.until_phase("Succeeded")
    assert [each["reason"] for each in status["attempts"]] == ["Fetched", "Trained", "Succeeded"]
    assert status["provenance"]["modelRevision"] == COMMIT
    witness.look()
    assert witness.faults == []
    assert {attempt: len(jobs) for (_, attempt), jobs in witness.jobs.items()} == {"0": 1, "1": 1, "2": 1}


def test_a_fetch_whose_report_is_gone_is_done_again(
    new_operator: Callable[..., Any], make_remote_job: MakeJob, namespace: str, api_cluster: Cluster
) -> None:
    """A fetch whose pod was removed before anybody read its report is done again, at the cluster's cost."""
    operator = new_operator("--namespace", namespace)
    operator.start()
    job = make_remote_job()
    (pod,) = job.goes(0, "fetch")
    operator.kill()
    job.done([pod], "fetch")
    job.until_gang(0, lambda gang: gang["status"].get("completionTime"))
    name = pod["metadata"]["name"]
    api_cluster.client.delete(f"/api/v1/namespaces/{namespace}/pods/{name}", {"gracePeriodSeconds": 0})

    operator.start()

    job.until(lambda status: status["attempt"] == 1)
    status = job.status
    assert status["attempts"][0]["reason"] == "Disrupted"
    assert status["restarts"] == {"user": 0, "infrastructure": 1}
    job.done(job.goes(1, "fetch"), "fetch")
    job.begins(2, "train")
